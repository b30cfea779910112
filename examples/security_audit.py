"""Security audit: noise next to a sampler's own noise from which it draws images that a classifier misreads.

    x* ~ N(0, s^2),    x in B_R = {x : |x - x*|_inf <= R s}                                                          (1)
    m(x) = max_{k != y} z_k(x_0(x)) - z_y(x_0(x)),    z the logits, y the class that the sampler was asked for           (2)
    x <- P_R(x + r R s sign(dm/dx)),    P_R onto B_R about x*, from x = x*                                           (3)
    misread:  argmax z(x_0(x)) != y  for the last x, among the images with  argmax z(x_0(x*)) = y                      (4)

x_0(x) is the whole sampler. (2) needs no softmax, and P_R is about the original noise: a clip about the present iterate would bind
nothing. Beside the gradient stand random signs e, x = x* + R s e: what misreading owes to the size of the ball alone. The samples are
also read by a classifier that was not attacked, and the roles are exchanged. At the main radius, engines for dm/dx compete: in a round
each has as many whole updates as come nearest to the network evaluations of one update of the first, and at least one.

Sources: Pan et al., AdjointDPM (ICLR 2024), the security audit; Madry et al., Towards deep learning models resistant to adversarial
attacks (ICLR 2018), for (3); Carlini & Wagner, Towards evaluating the robustness of neural networks (S&P 2017), for (2).

    python examples/security_audit.py --config configs/security_audit.toml --out runs/security_audit
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from judges import Judge, judges
from labelled import labelled
from security_tables import RANDOM, Attack, Outcome, document, results, views
from tuning import least_seconds

from adjoint_jax._misfits import at_least, finite, positive
from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments import OnMesh, Run, command, iterate, mesh, npz, recorded
from adjoint_jax.experiments.engines import GREEDY, engine, evaluations, steady
from adjoint_jax.experiments.projections import projection
from adjoint_jax.guide import Given, Sampler, Variables, audit
from adjoint_jax.solvers import DPMSolverPP

EXACT = ("kept", "discrete", "direct")
AUDITED = 10
"""Images of the audit of the gradient."""
ROUNDING = 1e-3


@dataclass(frozen=True)
class Options(OnMesh):
    """Adversarial initial noise inside an l_inf ball about the original noise: how often is the sample misread, and by whom else?"""

    out: str = "runs/security_audit"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    checkpoint: str | None = None
    """A class-conditional checkpoint in diffusers' layout, its last class the null one; by default the embedded digits."""
    size: int | None = None
    """Height and width of the images in pixels; by default the checkpoint's sample_size."""
    classifier: str | None = None
    """A folder with a ConvClassifier, the first to be attacked; by default the embedded one."""
    lenet: str = "../shared/data/mnist_lenet5.npz"
    """Weights of LeNet-5, the second classifier; where they are absent, so are its columns."""
    guidance: float = 1.0
    """Scale of classifier-free guidance."""
    steps: int = 8
    """Steps of the sampler, DPM-Solver++(2M), even in lam."""
    per_class: int = 5
    """Images of each class."""
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """R of (1), in standard deviations of the noise."""
    main_radius: float = 0.2
    """The one of --radii at which engines compete, and of the table by class."""
    rounds: int = 8
    """Updates (3) by the first engine; draws of the random signs."""
    rate: float = 0.25
    """r of (3), a share of the radius."""
    engines: tuple[str, ...] = ("kept", "discrete", "deis:4", "published", "greedy")
    """Gradients at the main radius, of `adjoint_jax.experiments.engines`; the first, an exact one, attacks at the other radii too."""
    target: float = 0.5
    """The share of misread samples that the engines race for."""


class Problem(NamedTuple):
    """The sampler, its arrays, the variables `[B, ...]` to start from, the classes `[B]` that were asked for, the readers, and a sentence on them."""

    sampler: Sampler
    given: Given
    variables: Variables
    labels: np.ndarray
    judges: dict[str, Judge]
    note: str

    def against(self, judge: str) -> Given:
        """The arrays that stay, with (2) as the metric."""
        metric = self.judges[judge].margins(jnp.asarray(self.labels))
        return self.given._replace(metric=mesh.everywhere(metric, mesh.of(self.variables)))


