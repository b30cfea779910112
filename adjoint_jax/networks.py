"""What a network predicts, how guidance combines predictions, and adapters for modules.

A prediction p of any kind is linear in (x0, eps), and so is x = alpha x0 + sigma eps; hence both are linear in (x, p):

    eps     eps = p                                      x0 = (x - sigma p) / alpha                                  (1)
    x0      x0 = p                                       eps = (x - alpha p) / sigma                                 (2)
    v       p = alpha eps - sigma x0                     x0 = (alpha x - sigma p)/(alpha^2 + sigma^2),
                                                         eps = (sigma x + alpha p)/(alpha^2 + sigma^2)              (3)
    score   p = -eps / sigma                             x0 = (x + sigma^2 p) / alpha                                (4)
    flow    p = alpha' x0 + sigma' eps, D = alpha sigma' - sigma alpha'
                                                         x0 = (sigma' x - sigma p)/D,  eps = (alpha p - alpha' x)/D   (5)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._numerics import namespace
from ._types import Args, Network, State
from .splitting import Level

PREDICTIONS = ("eps", "x0", "v", "score", "flow")


class Linear(NamedTuple):
    """of_x * x + of_p * p."""

    of_x: Any
    of_p: Any

    def scaled(self, by: Any) -> "Linear":
        return Linear(by * self.of_x, by * self.of_p)

    def plus(self, other: "Linear") -> "Linear":
        return Linear(self.of_x + other.of_x, self.of_p + other.of_p)


def conversions(prediction: str, at: Level) -> tuple[Linear, Linear]:
    """(x0, eps) as linear functions of the state and the prediction, equations (1)-(5). Infinite or NaN where that kind does not determine them."""
    a, s = at.alpha, at.sigma
    xp = namespace(a)
    one, zero = xp.ones_like(a), xp.zeros_like(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        if prediction == "eps":
            return Linear(one / a, -s / a), Linear(zero, one)
        if prediction == "x0":
            return Linear(zero, one), Linear(one / s, -a / s)
        if prediction == "v":
            d = a**2 + s**2
            return Linear(a / d, -s / d), Linear(s / d, a / d)
        if prediction == "score":
            return Linear(one / a, s**2 / a), Linear(zero, -s)
        if prediction == "flow":
            d = a * at.sigma_rate - s * at.alpha_rate
            return Linear(at.sigma_rate / d, -s / d), Linear(-at.alpha_rate / d, a / d)
    raise ValueError(f"prediction={prediction!r} is not known: use one of {', '.join(PREDICTIONS)}.")


def target(prediction: str, at: Level, x0: Any, eps: Any) -> Any:
    """What a network of this kind is trained to predict from x = alpha x0 + sigma eps: the left sides of (1)-(5)."""
    targets = {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: at.alpha * eps - at.sigma * x0,
        "score": lambda: -eps / at.sigma,
        "flow": lambda: at.alpha_rate * x0 + at.sigma_rate * eps,
    }
    if prediction not in targets:
        raise ValueError(f"prediction={prediction!r} is not known: use one of {', '.join(PREDICTIONS)}.")
    return targets[prediction]()


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


class _Adapter(eqx.Module):
    """Frozen and equal by value: making it twice does not trace twice."""

    module: Any = eqx.field(static=True)
    call: Callable = eqx.field(static=True)

    def __call__(self, x: State, t: Any, args: Args) -> State:
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


class _Guided(eqx.Module):
    network: Network
    scale: Any

    def __call__(self, x: State, t: Any, args: Args) -> State:
        if not isinstance(args, dict) or not {"cond", "uncond"} <= args.keys():
            raise ValueError("aj.cfg reads args['cond'] and args['uncond']: give both in args.")
        rest = {name: value for name, value in args.items() if name not in ("cond", "uncond")}
        conditional = self.network(x, t, {**rest, "cond": args["cond"]})
        unconditional = self.network(x, t, {**rest, "cond": args["uncond"]})
        scale = jnp.asarray(self.scale, conditional.dtype)
        scale = scale.reshape(scale.shape + (1,) * (conditional.ndim - scale.ndim)) if scale.ndim else scale
        return unconditional + scale * (conditional - unconditional)


def cfg(network: Network, scale: Any) -> Network:
    """Classifier-free guidance: p_uncond + scale (p_cond - p_uncond).

    Args:
        network: any network; it sees `args` with `cond` set to `args["cond"]`, then to `args["uncond"]`.
        scale: a scalar, or `[B]`; differentiable. 1 is the conditional network.
    Reference: Ho & Salimans, Classifier-free diffusion guidance (2022), eq. (6), with w = scale - 1.
    """
    return _Guided(as_pytree(network), scale)


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


def predict(network: Network, x: State, t: Any, args: Args) -> State:
    """The network's answer in the dtype of x. Raises ValueError where its shape is not that of x."""
    p = network(x, t, args)
    if jnp.shape(p) != jnp.shape(x):
        raise ValueError(f"The network must answer in the shape of x, {jnp.shape(x)}; it gave {jnp.shape(p)}.")
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), p)
