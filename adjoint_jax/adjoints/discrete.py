"""The exact gradient of the sampler: states stored, the network recomputed step by step.

For x_{i+1} = step(x_i, history_i; shared, inputs_i) and lambda = dL/d(carry), backwards from i = N - 1,

    lambda_i = [d step / d carry]^T lambda_{i+1},    dL/dshared += [d step / d shared]^T lambda_{i+1}.                 (1)

A multistep method is linear in its history, so its transpose needs x_i alone: one stored state a step, one network linearisation alive
(and the history too where the weights are differentiated: a gradient in the grid).
Cost: N forward, then N (forward + backward).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax

from .._numerics import at_least_float32, zeros_like
from ._base import AbstractSamplerAdjoint
from ._computation import Computation, add_to_value, closed, first, run_forward, value_of


class DiscreteAdjoint(AbstractSamplerAdjoint):
    """The exact gradient of what was sampled, equation (1), in memory of one state a step. The default.

    Differentiable: x_T, every state of a saved trajectory, every float leaf of args and of the term, per-step leaves, the grid.
    Parameter cotangents are accumulated in float32 at least, and only for leaves that the caller differentiates.

    Args:
        keep: 0, recompute the network at every step. Keeping linearisations is not part of this version.
        unroll: steps in one iteration of the backward loop, as of `jax.lax.scan`. On the CPU, XLA transposes convolutions several times
            faster outside of a loop: there `unroll=N` takes a third of the time, for N linearisations in memory and three times the compilation.
    Raises:
        ValueError: for another keep, or unroll < 1.

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.DiscreteAdjoint())))(x_T)
    """

    keep: int = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(self, keep: int = 0, unroll: int = 1):
        if keep != 0:
            raise ValueError(f"DiscreteAdjoint(keep={keep!r}): this version recomputes every step; use keep=0, or DirectAdjoint, which keeps all.")
        self.keep, self.unroll = keep, checked_unroll(unroll)

    def run(self, computation: Computation) -> tuple[Any, Any]:
        shared, _ = computation.shared()
        carry, inputs = computation.carry(), computation.inputs()
        step = closed(computation.step, shared, carry, first(inputs))
        return _run((step, shared, carry, inputs), constant(computation.solver), _Values(computation.save, computation.paired), self.unroll)


class _Values(NamedTuple):
    """What is returned: all states or the last, alone or in pairs."""

    save: bool
    paired: bool

    def saved(self, carry: Any) -> Any:
        return value_of(carry, self.paired) if self.save else None


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, solver: Any, values: _Values, unroll: int) -> tuple[Any, Any]:
    step, shared, carry, inputs = vjp_arg
    carry, states = run_forward(step, shared, carry, inputs, lambda _, following: values.saved(following))
    return value_of(carry, values.paired), states


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, solver: Any, values: _Values, unroll: int) -> tuple[Any, Any]:
    step, shared, carry, inputs = vjp_arg
    whole = _wants_rows(perturbed)

    def record(carry: Any, following: Any) -> Any:
        return carry if whole else solver.remember(*carry), values.saved(following)

    carry, (memories, states) = run_forward(step, shared, carry, inputs, record)
    return (value_of(carry, values.paired), states), (memories, perturbed)


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, solver: Any, values: _Values, unroll: int) -> Any:
    memories, perturbed = residuals
    step, shared, (x, state), inputs = vjp_arg
    wants_step, wants_shared, _, wants_inputs = perturbed
    differentiated, fixed = eqx.partition((step, shared), (wants_step, wants_shared))
    cotangent_x, cotangent_states = cotangents
    whole = _wants_rows(perturbed)
    start = jax.tree.map(zeros_like, eqx.filter((x, state), eqx.is_inexact_array))
    start = add_to_value(start, cotangent_x, values.paired)
    total = jax.tree.map(accumulator, differentiated)

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        cotangent, total = acc
        memory, inputs_i, cotangent_state = slices
        cotangent = add_to_value(cotangent, cotangent_state, values.paired)
        carry_diff, carry_fixed = eqx.partition(memory if whole else solver.recall(memory, state), eqx.is_inexact_array)
        inputs_diff, inputs_fixed = eqx.partition(inputs_i, wants_inputs)

        def local(carry_diff: Any, differentiated: Any, inputs_diff: Any) -> Any:
            step, shared = eqx.combine(differentiated, fixed)
            following = step(shared, eqx.combine(carry_diff, carry_fixed), eqx.combine(inputs_diff, inputs_fixed))
            return eqx.filter(following, eqx.is_inexact_array)

        _, transpose = jax.vjp(local, carry_diff, differentiated, inputs_diff)
        cotangent, shares, per_input = transpose(cotangent)
        return (cotangent, jax.tree.map(add, total, shares)), per_input

    (cotangent, total), per_input = jax.lax.scan(body, (start, total), (memories, inputs, cotangent_states), reverse=True, unroll=unroll)
    step_share, shared_share = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, differentiated)
    return step_share, shared_share, cotangent, per_input


def checked_unroll(unroll: int) -> int:
    if unroll < 1:
        raise ValueError(f"unroll is a number of steps, at least 1; got {unroll!r}.")
    return int(unroll)


def _wants_rows(perturbed: Any) -> bool:
    """Whether the weights themselves are differentiated: then the history that they multiply has to be stored as well."""
    return any(jax.tree.leaves(perturbed[3].row))


def constant(tree: Any) -> Any:
    """`tree` without derivative: what the weights took from it is differentiated through the rows."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def accumulator(leaf: Any) -> Any:
    """Zeros in float32 at least, to add up cotangents of `leaf`."""
    return zeros_like(leaf, at_least_float32(leaf.dtype))


def add(total: Any, share: Any) -> Any:
    """total + share in the dtype of total."""
    return total + share.astype(total.dtype)