def problem(options: Options) -> Problem:
    """What is audited. Raises ValueError for options that do not fit."""
    at_least(options, 1, "per_class", "rounds", "steps", "save_every")
    positive(options, "main_radius", "radii", "rate")
    finite(options, "guidance")
    if not options.engines or options.engines[0] not in EXACT:
        raise ValueError(f"The first of --engines is one of {', '.join(EXACT)}, to which the others are compared; got {options.engines}.")
    for name in options.engines:
        steady(name)
    if options.main_radius not in options.radii:
        raise ValueError(f"--main-radius must be one of --radii; got {options.main_radius} and {options.radii}.")
    if not 0 < options.target <= 1:
        raise ValueError(f"--target is a share of the samples, above 0 and at most 1; got {options.target}.")
    drawn = labelled(options)
    labels = np.tile(np.arange(drawn.classes), options.per_class)
    devices = mesh.make(options.mesh, len(labels))
    sampler, given = drawn.sampler(DPMSolverPP(2), options.steps, options.guidance, devices)
    variables = {**sampler.noises(jax.random.key(options.seed), (len(labels), *drawn.shape)), "embedding": drawn.table[labels]}
    found, note = judges(options.classifier, options.lenet, drawn.shape, drawn.classes)
    return Problem(sampler, given, mesh.spread(variables, devices), labels, found, note)


def work(sampler: Sampler, name: str) -> int:
    """Network evaluations of one update, forward and backward."""
    return sum(evaluations(sampler, engine(name), look=False))


def plan(options: Options, setup: Problem) -> list[Attack]:
    """The items in their order: the race, then the curves of each reader, then random signs."""
    first, exact = next(iter(setup.judges)), work(setup.sampler, options.engines[0])
    updates = {name: max(1, round(exact / work(setup.sampler, name))) for name in options.engines}
    race = [Attack(first, name, options.main_radius, count) for name, count in updates.items()]
    curves = [Attack(judge, options.engines[0], radius, 1) for judge in setup.judges for radius in options.radii]
    return [*race, *(item for item in curves if item not in race), *(Attack("", RANDOM, radius, 1) for radius in options.radii)]


def project(x: Any, start: Any, radius: Any) -> Any:
    """P_R of (3), `radius` being R s, which may be traced."""
    return projection("linf", 1.0)(x, start, radius, tuple(range(1, x.ndim)))


def updater(sampler: Sampler, adjoint: Any) -> Callable[..., Any]:
    """(3), jitted: `update(given, variables, x, radius, step)`; `variables` hold x*, `given.metric` is (2), `radius` is R s, `step` r R s."""

    def update(given: Given, variables: Variables, x: Any, radius: Any, step: Any) -> Any:
        def total(x: Any) -> Any:
            moved = {**variables, "x_T": x}
            return jnp.sum(given.metric(sampler.guess(given, moved) if adjoint == GREEDY else sampler(given, moved, adjoint)))

        return project(x + step * jnp.sign(jax.grad(total)(x)), variables["x_T"], radius)

    return jax.jit(update)


def reached(x: Any, start: Any, radius: float) -> float:
    """max |x - x*| / (R s), `radius` being R s. Raises ValueError where it is above 1: then the ball was about something else."""
    most = float(jnp.max(jnp.abs(x - start))) / radius
    if not most <= 1 + ROUNDING:
        raise ValueError(f"The noise is {most:.3g} radii away from the original noise where 1 is allowed: project about the original noise.")
    return most


