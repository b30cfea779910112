"""Steering a sampler by gradient: the noise and the class embedding of each image climb a metric of the image, through the whole sampler.

    maximise  sum_b f(x_0(x_T, e))_b    over x_T `[B, H, W, C]`, e `[B, E]`, or both,                                   (1)
    x_T <- r x_T / |x_T|,               r = sigma(t_start) sqrt(H W C)   (the projection "shell")                       (2)

Images of a batch do not interact, so that a sum in (1) gives each the gradient that it would have alone. Gaussian noise in many
dimensions lies on the shell (2), and a network has seen no other: without it the noise grows and the images go flat.

All arrays are arguments of one jitted update, which is traced once; the state of a run is a value (`Progress`), so that stopping after any
iterate and starting again from what was saved changes nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .adjoints import AdjointDEIS, DiscreteAdjoint
from .adjoints._nodes import choose
from .audit import AuditRow, compare
from .networks import cfg
from .processes import AbstractProcess
from .sample import sample
from .solvers import AbstractLinear
from .terms import DiffusionTerm

Variables = dict[str, Any]
"""`x_T` `[B, H, W, C]` and, for a conditional network, `embedding` `[B, E]`; float32."""


class Given(NamedTuple):
    """The arrays that stay as they are: weights, guidance scale, the null class's embedding `[E]`, and the metric as a `jax.tree_util.Partial`."""

    params: Any
    scale: Any
    null: Any
    metric: Any


class Seen(NamedTuple):
    """One iterate: images `[B, H, W, C]`, scores `[B]`, and the norm of the gradient in each driven input."""

    images: Any
    scores: Any
    norms: dict[str, Any]


class Progress(NamedTuple):
    """A run after `len(history)` iterates; `before` and `images` are those of the first and the latest."""

    variables: Variables
    optimiser: Any
    history: list[dict[str, Any]]
    before: Any = None
    images: Any = None


@dataclass(frozen=True)
class Sampler:
    """What is sampled and how; `guided` doubles the network's work for classifier-free guidance. Calling it samples, differentiably by `adjoint`."""

    network: Any
    process: AbstractProcess
    prediction: str
    grid: np.ndarray
    solver: AbstractLinear
    guided: bool = False

    def __call__(self, given: Given, variables: Variables, adjoint: diffrax.AbstractAdjoint | None = None) -> Any:
        args = {"params": given.params}
        if "embedding" in variables:
            args |= {"cond": variables["embedding"]}
        if self.guided:
            args |= {"uncond": given.null}
        network = cfg(self.network, given.scale) if self.guided else self.network
        term = DiffusionTerm(network, self.process, self.prediction)
        return sample(term, variables["x_T"], args, grid=self.grid, solver=self.solver, adjoint=adjoint)

    @property
    def spread(self) -> float:
        """sigma(t_start), the standard deviation of x_T."""
        return float(self.process.sigma(self.grid[0]))


@dataclass(frozen=True)
class Steering:
    """The problem (1): a sampler, how it is differentiated, what is driven, by which optimiser, on the shell (2) or freely."""

    sampler: Sampler
    adjoint: diffrax.AbstractAdjoint
    optimiser: optax.GradientTransformation
    driven: tuple[str, ...]
    shell: bool = True

    def start(self, variables: Variables) -> Progress:
        """Before the first iterate."""
        return Progress(variables, self.optimiser.init(self._chosen(variables)), [])

    def _chosen(self, variables: Variables) -> Variables:
        return {name: variables[name] for name in self.driven}

    def _project(self, variables: Variables) -> Variables:
        if not self.shell or "x_T" not in self.driven:
            return variables
        x = variables["x_T"]
        radius = self.sampler.spread * np.prod(x.shape[1:]) ** 0.5
        norm = jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))
        return {**variables, "x_T": x * (jnp.asarray(radius, x.dtype) / norm)}  # (2)

    def update(self, given: Given, variables: Variables, optimiser: Any) -> tuple[Variables, Any, Seen]:
        """One step of the optimiser on (1): the variables after it, its state, and what was seen before it."""

        def objective(chosen: Variables) -> Any:
            images = self.sampler(given, {**variables, **chosen}, self.adjoint)
            scores = given.metric(images)
            return -jnp.sum(scores), (images, scores)

        chosen = self._chosen(variables)
        gradient, (images, scores) = jax.grad(objective, has_aux=True)(chosen)
        updates, optimiser = self.optimiser.update(gradient, optimiser, chosen)
        stepped: Any = optax.apply_updates(chosen, updates)
        norms = jax.tree.map(lambda g: jnp.sqrt(jnp.sum(g**2)), gradient)
        return self._project({**variables, **stepped}), optimiser, Seen(images, scores, norms)


