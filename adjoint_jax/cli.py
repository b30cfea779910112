"""The command line: `adjoint-jax guide` steers samples by gradient, `adjoint-jax sample` only samples, `adjoint-jax convert` writes checkpoints anew.

`python -m adjoint_jax` is the same.

Everything is built and checked before anything is written. Whatever is wrong is one sentence on standard error and exit status 2.
"""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import numpy as np

from ._options import KINDS, Convert, Guide, Sample, read_config, recorded

EXTRA = {"tyro": "tyro", "tqdm": "tqdm", "matplotlib": "matplotlib", "PIL": "pillow"}


def main(argv: Sequence[str] | None = None) -> None:
    """The console program. Exits with status 2 and one sentence where something is wrong."""
    try:
        if missing := [package for name, package in EXTRA.items() if importlib.util.find_spec(name) is None]:
            raise ValueError(f"The command line needs {', '.join(missing)}: pip install 'adjoint-jax[cli]'.")
        options = parse(sys.argv[1:] if argv is None else argv)
        if isinstance(options, Convert):
            convert(options)
        else:
            guide(options) if isinstance(options, Guide) else draw(options)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"adjoint-jax: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(argv: Sequence[str]) -> Guide | Sample | Convert:
    """The options of a command line; the file named by --config changes the defaults, but for `convert`, whose file is that of a network."""
    import tyro

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="adjoint-jax")
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    commands = []
    for name, kind in KINDS.items():
        default = {} if kind is Convert else {"default": kind(**(read_config(path, kind) if path and name == argv[0] else {}))}
        commands.append(Annotated[kind, tyro.conf.subcommand(name, description=str(kind.__doc__), **default)])
    command: Any = Union[tuple(commands)]  # noqa: UP007, made at run time
    return tyro.cli(command, args=argv, prog="adjoint-jax", config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs))


def convert(options: Convert) -> None:
    """The command `convert`."""
    from .checkpoints import _files as layout, convert

    config = layout.read_json(Path(options.config)) if options.config else None
    named = {name: getattr(options, name) for name in ("kind", "variant", "dtype", "weights", "prediction", "revision", "local_files_only")}
    converted = convert(options.source, options.target, config=config, **named)
    left = f"; left out: {', '.join(converted.dropped[:5])}{' ...' * (len(converted.dropped) > 5)}" if converted.dropped else ""
    print(f"{', '.join(filter(None, converted.parts)) or 'One network'} ({converted.classes()}) in {options.target}{left}.")


def draw(options: Sample) -> None:
    """The command `sample`."""
    from . import _build, _files

    out = Path(options.out)
    _files.claim(out, resume=False)
    sampler, given, variables = _build.sampler(options)
    images = sampler(given, variables)
    _files.write(out, {"samples.npz": _files.npz({"images": images, **variables}), "samples.png": _files.png(images)})
    print(f"{options.batch} samples are in {out / 'samples.png'}.")


def guide(options: Guide) -> None:
    """The command `guide`."""
    from tqdm import tqdm

    from . import _build, _files
    from .guide import audit, evaluations, steer

    out, config = Path(options.out), recorded(options)
    _files.claim(out, options.resume)
    steering, given, start = _build.steering(options)
    progress = restored = _files.restore(out, config, steering.start(start))
    done = len(progress.history)
    with tqdm(total=options.iterations + 1, initial=done, desc="guide", unit="iterate") as bar:
        for progress in steer(steering, given, restored, options.iterations):
            done = len(progress.history)
            bar.set_postfix(metric=f"{progress.history[-1]['metric']:.4f}", refresh=False)
            bar.update()
            if done == 1 or done % options.save_every == 0 or done >= options.iterations:
                _files.save(out, config, progress)
    history, final = progress.history, {**progress.variables, "images": progress.images}
    name = _build.describe(options)
    images = {"after.png": _files.png(progress.images), "metric.png": _files.curve(history, name), "final.npz": _files.npz(final)}
    _files.write(out, images)
    print("Auditing the gradient at the first and the last iterate ...", file=sys.stderr)
    audited = audit(steering.sampler, given, {"first": start, "last": progress.variables}, _build.compared(options, steering))
    cost = _cost(history, evaluations(steering.sampler, steering.adjoint))
    _files.write(out, {"report.md": _files.report(config, history, audited, name, cost).encode()})
    print(f"{name}: {history[0]['metric']:.4g} before, {history[-1]['metric']:.4g} after; see {out / 'report.md'}.")


def _cost(history: Sequence[Mapping[str, Any]], counts: tuple[int, int]) -> dict[str, str]:
    """Seconds, evaluations and memory, in words."""
    seconds = [row["seconds"] for row in history]
    forward, backward = counts
    return {
        "wall time of the iterates, compilation in the first": f"{sum(seconds):.1f} s, {np.median(seconds):.2f} s for the median one",
        "network evaluations an iterate, for the whole batch": f"{forward} forward, {backward} backward",
        "network evaluations in all": f"{forward * len(seconds)} forward, {backward * len(seconds)} backward",
        "peak memory of the process": _peak_memory(),
    }


def _peak_memory() -> str:
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"
    return "not known here"
