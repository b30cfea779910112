"""The steps of an exact adjoint whose linearisations are kept: JAX's own linearisation of their loop."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import at_least_float32, varying_like
from .._traced import in_order
from ._blocks import in_blocks
from ._computation import saved, value_of


class Plan(NamedTuple):
    """What is known statically: the options, and whether all states are returned or the last, alone or in pairs."""

    adjoint: Any
    steps: int
    save: bool
    paired: bool

    @property
    def recomputed(self) -> int:
        keep = self.adjoint.keep
        return 0 if keep == "all" else max(self.steps - int(keep), 0)

    def linearised(self, step: Any) -> Any:
        """The step as it is differentiated."""
        return (lambda *args: in_blocks(step, *args)) if self.adjoint.remat == "block" else step

    def saved(self, carry: Any) -> Any:
        return saved(carry, self.save, self.paired)


def run_kept(perturbed: Any, plan: Plan, given: Any) -> tuple[Any, Any, Any]:
    """The last steps by JAX's own linearisation of their loop, which stores what differs between steps once a step and the rest once.

    Leaves narrower than float32 enter as float32 and are cast inside, so that their cotangents are added up in float32.
    """
    step, shared, carry, tail = given
    differentiated, fixed = eqx.partition((step, shared), perturbed[:2])
    carry_diff, carry_fixed = eqx.partition(carry, eqx.is_inexact_array)
    tail_diff, tail_fixed = eqx.partition(tail, perturbed[3])
    wide = jax.tree.map(lambda leaf: leaf.astype(at_least_float32(leaf.dtype)), differentiated)

    def run(carry_diff: Any, wide: Any, tail_diff: Any) -> tuple[Any, Any]:
        def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
            narrow = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), wide, differentiated)
            step, shared = eqx.combine(narrow, fixed)
            following = plan.linearised(step)(shared, carry, inputs)
            return following, plan.saved(following)

        carry = eqx.combine(carry_diff, carry_fixed)
        carry, states = jax.lax.scan(body, carry, eqx.combine(tail_diff, tail_fixed))
        floats, rest = eqx.partition(carry, eqx.is_inexact_array)
        return (floats, states), rest

    (floats, states), transpose, rest = jax.vjp(run, carry_diff, wide, tail_diff, has_aux=True)
    return eqx.combine(floats, rest), in_order(transpose), states


def dense(share: Any, plan: Plan, carry: Any) -> Any:
    """The cotangent of the kept steps' states, of which parts may be None, with zeros there."""
    if not plan.save:
        return None
    count = plan.steps - plan.recomputed
    zero = jax.tree.map(lambda leaf: varying_like(jnp.zeros((count, *leaf.shape), leaf.dtype), leaf), value_of(carry, plan.paired))
    if share is None:
        return zero
    return jax.tree.map(lambda new, old: old if new is None else new, share, zero, is_leaf=lambda leaf: leaf is None)
