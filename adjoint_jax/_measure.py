"""What a few short programs tell of a gradient of any length: bytes stored a step, bytes beside them, work a step; nothing is run."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax

from ._work import flops
from .adjoints import DiscreteAdjoint

SHORT = 3
"""Steps of the programs that are compiled: XLA writes shorter loops out."""


class Measure:
    """What is read from the short programs. Of the values: `forward` flops a step; of the recomputing exact gradient: `work_0` flops a step, the unit
    of costs, `state` bytes stored a step, and `base_0` bytes beside them. A network without products counts 1 forward and 1 backward.
    """

    def __init__(self, objective: Callable, given: tuple, steps: int, noise: int):
        self.objective, self.given, self.steps, self.noise, self.short = objective, given, steps, noise, min(SHORT, steps)
        exact = DiscreteAdjoint()
        self.forward, self.work_0, self.state = self.work(None) or 1, self.work(exact) or 3, self.slope(exact)
        self.base_0 = self.base(exact, self.short * self.state)

    def slope(self, adjoint: Any) -> int:
        """Bytes of residuals a step."""

        def residuals(steps: int) -> int:
            value = self.objective(adjoint, steps)
            return bytes_of(jax.eval_shape(lambda chosen, arrays: jax.vjp(lambda chosen: value(chosen, arrays), chosen)[1], *self.given))

        return residuals(self.short) - residuals(self.short - 1) - self.noise if self.short > 1 else residuals(1)

    def base(self, adjoint: Any, stored: int) -> int:
        """Bytes of temporaries beside what is stored."""
        analysis = jax.jit(jax.grad(self.objective(adjoint, self.short))).lower(*self.given).compile().memory_analysis()
        if analysis is None:
            told = f"aj.plan reads the memory of compiled programs, which the {jax.default_backend()} backend does not tell"
            raise NotImplementedError(f"{told}: set JAX_PLATFORMS=cpu to plan by the CPU's programs.")
        return max(analysis.temp_size_in_bytes - stored, 0)

    def work(self, adjoint: Any) -> float:
        """Flops a step of the gradient, or of the values alone where there is no adjoint."""
        value = self.objective(adjoint or DiscreteAdjoint(), self.short)
        return flops(jax.grad(value) if adjoint else value, *self.given) / self.short


def bytes_of(tree: Any) -> int:
    """Of all arrays in a pytree, or of their shapes."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
