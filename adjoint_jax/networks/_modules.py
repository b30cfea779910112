"""Flax and Equinox modules, and EDM's raw network, as networks `network(x, t, args)`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._types import Args, Network, State
from ._wrapping import as_pytree


class _Adapter(eqx.Module):
    """Frozen and equal by value: making it twice does not trace twice."""

    module: Any = eqx.field(static=True)
    call: Callable = eqx.field(static=True)

    def __call__(self, x: State, t: Any, args: Args) -> Any:  # not always of the shape of x: a learned variance may come after the prediction
        if not isinstance(args, dict) or "params" not in args:
            raise ValueError("An adapted module reads its weights from args['params']: give args = {'params': params, ...}.")
        inputs = (x, t, args["cond"]) if "cond" in args else (x, t)
        return self.call(self.module, args, inputs)


def _call_linen(module: Any, args: Args, inputs: tuple) -> State:
    rngs = {"rngs": args["rngs"]} if "rngs" in args else {}
    return module.apply({"params": args["params"]}, *inputs, **rngs)


def _call_nnx(graph: Any, args: Args, inputs: tuple) -> State:
    from flax import nnx as flax_nnx

    return flax_nnx.merge(graph, args["params"])(*inputs)


def _call_equinox(static: Any, args: Args, inputs: tuple) -> State:
    return eqx.combine(args["params"], static)(*inputs)


def linen(module: Any) -> Network:
    """A Flax linen module as a network: `module.apply({"params": args["params"]}, x, t[, args["cond"]])`, with `args["rngs"]` if given."""
    return _Adapter(module, _call_linen)


def nnx(module: Any) -> Network:
    """A Flax nnx module as a network; `args["params"]` is `flax.nnx.state(module)`."""
    from flax import nnx as flax_nnx

    return _Adapter(flax_nnx.graphdef(module), _call_nnx)


def equinox(module: Any) -> Network:
    """An Equinox module as a network; `args["params"]` is `equinox.filter(module, equinox.is_inexact_array)`."""
    return _Adapter(eqx.partition(module, eqx.is_inexact_array)[1], _call_equinox)


class _Preconditioned(eqx.Module):
    network: Network
    sigma_data: Any

    def __call__(self, x: State, t: Any, args: Args) -> State:
        c, sigma = jnp.asarray(self.sigma_data, x.dtype), jnp.asarray(t, x.dtype)
        scale = jnp.sqrt(sigma**2 + c**2)
        raw = self.network(x / scale, jnp.log(sigma) / 4, args)
        return (c / scale) ** 2 * x + sigma * c / scale * raw


def edm_precondition(network: Network, sigma_data: float = 0.5) -> Network:
    """EDM's raw network as one that predicts "x0" at t = sigma: c_skip x + c_out F(c_in x, log(sigma)/4) (Karras et al. 2022, table 1)."""
    return _Preconditioned(as_pytree(network), sigma_data)
