"""Which gradient reaches a goal first? Guided generation by every engine, each at its best learning rate, for equal network evaluations.

    python examples/compare_gradients.py --config configs/compare_gradients.toml --out runs/compare_gradients

    x_T, z, e  <-  project(Adam(g)),     g = d/d(x_T, z, e) sum_b f(x_0)_b,  exact or as an engine has it     (guide.py, equation 1)
    updates(engine) = iterations (F + B)(exact) / (F + B)(engine), at least,   F, B evaluations of one update         (1)
    seconds to the goal = (updates to the first iterate with mean f >= goal) x (least seconds of an update)          (2)

Engines are those of `adjoint_jax.experiments.engines`, and `guided`: no iterates, but guidance by the metric of the network's clean state
at every step (Chung et al., diffusion posterior sampling, ICLR 2023; Yu et al., FreeDoM, ICCV 2023), at several scales in place of learning
rates. Every learning rate of every engine is run, and the one shown that reaches the goal first, or ends highest where none does. The rates are
the same for all, and the configs end them where images leave the digits by the exact gradient: another engine might do with larger ones.
An iterate is one update, and of the greedy gradient, which needs no sample, as many as cost one of the exact one;
the sample that is looked at once an iterate is then left out of (1) and (2). An iterate of the run is one engine at one learning rate.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from judges import lenet_judge
from scipy.spatial.distance import pdist
from tuning import Arrival, least_seconds, standing

import adjoint_jax as aj
from adjoint_jax import _build
from adjoint_jax._misfits import finite, positive
from adjoint_jax._options import Guide
from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments import Progress, Run, command, iterate, mesh, npz, pictures, recorded, report
from adjoint_jax.experiments.engines import GREEDY, engine, evaluations, steady
from adjoint_jax.guide import Given, Sampler, Steering, audit, steer

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


def check(options: Options) -> None:
    """Raises ValueError for options of `guide` that this comparison sets itself."""
    default = Options()
    if set_twice := [key for key in ("adjoint", "learning_rate", *_adjoint_keys()) if getattr(options, key) != getattr(default, key)]:
        raise ValueError(f"--engines and --learning-rates say what is compared: leave {', '.join(set_twice)} out.")
    if not options.engines or not options.learning_rates or not options.scales:
        raise ValueError("--engines, --learning-rates and --scales each need a value.")
    finite(options, "scales")
    positive(options, "learning_rates")
    if options.engines[0] == GUIDED:
        raise ValueError("The first of --engines is the measure of the others' evaluations: let it be one that iterates, discrete for instance.")
    if GUIDED in options.engines and options.prompt is not None:
        raise ValueError("Guided looks at the network's clean state, which with --prompt is no image: leave it out of --engines.")
    for name in options.engines:
        if name != GUIDED:
            steady(name)


def _adjoint_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(Guide) if field.name.startswith("adjoint_")]


def guided(sampler: Sampler, given: Given, variables: Any, scale: Any) -> Any:
    """Images under guidance by the metric of the network's clean state, at every step."""

    def log_prob(x: Any, t: Any, args: Any) -> Any:
        return given.metric(aj.DiffusionTerm(sampler.network, sampler.process, sampler.prediction).x0_and_eps(t, x, args)[0])

    network = aj.networks.classifier_guidance(sampler.network, log_prob, sampler.process, sampler.prediction, scale)
    return dataclasses.replace(sampler, network=network)(given, variables)


def cost(steering: Steering, name: str) -> tuple[int, int]:
    """(forward, backward) evaluations of one update, or of one guided sample, which takes the metric's gradient at each as it goes."""
    return evaluations(steering.sampler, engine("discrete" if name == GUIDED else name), look=False)


