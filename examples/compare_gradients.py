"""Which gradient reaches a goal first? Guided generation by every engine, each at its best learning rate, for equal network evaluations.

    python examples/compare_gradients.py --config configs/compare_gradients.toml --out runs/compare_gradients

    x_T, z, e  <-  project(Adam(g)),     g = d/d(x_T, z, e) sum_b f(x_0)_b,  exact or as an engine has it     (guide.py, equation 1)
    iterations(engine) = ceil(iterations (F + B)(exact) / (F + B)(engine)),   F, B evaluations of one gradient        (1)
    seconds to the goal = (first iterate with mean f >= goal) x (median seconds of that engine's iterates)           (2)

Engines are those of `adjoint_jax.experiments.engines`, and `guided`: no iterates, but guidance by the metric of the network's clean state
at every step (Chung et al., diffusion posterior sampling, ICLR 2023; Yu et al., FreeDoM, ICCV 2023), at several scales in place of learning
rates. Every learning rate of every engine is run, and the best at the end is shown: none is handicapped by another's.
An iterate of the run is one engine at one learning rate.
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lenet import load_lenet

import adjoint_jax as aj
from adjoint_jax import _build
from adjoint_jax._options import Guide
from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments import Progress, Run, command, iterate, mesh, npz, pictures, recorded, report
from adjoint_jax.experiments.engines import engine
from adjoint_jax.guide import Given, Sampler, Steering, audit, evaluations, steer

GUIDED = "guided"


@dataclass(frozen=True)
class Options(Guide):
    """Compares gradients of a sampler by what they reach, and when."""

    out: str = "runs/compare_gradients"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    engines: tuple[str, ...] = ("discrete", "kept", "deis:6", "deis:3", "published:6", "published-1:6", "last-k:1", "last-k:3", "greedy", "guided")
    """Engines, `name` or `name:number`; the first is the one that the others' evaluations are made equal to."""
    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Of Adam, for each engine."""
    scales: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """Of the engine guided."""
    goal: float = -0.7
    """The mean metric to reach; -0.7 is a probability of one half."""
    judge: str = "../shared/data/mnist_lenet5.npz"
    """Weights of the LeNet that reads the images and had no part; left out where the file is absent."""
    save_every: int = 1
    """Runs of an engine between saves."""


def runs(options: Options) -> list[tuple[str, float]]:
    """Each engine at each of its learning rates or scales."""
    return [(name, rate) for name in options.engines for rate in (options.scales if name == GUIDED else options.learning_rates)]


def check(options: Options) -> None:
    """Raises ValueError for options of `guide` that this comparison sets itself."""
    default = Options()
    if set_twice := [key for key in ("adjoint", "learning_rate", *_adjoint_keys()) if getattr(options, key) != getattr(default, key)]:
        raise ValueError(f"--engines and --learning-rates say what is compared: leave {', '.join(set_twice)} out.")
    if not options.engines or not options.learning_rates or not options.scales:
        raise ValueError("--engines, --learning-rates and --scales each need a value.")
    if options.engines[0] == GUIDED:
        raise ValueError("The first of --engines is the measure of the others' evaluations: let it be one that iterates, discrete for instance.")
    for name in options.engines:
        if name != GUIDED:
            engine(name)


def _adjoint_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(Guide) if field.name.startswith("adjoint_")]


def guided(sampler: Sampler, given: Given, variables: Any, scale: Any) -> Any:
    """Images under guidance by the metric of the network's clean state, at every step."""

    def log_prob(x: Any, t: Any, args: Any) -> Any:
        return given.metric(aj.DiffusionTerm(sampler.network, sampler.process, sampler.prediction).x0_and_eps(t, x, args)[0])

    network = aj.networks.classifier_guidance(sampler.network, log_prob, sampler.process, sampler.prediction, scale)
    return dataclasses.replace(sampler, network=network)(given, variables)


def cost(steering: Steering, name: str) -> tuple[int, int]:
    """(forward, backward) evaluations of one gradient, or of one guided sample."""
    steps = len(steering.sampler.grid) - 1
    return (2 * steps, steps) if name == GUIDED else evaluations(steering.sampler, engine(name))


def compare(options: Options, steering: Steering, given: Given, variables: Any) -> Any:
    """A step of the run: one engine at one learning rate, (state, k) -> (state, row)."""
    first = sum(cost(steering, options.engines[0]))
    sample = jax.jit(partial(guided, steering.sampler))
    tuned = optax.inject_hyperparams(lambda learning_rate: _build.optimiser(options, learning_rate))
    steered = {name: dataclasses.replace(steering, adjoint=engine(name), optimiser=tuned(1.0)) for name in options.engines if name != GUIDED}

    def at_once(scale: float) -> tuple[Any, float, list[Any]]:
        """The images of guidance, and the seconds that they take the second time."""
        jax.block_until_ready(sample(given, variables, scale))
        begin = time.perf_counter()
        images = jax.block_until_ready(sample(given, variables, scale))
        return images, time.perf_counter() - begin, [np.asarray(mesh.fetched(given.metric(images)), np.float64)]

    def in_turns(name: str, rate: float) -> tuple[Any, float, list[Any]]:
        """The last images of an engine's iterates, the median of their seconds, and all their metrics."""
        start = steered[name].start(variables)
        optimiser = start.state.optimiser._replace(hyperparams={"learning_rate": jnp.float32(rate)})
        count = ceil(options.iterations * first / sum(cost(steering, name)))
        *_, last = steer(steered[name], given, start._replace(state=mesh.together(start.state._replace(optimiser=optimiser))), count)
        return last.state.images, float(np.median(last.seconds[1:])), [np.asarray(row["per_image"], np.float64) for row in last.history]

    def step(state: Any, k: int) -> tuple[Any, dict[str, Any]]:
        name, rate = runs(options)[k]
        images, seconds, metrics = at_once(rate) if name == GUIDED else in_turns(name, rate)
        means = [float(np.mean(each)) for each in metrics]
        reached = next((i for i, mean in enumerate(means) if mean >= options.goal), None)
        row = {"engine": name, "rate": rate, "metric": means, "per_image": metrics[-1].tolist(), "reached": reached}
        return {"images": mesh.replaced(state["images"], k, images), "seconds": mesh.replaced(state["seconds"], k, seconds)}, row

    return step


