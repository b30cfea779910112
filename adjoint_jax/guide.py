"""Steering a sampler by gradient: noise, injected noises and embedding of each image climb a metric of the image, through the whole sampler.

    maximise  sum_b f(x_0(x_T, z, e))_b - w penalty(x_T, z)   over some of  x_T `[B, H, W, C]`, z `[steps, (k,) B, H, W, C]`, e `[B, E]`  (1)

Images of a batch do not interact, so that a sum in (1) gives each the gradient that it would have alone. After each update the noises are
projected (`experiments.projections`). All arrays are arguments of one jitted update, which is traced once; the state of a run is a value
(`Progress`), so that stopping after any iterate and starting again from what was saved changes nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .adjoints import DiscreteAdjoint
from .audit import AuditRow, compare
from .experiments import mesh
from .experiments.engines import GREEDY
from .experiments.projections import concentration, projection
from .experiments.run import Progress, iterate
from .networks import cfg
from .processes import AbstractProcess
from .sample import sample
from .solvers import AbstractLinear
from .terms import DiffusionTerm

Variables = dict[str, Any]
"""`x_T` `[B, H, W, C]`; of a random sampler `noise` `[steps, *x]` or `[steps, draws, *x]`; of a conditional network `embedding` `[B, E]`,
of a text a dict of such; float32."""


class Given(NamedTuple):
    """The arrays that stay as they are: weights, guidance scale, embedding of the null class or text, metric as a `jax.tree_util.Partial`."""

    params: Any
    scale: Any
    null: Any
    metric: Any


class Seen(NamedTuple):
    """One iterate: scores `[B]`, and the norm of the gradient in each driven input."""

    scores: Any
    norms: dict[str, Any]


class Steered(NamedTuple):
    """The state of a run; `start` are the variables that it began with, `before` and `images` the images of the first and the latest iterate."""

    variables: Variables
    optimiser: Any
    start: Variables
    before: Any
    images: Any


@dataclass(frozen=True)
class Sampler:
    """What is sampled and how; `guided` doubles the network's work for classifier-free guidance. Calling it samples, differentiably by `adjoint`.
    States are images; a sampler of latents says by `images` and `like` what images they become, and by `_problem` what is solved."""

    network: Any
    process: AbstractProcess
    prediction: str
    grid: np.ndarray
    solver: AbstractLinear
    guided: bool = False

    def __call__(self, given: Given, variables: Variables, adjoint: diffrax.AbstractAdjoint | None = None) -> Any:
        term, args = self._problem(given, variables)
        how = {"grid": self.grid, "solver": self.solver, "adjoint": adjoint, "noise": variables.get("noise")}
        return self.images(given, sample(term, variables["x_T"], args, **how))

    def guess(self, given: Given, variables: Variables) -> Any:
        """The images of the clean state that the network sees at x_T."""
        (term, args), x = self._problem(given, variables), variables["x_T"]
        return self.images(given, term.x0_and_eps(jnp.asarray(self.grid[0], x.dtype), x, args)[0])

    def images(self, given: Given, states: Any) -> Any:
        """The images of clean states."""
        return states

    def like(self, x_T: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the images."""
        return jax.ShapeDtypeStruct(x_T.shape, x_T.dtype)

    def _problem(self, given: Given, variables: Variables) -> tuple[DiffusionTerm, Any]:
        told = {"cond": variables.get("embedding"), "uncond": given.null if self.guided else None}
        args = {"params": given.params, **{name: value for name, value in told.items() if value is not None}}
        network = cfg(self.network, given.scale) if self.guided else self.network
        return DiffusionTerm(network, self.process, self.prediction), args

    @property
    def spread(self) -> float:
        """sigma(t_start), the standard deviation of x_T."""
        return float(self.process.sigma(self.grid[0]))

    def noises(self, key: Any, shape: tuple[int, ...]) -> Variables:
        """x_T of `shape` `[B, H, W, C]`, and `noise` `[N, B, H, W, C]`, or `[N, draws, B, H, W, C]`, of a sampler that injects some."""
        drawn = {"x_T": self.spread * jax.random.normal(key, shape, jnp.float32)}
        if draws := self.solver.draws:
            per_step = (len(self.grid) - 1, *((draws,) if draws > 1 else ()), *shape)
            drawn["noise"] = jax.random.normal(jax.random.fold_in(key, 1), per_step, jnp.float32)
        return drawn