class Race:
    """What is compared: of each engine the steering, and how many iterates of how many updates it gets; and what guidance makes at once."""

    def __init__(self, options: Options, steering: Steering, given: Given, variables: Any) -> None:
        self.options, self.steering, self.given, self.variables = options, steering, given, variables
        self.runs = [(name, rate) for name in options.engines for rate in (options.scales if name == GUIDED else options.learning_rates)]
        first = sum(cost(steering, options.engines[0]))
        tuned = optax.inject_hyperparams(lambda learning_rate: _build.optimiser(options, learning_rate))(1.0)
        self.steered, self.iterations = {}, {}
        for name in (name for name in options.engines if name != GUIDED):
            spent = sum(cost(steering, name))
            updates = max(1, first // spent) if name == GREEDY else 1
            self.steered[name] = dataclasses.replace(steering, adjoint=engine(name), optimiser=tuned, updates=updates)
            self.iterations[name] = ceil(options.iterations * first / (spent * updates))
        self.sample = jax.jit(partial(guided, steering.sampler))

    def start(self, name: str, rate: float) -> Progress:
        """Before an engine's first iterate, Adam at that rate."""
        start = self.steered[name].start(self.variables)
        optimiser = start.state.optimiser._replace(hyperparams={"learning_rate": jnp.float32(rate)})
        return start._replace(state=mesh.together(start.state._replace(optimiser=optimiser)))

    def made(self, name: str, rate: float) -> tuple[Any, list[Any]]:
        """The last images of an engine, and the metric of all images at each iterate."""
        if name == GUIDED:
            images = self.sample(self.given, self.variables, rate)
            return images, [np.asarray(mesh.fetched(self.given.metric(images)), np.float64)]
        *_, last = steer(self.steered[name], self.given, self.start(name, rate), self.iterations[name])
        return last.state.images, [np.asarray(row["per_image"], np.float64) for row in last.history]

    def step(self, state: Any, k: int) -> tuple[Any, dict[str, Any]]:
        """One engine at one learning rate."""
        name, rate = self.runs[k]
        images, metrics = self.made(name, rate)
        means = [float(np.mean(each)) for each in metrics]
        reached = next((i for i, mean in enumerate(means) if mean >= self.options.goal), None)
        updates = 0 if name == GUIDED else self.steered[name].updates
        row = {"engine": name, "rate": rate, "updates": updates, "metric": means, "per_image": metrics[-1].tolist(), "reached": reached}
        return mesh.replaced(state, k, images), row

    def seconds(self) -> dict[str, float]:
        """Of one update of each engine, the greedy one's look left out, and of one guided sample."""
        rate = self.options.learning_rates[0]
        update = jax.jit(lambda name, given, state: self.steered[name].updated(given, state, look=False)[0].variables, static_argnums=0)
        calls = {name: partial(update, name, self.given, self.start(name, rate).state) for name in self.steered}
        if GUIDED in self.options.engines:
            calls[GUIDED] = partial(self.sample, self.given, self.variables, self.options.scales[0])
        return least_seconds(calls)


def main(options: Options) -> None:
    check(options)
    run = Run(Path(options.out), recorded(options), options.resume, options.checkpointer)
    steering, given, variables = _build.steering(dataclasses.replace(options, adjoint="discrete"))
    race = Race(options, steering, given, variables)
    total = len(race.runs)
    restored = run.restore(np.zeros((total, *steering.sampler.like(variables["x_T"]).shape), np.float32))
    progress = run.follow(iterate(race.step, restored, total), restored, total, options.save_every)
    best, seconds = chosen(progress), race.seconds()
    images = progress.state
    read = judged(options, images[list(best.values())])
    before = mesh.fetched(steering.sampler(given, variables))
    rows = {"before": before, **{name: images[k] for name, k in best.items()}}
    metrics = {name: progress.history[k]["metric"] for name, k in best.items() if name != GUIDED}
    lines = {name: (np.arange(len(metric)) * race.steered[name].updates * seconds[name], metric) for name, metric in metrics.items()}
    results = {name: {key: progress.history[k][key] for key in ("rate", "updates", "reached", "metric", "per_image")} for name, k in best.items()}
    apart = {name: spread(made) for name, made in rows.items()}
    run.write(
        {
            "final.npz": npz({"before": before, "images": images}),
            "results.json": to_json({"goal": options.goal, "engines": results, "judge": read, "apart": apart}),
            "images.png": pictures.table_of_images({name: made[:8] for name, made in rows.items()}),
            "metric.png": pictures.curves(lines, "seconds", _build.describe(options)),
        }
    )
    adjoints = {name: engine(name) for name in options.engines if name != GUIDED}
    audited = audit(steering.sampler, given, {"first": variables}, adjoints)
    lead, body = claims(race, progress, best, seconds, apart, read)
    sections = (body, report.audited(audited), report.cost(progress.seconds, more=spent(race, progress)), report.options(recorded(options)))
    run.write({"report.md": report.document("Gradients compared on guided generation", lead, *sections)})
    print(f"{lead.splitlines()[0]} See {run.out / 'report.md'}.")


def chosen(progress: Progress) -> dict[str, int]:
    """The run of each engine that reaches the goal first, or where none does, the highest metric at its end."""

    def merit(k: int) -> tuple[float, float]:
        row = progress.history[k]
        return (np.inf if row["reached"] is None or row["engine"] == GUIDED else row["reached"]), -row["metric"][-1]

    numbers = {name: list(group) for name, group in itertools.groupby(range(len(progress.history)), lambda k: progress.history[k]["engine"])}
    return {name: min(group, key=merit) for name, group in numbers.items()}


def judged(options: Options, images: Any) -> list[float] | None:
    """The share of each engine's images that a LeNet reads as the target; None where it is absent, or the metric is no class of digits."""
    if options.metric != "classifier" or options.classifier is not None:
        return None
    lenet, _ = lenet_judge(options.judge, images.shape[2:])
    return None if lenet is None else [float(np.mean(lenet.read(each) == _build.target(options))) for each in images]


def spent(race: Race, progress: Progress) -> dict[str, str]:
    """Evaluations of the network in all runs, samples that greedy draws to look at left out."""
    updates = [1 if row["engine"] == GUIDED else (len(row["metric"]) - 1) * row["updates"] for row in progress.history]
    each = [cost(race.steering, row["engine"]) for row in progress.history]
    forward, backward = (sum(count * pair[k] for count, pair in zip(updates, each, strict=True)) for k in (0, 1))
    return {"network evaluations in all": f"{forward} forward, {backward} backward"}


def spread(images: Any) -> float | None:
    """The mean rms distance between two of the images: near 0 where all became the same one."""
    flat = np.reshape(images, (len(images), -1))
    return float(np.mean(pdist(flat)) / np.sqrt(flat.shape[1])) if len(flat) > 1 else None


def claims(
    race: Race, progress: Progress, best: dict[str, int], seconds: dict[str, float], apart: dict[str, float | None], read: list[float] | None
) -> tuple[str, str]:
    """The sentence and the table that the comparison comes to."""
    told = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    options, first, lines, times = race.options, sum(cost(race.steering, race.options.engines[0])), [], {}
    for i, (name, k) in enumerate(best.items()):
        row, (forward, backward) = progress.history[k], cost(race.steering, name)
        reached, updates = row["reached"], row["updates"]
        if reached is not None and name != GUIDED:
            times[name] = Arrival(reached * updates * seconds[name], reached * updates, forward + backward)
        count, pace = (len(row["metric"]) - 1) * updates, f"{1e3 * seconds[name]:.0f}"
        cells = (forward, backward, f"{(forward + backward) / first:.2f}", row["rate"], count, pace)
        came = ("-" if reached is None else reached * updates, f"{times[name].seconds:.2f}" if name in times else "-", f"{row['metric'][-1]:.3g}")
        lines.append((name, *cells, *came, told(apart[name]), *(() if read is None else (f"{100 * read[i]:.0f} %",))))
    order = sorted(times, key=lambda name: times[name].seconds)
    lead = f"Goal: {_build.describe(options)}, mean at least {options.goal:g}. "
    lead += f"First by wall time: {', '.join(f'{name} ({times[name].seconds:.2f} s)' for name in order)}." if order else "No engine reached it."
    lead += standing(times, best) if order else ""
    if GUIDED in best and progress.history[best[GUIDED]]["metric"][-1] >= options.goal:
        row = progress.history[best[GUIDED]]
        lead += f" Guidance at every step is there in one sample ({seconds[GUIDED]:.2f} s, scale {row['rate']:g}: {row['metric'][-1]:.3g}): it gives"
        lead += " an image, and no noise or embedding to draw it again without the metric."
    never = [name for name in best if name not in times and name != GUIDED]
    lead += f" Never: {', '.join(never)}." if never and order else ""
    work = ("engine", "forward", "backward", "relative cost", "rate or scale", "updates", "ms")
    head = (*work, "updates to goal", "s to goal", "metric at end", "between images")
    body = report.section(
        "Engines at equal network evaluations",
        "Each at the learning rate (scale, for guided) that reaches the goal first, or ends highest where none does. Seconds are the least of an "
        "update, all engines' taken in turn; guided is one sample. The greedy gradient needs no sample: many of its updates are one iterate, after "
        "which its sample is looked at, outside of its time and evaluations. Between images is the mean rms distance of two of them, "
        f"{told(apart['before'])} before.",
        report.table((*head, *(() if read is None else ("LeNet reads the target",))), lines),
        report.picture("metric.png", "the metric against seconds"),
        report.picture("images.png", "images of each engine"),
    )
    return lead, body


if __name__ == "__main__":
    command(main, Options)
