"""What every continuous adjoint shares: the sampler with its states kept at some nodes, then a backward integration from node to node.

Intervals out of alpha = 0 and into sigma = 0, of infinite length in lam, are differentiated exactly, through the solver's own step.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import varying_like, zeros_like
from .._types import State
from ._computation import Computation, answering, closed, first
from .discrete import accumulator, add


class Plan:
    """What both passes of a continuous adjoint know statically.

    `index`: its nodes among the sampler's states, from data to noise; `stored`: those of which the state is kept; `visited`: those in whose
    intervals the network is asked. sweep(linearise, a, total, kept, per_step, nodes, noisy) integrates from the first node to the last and
    gathers the cotangents of what linearise(x, t, per_step) -> (prediction, its transpose) is linear in: (x, shared, per_step). It returns
    (a, total, trail); between(trail, nodes, noise_share) finds from the trail the gradients in (noise, per_step) of the intervals between the
    nodes, noise_share(a, inputs_i) being G_i^T a. Where `between` is None, these have no gradient.
    """

    def __init__(
        self,
        computation: Computation,
        name: str,
        index: np.ndarray,
        stored: np.ndarray,
        visited: np.ndarray,
        sweep: Callable,
        between: Callable | None = None,
    ):
        self.recall, self.save, self.n = computation.solver.recall, computation.save, computation.steps
        self.name, self.index, self.stored, self.visited, self.sweep, self.between = name, index, stored, visited, sweep, between
        self.exact_last, self.exact_first = index[0] < self.n, index[-1] > 0


def run(computation: Computation, nodes: Any, plan: Plan) -> tuple[State, Any]:
    """The values of the computation, with the derivative that `plan` and `nodes` say."""
    shared, _ = computation.shared()
    carry, inputs = computation.carry(), computation.inputs()
    step = closed(computation.step, shared, carry, first(inputs))
    predict = closed(computation.predict, shared, first(inputs).per_step, inputs.t0[0], computation.x)
    blank = lambda carry, inputs: computation.advance(answering(computation.term, zeros_like(computation.x)), None, carry, inputs)  # noqa: E731
    given = inputs.noise is not None and jnp.issubdtype(inputs.noise.dtype, jnp.floating)
    linear = closed(blank, carry, first(inputs)) if given else None
    return _run((step, predict, linear, shared, carry, inputs), nodes, plan)


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, nodes: Any, plan: Plan) -> tuple[State, Any]:
    return _forward_pass(vjp_arg, plan)[0]


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, nodes: Any, plan: Plan) -> tuple[Any, Any]:
    inputs = perturbed[5]
    if any(jax.tree.leaves(inputs if plan.between is None else inputs._replace(per_step=None, noise=None))):
        what = "the grid, the process or per-step leaves" if plan.between is None else "the grid or the process"
        raise ValueError(f"{plan.name} gives no gradient in {what}: use DiscreteAdjoint, or jax.lax.stop_gradient on them.")
    out, kept = _forward_pass(vjp_arg, plan)
    return out, (kept, perturbed)


def _forward_pass(vjp_arg: Any, plan: Plan) -> tuple[Any, Any]:
    step, _, _, shared, carry, inputs = vjp_arg
    record = lambda following: following[0] if plan.save else None  # noqa: E731
    carry, kept, states = run_keeping(step, shared, carry, inputs, plan.stored, record)
    return (carry[0], states), kept


def run_keeping(step: Callable, shared: Any, carry: Any, inputs: Any, nodes: np.ndarray, record: Callable) -> tuple[Any, Any, Any]:
    """The sampler: its last carry, the states at `nodes` (last first), and what `record` takes of the carry after each step."""
    advance = lambda carry, inputs, _: (step(shared, carry, inputs), carry[0])  # noqa: E731
    carry, states_at, states = keeping(advance, carry, inputs, nodes, carry[0], record)
    if len(nodes) and nodes[0] == len(inputs.t0):
        states_at = jax.lax.dynamic_update_index_in_dim(states_at, carry[0], 0, 0)
    return carry, states_at, states


def keeping(advance: Callable, carry: Any, inputs: Any, nodes: np.ndarray, like: Any, record: Callable) -> tuple[Any, Any, Any]:
    """The sampler by advance(carry, inputs_i, i) -> (carry, what there is to keep, `like` it): its last carry, what is kept at `nodes` (last
    first, of which no step comes after the first), and what `record` takes of the carry after each step. What is at no node is written where the
    next node overwrites it.
    """
    steps = np.arange(len(inputs.t0))
    slots = np.searchsorted(-nodes, -steps, side="right") - 1
    stacks = varying_like(jax.tree.map(lambda leaf: jnp.zeros((len(nodes), *leaf.shape), leaf.dtype), like), carry[0])

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        carry, stacks = acc
        inputs_i, i, slot = slices
        following, kept = advance(carry, inputs_i, i)
        if len(nodes):
            stacks = jax.tree.map(lambda stack, leaf: jax.lax.dynamic_update_index_in_dim(stack, leaf, slot, 0), stacks, kept)
        return (following, stacks), record(following)

    (carry, stacks), states = jax.lax.scan(body, (carry, stacks), (inputs, jnp.asarray(steps), jnp.asarray(slots)))
    return carry, stacks, states


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, nodes: Any, plan: Plan) -> Any:
    kept, perturbed = residuals
    step, predict, linear, shared, (x_T, state), inputs = vjp_arg
    adjoint, cotangent_states = cotangents
    if cotangent_states is not None:
        raise ValueError(f"{plan.name} differentiates the final state only: use DiscreteAdjoint for a loss on a saved trajectory.")
    differentiated, fixed = eqx.partition((step, predict, shared), (*perturbed[:2], perturbed[3]))
    given, rest = eqx.partition(inputs, perturbed[5])  # of which per-step leaves and the noise
    total = jax.tree.map(accumulator, differentiated)

    def exact(adjoint: State, total: Any, x: State, i: int) -> tuple[State, Any, Any]:
        """Interval i through the solver's own step."""

        def local(x: State, differentiated: Any, here: Any) -> State:
            step, _, shared = eqx.combine(differentiated, fixed)
            return step(shared, plan.recall(x, state), eqx.combine(here, first(rest, i)))[0]

        adjoint, shares, own = jax.vjp(local, x, differentiated, first(given, i))[1](adjoint)
        return adjoint, jax.tree.map(add, total, shares), jax.tree.map(lambda leaf: leaf[None], own)

    def linearise(x: State, t: Any, per_step: Any) -> tuple[State, Callable]:
        here, here_fixed = eqx.partition(per_step, perturbed[5].per_step)

        def local(x: State, differentiated: Any, here: Any) -> State:
            _, predict, shared = eqx.combine(differentiated, fixed)
            return predict(shared, eqx.combine(here, here_fixed), t, x)

        return jax.vjp(local, x, differentiated, here)

    def noise_share(a: State, inputs: Any) -> Any:
        return jax.vjp(lambda noise: linear((x_T, state), inputs._replace(noise=noise))[0], inputs.noise)[1](a)[0]

    shares = []
    if plan.exact_last:
        adjoint, total, own = exact(adjoint, total, kept[0] if len(kept) else x_T, plan.n - 1)
        shares.append(own)
    if len(kept):
        per_step = jax.tree.map(lambda leaf: leaf[np.minimum(plan.visited, plan.n - 1)], inputs.per_step)
        adjoint, total, trail = plan.sweep(linearise, adjoint, total, kept, per_step, nodes, given.noise is not None)
        if plan.between is not None and jax.tree.leaves(given):
            inner = jax.tree.map(lambda leaf: leaf[plan.index[-1] : plan.index[0]], (given, inputs))
            shares.append(plan.between(trail, nodes, inner, noise_share))
    if plan.exact_first:
        adjoint, total, own = exact(adjoint, total, x_T, 0)
        shares.append(own)
    of_inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts[::-1]), *shares) if jax.tree.leaves(given) else given
    of_step, of_predict, of_shared = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, differentiated)
    of_linear, of_state = jax.tree.map(lambda _: None, (linear, state))
    return of_step, of_predict, of_linear, of_shared, (adjoint, of_state), of_inputs
