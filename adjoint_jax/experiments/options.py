"""Options of an experiment: a frozen dataclass, whose defaults a TOML file may change and whose flags override that."""

import argparse
import dataclasses
import importlib.util
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import mesh

EXTRA = {"tyro": "tyro", "tqdm": "tqdm", "matplotlib": "matplotlib", "PIL": "pillow"}
UNSAVED = ("config", "out", "resume", "save_every", "mesh", "distributed", "checkpointer")


@dataclass(frozen=True)
class Experiment:
    """What every experiment is told."""

    config: str | None = None
    """A TOML file of options, snake_case, that differ from the defaults; flags override it."""
    out: str = "runs/experiment"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    resume: bool = False
    """Continue the run in --out where its last save left it; starts it where there is none."""
    save_every: int = 1
    """Iterates between saves of the state that --resume starts from."""
    seed: int = 0
    """Seed of all that is drawn."""


@dataclass(frozen=True)
class OnMesh(Experiment):
    """What an experiment is told that can run on several devices."""

    mesh: str | None = None
    """Devices in named axes, data=8 or data=4,fsdp=2: images are spread over all, weights cut along fsdp; by default one device."""
    distributed: bool = False
    """One of several processes that share a run, by jax.distributed.initialize(); needs no telling where JAX_COORDINATOR_ADDRESS is set."""
    checkpointer: str | None = None
    """How the state is saved: npz, one file by process 0, or orbax, each process its part; by default npz in one process, orbax in several."""


def read_config(path: str, kind: type) -> dict[str, Any]:
    """The options in a TOML file. Raises ValueError for an unknown key or a value of another type than the option's."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in ("config", "resume")}
    if unknown := [key for key in values if key not in hints]:
        raise ValueError(f"{path} has the unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}: known are {', '.join(hints)}.")
    return {key: _checked(path, key, value, hints[key]) for key, value in values.items()}


def _checked(path: str, key: str, value: Any, hint: Any) -> Any:
    """A value of the type that the option has; lists become tuples."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and (inner := [typing.get_args(each)[0] for each in allowed if typing.get_origin(each) is tuple]):
        return tuple(_checked(path, key, each, inner[0]) for each in value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        names = ["list" if typing.get_origin(each) is tuple else each.__name__ for each in allowed if each is not types.NoneType]
        wanted = " or ".join(names)
        raise ValueError(f"{path} has {key} = {value!r} where {'an' if wanted[0] in 'aeiou' else 'a'} {wanted} was expected.")
    return value


def recorded(options: Any) -> dict[str, Any]:
    """The options that decide what a run computes."""
    return {key: value for key, value in dataclasses.asdict(options).items() if key not in UNSAVED}


def config_of(argv: Sequence[str]) -> str | None:
    """The file that a command line names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="adjoint-jax")
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def command(main: Callable[[Any], None], kind: type, argv: Sequence[str] | None = None) -> None:
    """Runs `main` with the options of a command line. Whatever is wrong is one sentence on standard error and exit status 2."""

    def run(argv: Sequence[str]) -> None:
        import tyro

        path = config_of(argv)
        default = kind(**(read_config(path, kind) if path else {}))
        options = tyro.cli(kind, args=argv, default=default, config=(tyro.conf.FlagCreatePairsOff,))
        mesh.begin(getattr(options, "distributed", False))
        main(options)

    guarded(run, sys.argv[1:] if argv is None else argv)


def guarded(run: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Calls `run(argv)`. An error that a user can mend is one sentence on standard error, and exit status 2."""
    try:
        if missing := [package for name, package in EXTRA.items() if importlib.util.find_spec(name) is None]:
            raise ValueError(f"The command line needs {', '.join(missing)}: pip install 'adjoint-jax[cli]'.")
        run(argv)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"adjoint-jax: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