@dataclass(frozen=True)
class Steering:
    """The problem (1): a sampler, how it is differentiated (an adjoint or `GREEDY`), what is driven, by which optimiser, under which constraint.

    `project` and `radius` are those of `experiments.projections.projection`, in standard deviations of the noise.
    """

    sampler: Sampler
    adjoint: diffrax.AbstractAdjoint | str
    optimiser: optax.GradientTransformation
    driven: tuple[str, ...]
    project: str = "shell"
    radius: float | None = None
    penalty: float = 0.0
    updates: int = 1
    """An iterate's, of which the first is looked at; the others of `GREEDY` draw no sample."""

    def start(self, variables: Variables) -> Progress:
        """Before the first iterate."""
        images = mesh.batched(jnp.zeros_like(self.sampler.like(variables["x_T"])), mesh.of(variables))
        return Progress(mesh.together(Steered(variables, self.optimiser.init(self._chosen(variables)), variables, images, images)))

    def _chosen(self, variables: Variables) -> Variables:
        return {name: variables[name] for name in self.driven}

    def _noises(self, variables: Variables) -> dict[str, tuple[float, tuple[int, ...]]]:
        """Of each driven noise: its standard deviation, and the axes of one image."""
        axes = tuple(range(1 - variables["x_T"].ndim, 0))
        spreads = {"x_T": self.sampler.spread, "noise": 1.0}
        return {name: (spread, axes) for name, spread in spreads.items() if name in self.driven}

    def _projected(self, variables: Variables, start: Variables) -> Variables:
        onto = projection(self.project, self.radius)
        moved = {name: onto(variables[name], start[name], spread, axes) for name, (spread, axes) in self._noises(variables).items()}
        return {**variables, **moved}

    def _penalised(self, variables: Variables) -> Any:
        return self.penalty * sum(concentration(variables[name], spread, axes) for name, (spread, axes) in self._noises(variables).items())

    @cached_property
    def jitted(self) -> Callable[[Given, Steered], tuple[Steered, Seen]]:
        """`update`, traced once for all runs of this object."""
        return jax.jit(self.update)

    def update(self, given: Given, state: Steered) -> tuple[Steered, Seen]:
        """One iterate, steps of the optimiser on (1): the state after it, and what was seen before it."""
        state, seen = self.updated(given, state)
        if self.updates > 1:
            state = jax.lax.fori_loop(1, self.updates, lambda _, state: self.updated(given, state, look=False)[0], state)
        return state, seen

    def updated(self, given: Given, state: Steered, look: bool = True) -> tuple[Steered, Seen]:
        """One step of the optimiser. Where `GREEDY` does not `look`, images and scores are those of before."""

        def objective(chosen: Variables) -> Any:
            variables = {**state.variables, **chosen}
            if isinstance(self.adjoint, str):
                images = self.sampler(given, jax.lax.stop_gradient(variables)) if look else state.images
                scores = given.metric(images)
                climbed = given.metric(self.sampler.guess(given, variables))
            else:
                climbed = scores = given.metric(images := self.sampler(given, variables, self.adjoint))
            return self._penalised(variables) - jnp.sum(climbed), (images, scores)

        chosen = self._chosen(state.variables)
        gradient, (images, scores) = jax.grad(objective, has_aux=True)(chosen)
        updates, optimiser = self.optimiser.update(gradient, state.optimiser, chosen)
        stepped: Any = optax.apply_updates(chosen, updates)
        norms = {name: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g))) for name, g in gradient.items()}
        variables = self._projected({**state.variables, **stepped}, state.start)
        return Steered(variables, optimiser, state.start, state.before, images), Seen(scores, norms)


def steer(steering: Steering, given: Given, progress: Progress, iterations: int) -> Iterator[Progress]:
    """Runs the iterates that are missing, the last of which (number `iterations`) is looked at and not updated any more.

    Raises:
        FloatingPointError: where a metric or a gradient is not finite; names the iteration and, if it was there, the sampler's step.
    """
    update = mesh.staying(steering.jitted, progress.state)

    def step(state: Steered, k: int) -> tuple[Steered, dict[str, Any]]:
        following, seen = update(given, state)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((seen.scores, seen.norms))):
            raise FloatingPointError(f"Iteration {k}: {_blame(steering.sampler, given, state.variables, seen)}")
        row = {
            "iteration": k,
            "metric": float(np.mean(np.asarray(seen.scores, np.float64))),
            "per_image": np.asarray(seen.scores).tolist(),
            "gradient_norm": {name: float(norm) for name, norm in seen.norms.items()},
        }
        following = state._replace(images=following.images) if k == iterations else following
        return (following._replace(before=following.images) if k == 0 else following), row

    return iterate(step, progress, iterations + 1)


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
    sampler: Sampler, given: Given, points: Mapping[str, Variables], adjoints: Mapping[str, diffrax.AbstractAdjoint | str]
) -> list[tuple[str, AuditRow]]:
    """Each adjoint's gradient of (1) against the exact one, in every variable, at each of the named points."""

    @eqx.filter_jit
    def gradient(given: Given, variables: Variables, adjoint: Any) -> Variables:
        images = (lambda variables: sampler.guess(given, variables)) if adjoint == GREEDY else (lambda variables: sampler(given, variables, adjoint))
        return jax.grad(lambda variables: jnp.sum(given.metric(images(variables))))(variables)

    rows = []
    for point, variables in points.items():
        exact = mesh.fetched(gradient(given, variables, DiscreteAdjoint()))
        for name, adjoint in adjoints.items():
            found = mesh.fetched(gradient(given, variables, adjoint))
            rows += [(point, AuditRow(name, wrt, *compare(found[wrt], exact[wrt]))) for wrt in exact]
    return rows
