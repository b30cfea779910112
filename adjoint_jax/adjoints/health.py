"""Tools for the health of a backward pass; its norms and its first number that is not finite."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import is_concrete, zeros_like
from .._traced import closed
from ._base import AbstractSamplerAdjoint
from ._computation import Computation, add_to_value, first, run_direct
from ._watch import diagnosis
from .discrete import DiscreteAdjoint


def adjoint_norms(objective: Callable[[Any], Any], steps: int, adjoint: DiscreteAdjoint | None = None) -> Any:
    """The norms |dL/dx_i|, i = 0 .. N, of an exact backward pass, `[N + 1]`: how the gradient grows or shrinks from the sample to x_T.

    To have them with a gradient, at no further cost, differentiate in `probe` of `DiscreteAdjoint(probe=jnp.zeros(N + 1))` too.

    Args:
        objective: maps an adjoint to the loss, a scalar.
        steps: the number N of the sampler's steps.
        adjoint: the default one unless given. With `clip`, the norms are those before each limit.

        norms = aj.adjoints.adjoint_norms(lambda adjoint: loss(aj.sample(term, x_T, args, grid=ts, adjoint=adjoint)), len(ts) - 1)
    """
    adjoint = DiscreteAdjoint() if adjoint is None else adjoint
    return jax.grad(lambda probe: objective(adjoint.with_probe(probe)))(jnp.zeros(steps + 1))


def find_nonfinite(objective: Callable[[Any], Any]) -> str | None:
    """A sentence that names the step and the input where a sample or its gradient stops being finite; None where neither does.

    Every step is run and differentiated by itself, in every float input. The gradient by `DiscreteAdjoint` raises the same sentence by itself
    where it is taken outside of jit; this is for programs that are jitted, of which the NaN alone is seen.

    Args:
        objective: maps an adjoint to the loss, a scalar; not jitted.
    Raises:
        ValueError: where the objective is traced.

        print(aj.adjoints.find_nonfinite(lambda adjoint: loss(aj.sample(term, x_T, args, grid=ts, adjoint=adjoint))))
    """
    found: list = []
    jax.grad(lambda probe: objective(_Examination(probe, found)))(jnp.zeros(()))
    return found[0] if found else None


class _Examination(AbstractSamplerAdjoint):
    """Plain values whose backward pass is a diagnosis, written to `found`."""

    probe: Any
    found: list = eqx.field(static=True)

    def run(self, computation: Computation) -> tuple[Any, Any]:
        shared, _ = computation.shared()
        carry, inputs = computation.carry(), (computation.inputs(), None)
        step = closed(lambda shared, carry, inputs: computation.step(shared, carry, inputs[0]), shared, carry, first(inputs))

        @jax.custom_vjp
        def attach(values: Any, probe: Any) -> Any:
            return values

        def backward(_: None, cotangents: Any) -> Any:
            if not is_concrete(cotangents, computation):
                raise ValueError("find_nonfinite looks at numbers: call it outside of jit, with an objective that is not jitted.")
            start = add_to_value(jax.tree.map(zeros_like, eqx.filter(carry, eqx.is_inexact_array)), cotangents[0], computation.paired)
            sentence = diagnosis((step, shared, carry, inputs), start, cotangents[1], computation.paired)
            self.found.extend([] if sentence is None else [sentence])
            return cotangents, jnp.zeros(())

        attach.defvjp(lambda values, probe: (values, None), backward)
        return attach(run_direct(computation), self.probe)
