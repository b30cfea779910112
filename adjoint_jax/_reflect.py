"""Reflection into a box, the step after each step of a reflected diffusion (Lou & Ermon, Reflected diffusion models, 2023).

With L = high - low, y = (x - low) mod 2 L:

    reflect(x) = low + y where y <= L, low + 2 L - y elsewhere                                                         (1)

It is the identity inside, bit for bit, has derivative +1 or -1 in x, and puts a state at any distance where its path would be after all bounces.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ._numerics import floating, is_concrete
from ._types import State


def reflect(x: State, low: Any = -1.0, high: Any = 1.0) -> State:
    """x folded at the walls of the box [low, high] until it lies inside, equation (1).

    Args:
        x: a state, any shape.
        low, high: the walls, numbers or arrays of x's rank; differentiable.

    Raises:
        ValueError: where low < high does not hold for concrete walls.

        reflect(jnp.asarray([0.5, 1.2, 3.1]))  # 0.5, 0.8, -0.9
    """
    if is_concrete(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"A box needs low < high; got low={low}, high={high}.")
    low, high = floating(low, x), floating(high, x)
    y = jnp.mod(x - low, 2 * (high - low))
    folded = low + jnp.where(y <= high - low, y, 2 * (high - low) - y)  # (1)
    # Subtracting and adding `low` rounds, and so may leave the box by an ulp.
    return jnp.where((low <= x) & (x <= high), x, jnp.clip(folded, low, high))
