"""Aliases that name what the arrays are."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Float
from numpy.typing import ArrayLike

State: TypeAlias = Float[Array, "*x"]
"""A state x of the sampler: any shape; a leading axis is a batch."""

Time: TypeAlias = Any
"""Times: a number, a numpy array (then the answer is numpy float64), or a JAX array (then the answer is in the graph)."""

Args: TypeAlias = Any
"""What the network is given besides x and t: any pytree; by convention a dict with `params`, `cond` and `uncond`."""

Network: TypeAlias = Callable[[State, Any, Args], State]
"""`network(x, t, args) -> prediction`, of the shape of x."""

__all__ = ["Args", "ArrayLike", "Network", "State", "Time"]