def steer(steering: Steering, given: Given, progress: Progress, iterations: int) -> Iterator[Progress]:
    """Runs the iterates that are missing, the last of which (number `iterations`) is looked at and not updated any more.

    Raises:
        FloatingPointError: where a metric or a gradient is not finite; names the iteration and, if it was there, the sampler's step.
    """
    update = jax.jit(steering.update)
    for k in range(len(progress.history), iterations + 1):
        begin = time.perf_counter()
        following, optimiser, seen = jax.block_until_ready(update(given, progress.variables, progress.optimiser))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((seen.scores, seen.norms))):
            raise FloatingPointError(f"Iteration {k}: {_blame(steering.sampler, given, progress.variables, seen)}")
        row = {
            "iteration": k,
            "metric": float(np.mean(np.asarray(seen.scores, np.float64))),
            "per_image": np.asarray(seen.scores).tolist(),
            "gradient_norm": {name: float(norm) for name, norm in seen.norms.items()},
            "seconds": round(time.perf_counter() - begin, 4),
        }
        if k == iterations:
            following, optimiser = progress.variables, progress.optimiser
        before = seen.images if progress.before is None else progress.before
        progress = Progress(following, optimiser, [*progress.history, row], before, seen.images)
        yield progress


def _blame(sampler: Sampler, given: Given, variables: Variables, seen: Seen) -> str:
    """Where the numbers went wrong: samples again outside of jit, where `sample` names its step."""
    try:
        sampler(given, variables)
    except FloatingPointError as error:
        return str(error)
    if bad := np.flatnonzero(~np.isfinite(seen.scores)).tolist():
        return f"The metric is not finite at the images {bad}, though every step of the sampler is: check the metric."
    return "The gradient is not finite, though every step of the sampler and the metric are: check the metric's derivative, or try another adjoint."


def audit(
    sampler: Sampler, given: Given, points: Mapping[str, Variables], adjoints: Mapping[str, diffrax.AbstractAdjoint]
) -> list[tuple[str, AuditRow]]:
    """Each adjoint's gradient of (1) against the exact one, in every variable, at each of the named points."""

    @eqx.filter_jit
    def gradient(given: Given, variables: Variables, adjoint: Any) -> Variables:
        return jax.grad(lambda variables: jnp.sum(given.metric(sampler(given, variables, adjoint))))(variables)

    rows = []
    for point, variables in points.items():
        exact = gradient(given, variables, DiscreteAdjoint())
        for name, adjoint in adjoints.items():
            found = gradient(given, variables, adjoint)
            rows += [(point, AuditRow(name, leaf, *compare(found[leaf], exact[leaf]))) for leaf in exact]
    return rows


def evaluations(sampler: Sampler, adjoint: diffrax.AbstractAdjoint) -> tuple[int, int]:
    """(forward, backward) evaluations of the network for one gradient, a batch counted as one and guidance as two."""
    solver = sampler.solver
    steps, rows = len(sampler.grid) - 1, solver.table(sampler.process, sampler.prediction, sampler.grid)
    stages = np.full(steps, len(solver.pattern.reads)) if rows.active is None else np.sum(rows.active, axis=1)
    once = int(stages.sum())
    forward, backward = 2 * once, once
    if isinstance(adjoint, diffrax.DirectAdjoint):
        forward = once
    if isinstance(adjoint, AdjointDEIS):
        index = choose(sampler.grid, sampler.process.lam(sampler.grid), adjoint.steps, adjoint.nodes)
        nodes = max(len(index) - (adjoint.mode == "AB"), 0)
        exact = int(stages[-1] * (index[0] < steps) + stages[0] * (index[-1] > 0)) if len(index) else once
        forward, backward = once + nodes + exact, nodes * (2 if adjoint.mode == "PECE" else 1) + exact
    times = 2 if sampler.guided else 1
    return times * forward, times * backward


def log_probability(apply: Callable, target: int, params: Any, images: Any) -> Any:
    """log p(target | image) `[B]` by a classifier `apply(variables, images)` that gives logits."""
    return jax.nn.log_softmax(apply({"params": params}, images))[:, target]


def closeness(target: Any, images: Any) -> Any:
    """Minus the mean squared distance `[B]` to `target` `[H, W, C]`, pixels in [-1, 1]."""
    return -jnp.mean((images - target[None]) ** 2, axis=(1, 2, 3))