class Attacks:
    """What the run does: `step` is a round of an item. Its state holds the noise of every item, `[items, B, H, W, C]`, on the host."""

    def __init__(self, options: Options, setup: Problem, items: Sequence[Attack]):
        self.options, self.setup, self.items = options, setup, items
        self.updates = {name: updater(setup.sampler, engine(name)) for name in options.engines}
        self.given = {name: setup.against(name) for name in setup.judges}
        self.draw = jax.jit(lambda given, variables: setup.sampler(given, variables))
        self.start = mesh.host(setup.variables["x_T"])
        """x*."""

    def spread(self, x: Any) -> Any:
        """x on the devices."""
        return mesh.batched(x, mesh.of(self.setup.variables))

    def images(self, x: Any) -> Any:
        """x_0(x)."""
        return mesh.fetched(self.draw(self.setup.given, {**self.setup.variables, "x_T": self.spread(x)}))

    def update(self, item: Attack, x: Any) -> Any:
        """(3) once."""
        radius = item.radius * self.setup.sampler.spread
        sizes = jnp.float32(radius), jnp.float32(self.options.rate * radius)
        return self.updates[item.engine](self.given[item.judge], self.setup.variables, x, *sizes)

    def step(self, state: Any, k: int) -> tuple[Any, dict[str, Any]]:
        which, turn = divmod(k, self.options.rounds)
        item, x, start = self.items[which], state[which], self.start
        radius = item.radius * self.setup.sampler.spread
        if item.engine == RANDOM:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.options.seed), 1), k)
            x = start + radius * np.asarray(jax.random.rademacher(key, start.shape, jnp.float32))
        else:
            x = self.spread(x)
            for _ in range(item.updates):
                x = self.update(item, x)
        x = mesh.host(x)
        images = self.images(x)
        readings = {name: judge.read(images).tolist() for name, judge in self.setup.judges.items()}
        row = {**item._asdict(), "round": turn + 1, "reached": reached(x, start, radius), "readings": readings}
        return mesh.replaced(state, which, x), row

    def seconds(self, state: Any) -> dict[str, float]:
        """The least time of one update, of each engine, compiled."""
        x = self.spread(state[0])
        return least_seconds({item.engine: partial(self.update, item, x) for item in self.items[: len(self.updates)]})


def main(options: Options) -> None:
    run, setup = Run(Path(options.out), recorded(options), options.resume, options.checkpointer), problem(options)
    items = plan(options, setup)
    attacks, total = Attacks(options, setup, items), len(items) * options.rounds
    start = attacks.start
    restored = run.restore(np.tile(start[None], (len(items), *(1,) * start.ndim)))
    progress = run.follow(iterate(attacks.step, restored, total), restored, total, options.save_every)
    state, before = progress.state, attacks.images(start)
    found = Outcome.of(setup.labels, {name: judge.read(before) for name, judge in setup.judges.items()}, items, progress.history)
    signs = next(item for item in items if item.engine == RANDOM and item.radius == options.main_radius)
    images = {"before": before, "attacked": attacks.images(state[0]), "random": attacks.images(state[items.index(signs)])}
    run.write({"final.npz": npz({"x_T": state, "start": start, "labels": setup.labels, **images})})
    run.write({"results.json": to_json(results(found, options.target))})
    print("Timing and auditing the gradients ...", file=sys.stderr)
    seconds, spent = attacks.seconds(state), {name: work(setup.sampler, name) for name in options.engines}
    run.write(views(found, images, seconds))
    run.write({"report.md": document(found, setup.note, options, seconds, spent, audits(options, setup, state[0]), progress.seconds)})


def audits(options: Options, setup: Problem, x: Any) -> list[tuple[str, Any]]:
    """Each engine's gradient of (2) in the noise against the exact one, before and after the attack on the first reader."""
    devices = mesh.of(setup.variables)
    few = lambda value: mesh.everywhere(mesh.fetched(value)[:AUDITED], devices)  # noqa: E731
    some, first = setup._replace(labels=setup.labels[:AUDITED]), {name: few(value) for name, value in setup.variables.items()}
    points = {"first": first, "last": {**first, "x_T": few(x)}}
    rows = audit(setup.sampler, some.against(next(iter(setup.judges))), points, {name: engine(name) for name in options.engines})
    return [(point, row) for point, row in rows if row.wrt == "x_T"]


if __name__ == "__main__":
    command(main, Options)
