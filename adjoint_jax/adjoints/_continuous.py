"""What every continuous adjoint shares: the sampler with its states kept at some nodes, then a backward integration from node to node.

Intervals out of alpha = 0 and into sigma = 0, of infinite length in lam, are differentiated exactly, through the solver's own step.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import zeros_like
from .._traced import in_order
from .._types import State
from ._at_nodes import network_of, run_forward_keeping
from ._computation import Computation, first, parts, run_forward, saved
from .discrete import accumulator, add


class Plan:
    """What both passes of a continuous adjoint know statically.

    `index`: its nodes among the sampler's states, from data to noise; `stored`: those of which the state is kept, and with `keep` the
    linearisation; `visited`: those in whose intervals the network is asked. sweep(linearise, a, total, kept, per_step, nodes, noisy) integrates
    from the first node to the last and gathers the cotangents of what linearise(kept_k, t, per_step) -> (prediction, its transpose) is linear
    in: (x, shared, per_step). It returns (a, total, trail); between(trail, nodes, noise_share) finds from the trail the gradients in (noise,
    per_step) of the intervals between the nodes, noise_share(a, inputs_i) being G_i^T a. Where `between` is None, these have no gradient.
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
        keep: bool = False,
    ):
        self.recall, self.save, self.n = computation.solver.recall, computation.save, computation.steps
        self.name, self.index, self.stored, self.visited, self.sweep, self.between = name, index, stored, visited, sweep, between
        self.exact_last, self.exact_first, self.keep = index[0] < self.n, index[-1] > 0, keep


def run(computation: Computation, nodes: Any, plan: Plan) -> tuple[State, Any]:
    """The values of the computation, with the derivative that `plan` and `nodes` say."""
    return _run(parts(computation), nodes, plan)


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, nodes: Any, plan: Plan) -> tuple[State, Any]:
    step, _, _, shared, carry, inputs = vjp_arg
    carry, states = run_forward(step, shared, carry, inputs, lambda _, following: saved(following, plan.save, False))
    return carry[0], states


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, nodes: Any, plan: Plan) -> tuple[Any, Any]:
    wanted = perturbed[5]
    if any(jax.tree.leaves(wanted if plan.between is None else wanted._replace(per_step=None, noise=None))):
        what = "the grid, the process or per-step leaves" if plan.between is None else "the grid or the process"
        raise ValueError(f"{plan.name} gives no gradient in {what}: use DiscreteAdjoint, or jax.lax.stop_gradient on them.")
    record = lambda following: saved(following, plan.save, False)  # noqa: E731
    carry, kept, states = run_forward_keeping(vjp_arg, perturbed, plan.stored, plan.keep, record)
    return (carry[0], states), (kept, perturbed)


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, nodes: Any, plan: Plan) -> Any:
    kept, perturbed = residuals
    step, _, linear, _, (x_T, state), inputs = vjp_arg
    adjoint, cotangent_states = cotangents
    if cotangent_states is not None:
        raise ValueError(f"{plan.name} differentiates the final state only: use DiscreteAdjoint for a loss on a saved trajectory.")
    network = network_of(vjp_arg, perturbed)
    of_step, step_fixed = eqx.partition(step, perturbed[0])
    given, rest = eqx.partition(inputs, perturbed[5])  # of which per-step leaves and the noise
    differentiated = (of_step, network.differentiated)
    total = jax.tree.map(accumulator, differentiated)
    linearise, along, before = network.linearise, kept, kept[0]
    if plan.keep:
        linearise, along, before = (lambda stacked, t, per_step: (None, kept.whole(stacked))), kept.stacked, kept.before

    def exact(adjoint: State, total: Any, x: State, i: int) -> tuple[State, Any, Any]:
        """Interval i through the solver's own step."""

        def local(x: State, differentiated: Any, here: Any) -> State:
            step, (_, shared) = eqx.combine(differentiated, (step_fixed, network.fixed))
            return step(shared, plan.recall(x, state), eqx.combine(here, first(rest, i)))[0]

        adjoint, shares, own = in_order(jax.vjp(local, x, differentiated, first(given, i))[1])(adjoint)
        return adjoint, jax.tree.map(add, total, shares), jax.tree.map(lambda leaf: leaf[None], own)

    def noise_share(a: State, inputs: Any) -> Any:
        return jax.vjp(lambda noise: linear(zeros_like(x_T), (x_T, state), inputs._replace(noise=noise))[0], inputs.noise)[1](a)[0]

    shares = []
    if plan.exact_last:
        adjoint, total, own = exact(adjoint, total, before, plan.n - 1)
        shares.append(own)
    per_step = jax.tree.map(lambda leaf: leaf[np.minimum(plan.visited, plan.n - 1)], inputs.per_step)
    adjoint, gathered, trail = plan.sweep(linearise, adjoint, total[1], along, per_step, nodes, given.noise is not None)
    total = (total[0], gathered)
    if plan.between is not None and jax.tree.leaves(given):
        inner = jax.tree.map(lambda leaf: leaf[plan.index[-1] : plan.index[0]], (given, inputs))
        shares.append(plan.between(trail, nodes, inner, noise_share))
    if plan.exact_first:
        adjoint, total, own = exact(adjoint, total, x_T, 0)
        shares.append(own)
    of_inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts[::-1]), *shares) if jax.tree.leaves(given) else given
    of_step, (of_predict, of_shared) = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, differentiated)
    of_linear, of_state = jax.tree.map(lambda _: None, (linear, state))
    return of_step, of_predict, of_linear, of_shared, (adjoint, of_state), of_inputs