def main(options: Options) -> None:
    check(options)
    run = Run(Path(options.out), recorded(options), options.resume, options.checkpointer)
    steering, given, variables = _build.steering(dataclasses.replace(options, adjoint="discrete"))
    table = runs(options)
    start = {"images": np.zeros((len(table), *variables["x_T"].shape), np.float32), "seconds": np.zeros(len(table))}
    restored = run.restore(start)
    progress = run.follow(iterate(compare(options, steering, given, variables), restored, len(table)), restored, len(table), options.save_every)
    best = chosen(options, progress)
    images = progress.state["images"]
    read = judged(options, images[list(best.values())], given)
    before = mesh.fetched(steering.sampler(given, variables))
    rows = {"before": before, **{name: images[k] for name, k in best.items()}}
    lines = {
        name: (np.arange(len(row["metric"])) * seconds, row["metric"])
        for name, row, seconds in ((name, progress.history[k], float(progress.state["seconds"][k])) for name, k in best.items())
        if name != GUIDED
    }
    results = {name: {key: progress.history[k][key] for key in ("rate", "reached", "metric", "per_image")} for name, k in best.items()}
    run.write(
        {
            "final.npz": npz({"before": before, "images": images}),
            "results.json": to_json({"goal": options.goal, "engines": results, "judge": read}),
            "images.png": pictures.table_of_images({name: made[:8] for name, made in rows.items()}),
            "metric.png": pictures.curves(lines, "seconds", _build.describe(options)),
        }
    )
    adjoints = {name: engine(name) for name in options.engines if name != GUIDED}
    audited = audit(steering.sampler, given, {"first": variables}, adjoints)
    lead, body = claims(options, steering, progress, best, read)
    sections = (body, report.audited(audited), report.cost(progress.seconds), report.options(recorded(options)))
    run.write({"report.md": report.document("Gradients compared on guided generation", lead, *sections)})
    print(f"{lead.splitlines()[0]} See {run.out / 'report.md'}.")


def chosen(options: Options, progress: Progress) -> dict[str, int]:
    """The run of each engine that reaches the goal first, or where none does, the highest metric at its end."""

    def merit(k: int) -> tuple[float, float]:
        row = progress.history[k]
        return (np.inf if row["reached"] is None or row["engine"] == GUIDED else row["reached"]), -row["metric"][-1]

    numbers = {name: list(group) for name, group in itertools.groupby(range(len(progress.history)), lambda k: progress.history[k]["engine"])}
    return {name: min(group, key=merit) for name, group in numbers.items()}


def judged(options: Options, images: Any, given: Given) -> list[float] | None:
    """The share of each engine's images that a LeNet reads as the target; None where it is absent, or the metric is no class of digits."""
    if options.metric != "classifier" or options.classifier is not None or not Path(options.judge).is_file():
        return None
    target = _build.target(options)
    lenet = load_lenet(options.judge)
    return [float(np.mean(np.argmax(lenet(each), axis=1) == target)) for each in images]


def claims(options: Options, steering: Steering, progress: Progress, best: dict[str, int], read: list[float] | None) -> tuple[str, str]:
    """The sentence and the table that the comparison comes to."""
    first = sum(cost(steering, options.engines[0]))
    lines, times = [], {}
    for i, (name, k) in enumerate(best.items()):
        row, seconds = progress.history[k], float(progress.state["seconds"][k])
        forward, backward = cost(steering, name)
        reached = row["reached"]
        if reached is not None and name != GUIDED:
            times[name] = reached * seconds
        cells = (forward, backward, f"{(forward + backward) / first:.2f}", row["rate"], len(row["metric"]) - 1, f"{1e3 * seconds:.0f}")
        came = ("-" if reached is None else reached, f"{times[name]:.2f}" if name in times else "-", f"{row['metric'][-1]:.3g}")
        lines.append((name, *cells, *came, *(() if read is None else (f"{100 * read[i]:.0f} %",))))
    order = sorted(times, key=lambda name: times[name])
    lead = f"Goal: {_build.describe(options)}, mean at least {options.goal:g}. "
    lead += f"First by wall time: {', '.join(f'{name} ({times[name]:.2f} s)' for name in order)}." if order else "No engine reached it."
    never = [name for name in best if name not in times and name != GUIDED]
    lead += f" Never: {', '.join(never)}." if never and order else ""
    head = ("engine", "forward", "backward", "relative cost", "rate or scale", "iterates", "ms", "iterates to goal", "s to goal", "metric at end")
    body = report.section(
        "Engines at equal network evaluations",
        "Each at its best learning rate (scale, for guided). Seconds are the median of an iterate, compilation left out; guided is one sample.",
        report.table((*head, *(() if read is None else ("LeNet reads the target",))), lines),
        report.picture("metric.png", "the metric against seconds"),
        report.picture("images.png", "images of each engine"),
    )
    return lead, body


if __name__ == "__main__":
    command(main, Options)
