"""A sampler's steps made and undone between stored pairs of states, as `adjoint_jax.adjoints.reversible` and `.drift` do it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import varying_like, zeros_like
from .._traced import closed
from ..solvers import AbstractPaired, Paired
from ..solvers._base import as_dtype
from ._computation import Computation, Inputs, first, noise_of, value_of
from .discrete import constant


class Plan:
    """What both passes know statically: of each step its segment, and whether it is the first or the last of it."""

    def __init__(self, computation: Computation, segments: int, tol: float | None = None):
        self.solver: Any = computation.solver
        self.save, self.paired, self.tol = computation.save, computation.paired, tol
        self.count, steps = min(segments, computation.steps), np.arange(computation.steps)
        edges = np.arange(self.count + 1) * computation.steps // self.count
        self.segment = np.searchsorted(edges, steps, side="right") - 1
        self.first, self.last = np.isin(steps, edges), np.isin(steps + 1, edges)

    def value(self, pair: Paired) -> Any:
        return pair if self.paired else pair.x


def arrays(computation: Computation) -> tuple[tuple, Any]:
    """(network, its arrays, the first pair, inputs), and the rows by which steps are undone."""
    solver, term = computation.solver, computation.term
    if not isinstance(solver, AbstractPaired):
        raise ValueError(
            f"ReversibleAdjoint undoes the steps of BDIA, BELM, EDICT or Rex, and {type(solver).__name__}'s cannot be: use DiscreteAdjoint."
        )
    shared, _ = computation.shared()
    pair, inputs = value_of(computation.carry(), True), computation.inputs()
    predict = closed(computation.predict, shared, first(inputs).per_step, inputs.t0[0], computation.x)
    process, ts = constant((term.process, computation.ts))
    rows = constant(solver).undo_rows(process, term.prediction, ts)
    back = None if rows is None else varying_like(as_dtype(rows, computation.x.dtype), computation.x)
    return (predict, shared, pair, inputs), constant(back)


def forward_pass(vjp_arg: Any, plan: Plan) -> tuple[Any, Any]:
    """The sampler; the pair after every step is written over that of its segment, so that the last one stays."""
    predict, shared, pair, inputs = vjp_arg
    borders = jax.tree.map(lambda leaf: jnp.broadcast_to(zeros_like(leaf), (plan.count, *leaf.shape)), pair)

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        pair, borders = acc
        inputs_i, segment = slices
        ask = lambda s, x: predict(shared, inputs_i.per_step, inputs_i.row.times[s], x)  # noqa: E731
        pair = step(plan.solver, pair, inputs_i, inputs_i.row, ask)
        borders = jax.tree.map(lambda all_, leaf: jax.lax.dynamic_update_index_in_dim(all_, leaf, segment, 0), borders, pair)
        return (pair, borders), plan.value(pair) if plan.save else None

    (pair, borders), states = jax.lax.scan(body, (pair, borders), (inputs, jnp.asarray(plan.segment)))
    return (plan.value(pair), states), borders


def step(solver: AbstractPaired, pair: Paired, inputs: Inputs, row: Any, predict: Callable) -> Paired:
    x, registers, _ = solver.advance(row, pair.x, {"aux": pair.aux}, noise_of(inputs, solver.draws, pair.x), predict)
    return Paired(x, registers["aux"])


class Slices(NamedTuple):
    """What the backward pass is given of step i."""

    inputs: Inputs
    back: Any
    segment: Any
    first: Any
    last: Any


def slices_of(inputs: Inputs, back: Any, plan: Plan) -> Slices:
    return Slices(inputs, back, *(jnp.asarray(of_steps) for of_steps in (plan.segment, plan.first, plan.last)))


def undone(pair: Paired, borders: Any, here: Slices, plan: Plan, ask: Callable) -> Paired:
    """The pair before a step, from the stored one where its segment ends; ask(s, X) is `answer` there."""
    stored = jax.tree.map(lambda leaf: leaf[here.segment], borders)
    after = jax.tree.map(lambda stored, leaf: jnp.where(here.last, stored, leaf), stored, pair)
    return plan.solver.undo(here.inputs.row, here.back, after, noise_of(here.inputs, plan.solver.draws, after.x), ask)


def answer(predict: Callable, shared: Any, inputs: Inputs, s: int, x: Any) -> Any:
    """The network at stage s, or zero where that is not active."""
    ask = lambda x: predict(shared, inputs.per_step, inputs.row.times[s], x)  # noqa: E731
    return ask(x) if inputs.row.active is None else jax.lax.cond(inputs.row.active[s], ask, zeros_like, x)


def distance(found: Paired, start: Paired, borders: Any, here: Slices) -> Any:
    """The drift of the state at the start of a segment; 0 elsewhere."""
    stored = jnp.where(here.segment == 0, start.x, borders.x[here.segment - 1])
    size = jnp.maximum(jnp.max(jnp.abs(stored)), jnp.finfo(stored.dtype).tiny)
    return jnp.where(here.first, jnp.max(jnp.abs(found.x - stored)) / size, 0)
