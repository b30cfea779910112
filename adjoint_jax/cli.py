"""The command line: `adjoint-jax guide` steers samples by gradient, `adjoint-jax sample` only samples, `adjoint-jax convert` writes checkpoints anew.

`python -m adjoint_jax` is the same.

Everything is built and checked before anything is written. Whatever is wrong is one sentence on standard error and exit status 2.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

from ._options import KINDS, Convert, Guide, Sample
from .experiments import mesh
from .experiments.options import config_of, guarded, read_config, recorded


def main(argv: Sequence[str] | None = None) -> None:
    """The console program. Exits with status 2 and one sentence where something is wrong."""

    def run(argv: Sequence[str]) -> None:
        options = parse(argv)
        if isinstance(options, Convert):
            convert(options)
        else:
            mesh.begin(options.distributed)
            guide(options) if isinstance(options, Guide) else draw(options)

    guarded(run, sys.argv[1:] if argv is None else argv)


def parse(argv: Sequence[str]) -> Guide | Sample | Convert:
    """The options of a command line; the file named by --config changes the defaults, but for `convert`, whose file is that of a network."""
    import tyro

    path = config_of(argv)
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
    from . import _build
    from .experiments import pictures, run

    out = Path(options.out)
    run.claim(out, resume=False)
    sampler, given, variables = _build.sampler(options)
    images = sampler(given, variables)
    mesh.wait("sampled")
    run.write(out, {"samples.npz": run.npz({"images": images, **variables}), "samples.png": pictures.sheet(images)})
    print(f"{options.batch} samples are in {out / 'samples.png'}.")


def guide(options: Guide) -> None:
    """The command `guide`."""
    from . import _build
    from .experiments import Run, npz, pictures, report
    from .experiments.engines import evaluations
    from .guide import audit, steer

    config = recorded(options)
    run = Run(Path(options.out), config, options.resume, options.checkpointer)
    steering, given, start = _build.steering(options)
    restored = run.restore(steering.start(start).state)
    total = options.iterations + 1
    before = lambda progress: {"before.png": pictures.sheet(progress.state.before)}  # noqa: E731
    progress = run.follow(steer(steering, given, restored, options.iterations), restored, total, options.save_every, before, "metric")
    history, state, name = progress.history, progress.state, _build.describe(options)
    final = npz({**state.variables, "images": state.images})
    run.write({"after.png": pictures.sheet(state.images), "metric.png": pictures.curve(history, name), "final.npz": final})
    print("Auditing the gradient at the first and the last iterate ...", file=sys.stderr)
    audited = audit(steering.sampler, given, {"first": start, "last": state.variables}, _build.compared(options, steering))
    devices = {"devices": mesh.words(mesh.of(start))}
    cost = report.cost(progress.seconds, evaluations(steering.sampler, steering.adjoint), devices)
    lead, table = _gains(history, name)
    run.write({"report.md": report.document("Guidance by gradient", lead, table, report.audited(audited), cost, report.options(config))})
    print(f"{name}: {history[0]['metric']:.4g} before, {history[-1]['metric']:.4g} after; see {run.out / 'report.md'}.")


def _gains(history: Sequence[Any], name: str) -> tuple[str, str]:
    """What came of it, in a sentence and a table."""
    from .experiments.report import picture, table

    first, last = history[0], history[-1]
    gained = sum(after > before for before, after in zip(first["per_image"], last["per_image"], strict=True))
    ends = [("mean", f"{first['metric']:.4g}", f"{last['metric']:.4g}")]
    for kind, pick in (("worst image", min), ("best image", max)):
        ends.append((kind, f"{pick(first['per_image']):.4g}", f"{pick(last['per_image']):.4g}"))
    pictures = " ".join(picture(f"{file}.png", file) for file in ("before", "after", "metric"))
    lead = f"Higher is better: {name}. It rose for {gained} of {len(first['per_image'])} images in {last['iteration']} iterations."
    return f"{lead}\n\n{pictures}", table(("metric", "before", "after"), ends)
