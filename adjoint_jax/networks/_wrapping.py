"""What every wrapper needs: plain functions as pytrees, the network's answer checked, one number for each sample."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import floating, trailing
from .._types import Args, Network, State


class _Static(eqx.Module):
    """A plain function as a pytree without leaves."""

    function: Callable = eqx.field(static=True)

    def __call__(self, x: State, t: Any, args: Args) -> Any:
        return self.function(x, t, args)


@jax.tree_util.register_static
class _Host:
    """A numpy array as part of a pytree's structure, equal and hashed by its bytes."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def _key(self) -> tuple:
        return self.values.dtype, self.values.shape, self.values.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Host) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def hosted(tree: Any) -> Any:
    """The numpy arrays of a process or table made constants: as leaves of a network they would travel through the program, in float64."""
    return jax.tree.map(lambda leaf: _Host(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def unhosted(tree: Any) -> Any:
    """The inverse of `hosted`."""
    return jax.tree.map(lambda leaf: leaf.values if isinstance(leaf, _Host) else leaf, tree, is_leaf=lambda leaf: isinstance(leaf, _Host))


def as_pytree(network: Network) -> Network:
    """`network` itself where it is a pytree of its own, else wrapped so that it counts as static."""
    if not callable(network):
        raise TypeError(f"network must be called as network(x, t, args); got {type(network).__name__}: wrap it by aj.linen, aj.nnx or aj.equinox.")
    return cast(Network, network) if isinstance(network, eqx.Module) else _Static(network)


def predict(network: Network, x: State, t: Any, args: Args) -> State:
    """The network's answer in the dtype of x. Raises ValueError where its shape is not that of x."""
    p = network(x, t, args)
    if jnp.shape(p) != jnp.shape(x):
        raise ValueError(f"The network must answer in the shape of x, {jnp.shape(x)}; it gave {jnp.shape(p)}.")
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), p)


def per_sample(value: Any, x: Any) -> Any:
    """A number, or one for each sample `[B]`, in the dtype of x and so that it broadcasts against x `[B, ...]`."""
    value = floating(value, x)
    return trailing(value, x.ndim - value.ndim) if value.ndim else value


def samples(x: Any, name: str) -> Any:
    """x `[B, ...]` as `[B, n]`. Raises ValueError where n < 2, since a statistic of single numbers means nothing."""
    if x.ndim < 2 or x[0].size < 2:
        raise ValueError(f"{name} measures each sample of a batch, x [B, ...]; got shape {x.shape}: give x a leading axis (under vmap, x[None]).")
    return x.reshape(len(x), -1)
