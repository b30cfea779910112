"""What every wrapper needs: plain functions as pytrees, the network's answer checked, one number for each sample."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import trailing
from .._types import Args, Network, State


class _Static(eqx.Module):
    """A plain function as a pytree without leaves."""

    function: Callable = eqx.field(static=True)

    def __call__(self, x: State, t: Any, args: Args) -> State:
        return self.function(x, t, args)


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
    value = jnp.asarray(value, x.dtype)
    return trailing(value, x.ndim - value.ndim) if value.ndim else value


def sample_axes(x: Any, name: str) -> tuple[int, ...]:
    """The axes of one sample in x `[B, ...]`. Raises ValueError where x has none, since a statistic of single numbers means nothing."""
    if x.ndim < 2:
        raise ValueError(f"{name} measures each sample of a batch, x [B, ...]; got shape {x.shape}: give x a leading axis (under vmap, x[None]).")
    return tuple(range(1, x.ndim))
