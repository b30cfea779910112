"""The closed-form models of the goldens, as networks of this package.

A model is eps(x_vp, lam) of the variance-preserving state, x_vp = alpha x0 + sigma eps with alpha^2 = sigmoid(2 lam):

    mixture    v = alpha^2 s^2 + sigma^2,  r = softmax(log w - sum((x - alpha mu)^2 / v + log v) / 2),
               eps = sigma sum_k r_k (x - alpha mu_k) / v_k,  x0 = sum_k r_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k))     (1)
    net        a two-layer convolutional residual net in x_vp and the sines and cosines of lam                              (2)

In any process of ours, x_vp = x / sqrt(alpha^2 + sigma^2) and eps is the same. Which lam the model is told is the peer's own affair;
a "flow" is (x - x0) / s at the s = sigmoid(-lam) that it is told.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .cases import NET, parameters


def arguments(model: str) -> dict[str, Any]:
    """`args` of the network: {"params": ...} of the net, or {"mixture": ...}."""
    if model == "net":
        return {"params": {name: jnp.asarray(parameters()[f"net/{name}"]) for name in NET}}
    return {"mixture": tuple(jnp.asarray(parameters()[f"{model}/{name}"]) for name in ("logw", "mu", "s"))}


def _mixture(args: Any, x: Any, lam: Any) -> tuple[Any, Any]:
    """(eps, x0) of (1)."""
    logw, mu, s = args["mixture"]
    flat = x.reshape(x.shape[0], 1, -1)
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(2 * lam)), jnp.sqrt(jax.nn.sigmoid(-2 * lam))
    v = (alpha**2 * s**2 + sigma**2)[None]
    d = flat - alpha * mu[None]
    r = jax.nn.softmax(logw[None] - 0.5 * jnp.sum(d**2 / v + jnp.log(v), axis=-1), axis=-1)[..., None]
    eps = sigma * jnp.sum(r * d / v, axis=1)
    x0 = jnp.sum(r * (mu[None] + alpha * (s**2)[None] / v * d), axis=1)
    return eps.reshape(x.shape), x0.reshape(x.shape)


def _convolve(x: Any, weight: Any, bias: Any) -> Any:
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")) + bias[None, :, None, None]


def _net(args: Any, x: Any, lam: Any) -> tuple[Any, Any]:
    """(eps, x0) of (2)."""
    p = args["params"]
    angles = lam * jnp.asarray([0.25, 0.5, 1.0, 2.0], x.dtype)
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
    h = jax.nn.silu(_convolve(x, p["W1"], p["b1"]) + (embedding @ p["A1"])[None, :, None, None])
    h = h + jax.nn.silu(_convolve(h, p["W2"], p["b2"]) + (embedding @ p["A2"])[None, :, None, None])
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(2 * lam)), jnp.sqrt(jax.nn.sigmoid(-2 * lam))
    eps = sigma * x + 0.3 * _convolve(h, p["W3"], p["b3"])
    return eps, (x - sigma * eps) / alpha


class Golden(eqx.Module):
    """A model in a process: `prediction` at (x, t).

    `times` and `lams`: the half log-SNR that the peer told its model at those times of ours (the nearest one counts); where None, lam(t).
    `first_is_free`: the time at which eps is x_vp, without the model.
    `guidance`: (scale, components of the conditional model). `threshold`: (ratio, largest) of the dynamic threshold on x0.
    """

    model: str = eqx.field(static=True)
    prediction: str = eqx.field(static=True)
    process: Any
    times: Any = None
    lams: Any = None
    guidance: tuple[float, tuple[int, ...]] | None = eqx.field(static=True, default=None)
    threshold: tuple[float, float] | None = eqx.field(static=True, default=None)
    first_is_free: float | None = eqx.field(static=True, default=None)

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        lam = self.process.lam(t) if self.times is None else jnp.asarray(self.lams)[jnp.argmin(jnp.abs(self.times - t))]
        if self.prediction == "flow":
            alpha, sigma = jax.nn.sigmoid(lam), jax.nn.sigmoid(-lam)
        scale = jnp.sqrt(alpha**2 + sigma**2)
        eps, x0 = self._pair(args, x / scale, lam)
        if self.first_is_free is not None:
            eps = jnp.where(t == self.first_is_free, x / scale, eps)
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0 if self.threshold is None else clipped(x0, *self.threshold)
        if self.prediction == "v":
            return alpha * eps - sigma * x0
        return (x - x0) / sigma

    def _pair(self, args: Any, x: Any, lam: Any) -> tuple[Any, Any]:
        predict = _net if self.model == "net" else _mixture
        free = predict(args, x, lam)
        if self.guidance is None:
            return free
        scale, components = self.guidance
        part = {"mixture": tuple(leaf[np.asarray(components)] for leaf in args["mixture"])}
        return jax.tree.map(lambda one, two: one + scale * (two - one), free, predict(part, x, lam))


def clipped(x0: Any, ratio: float, largest: float) -> Any:
    """x0 clipped to [-s, s] and divided by s, s the `ratio` quantile of |x0| within [1, largest], for each sample."""
    flat = jnp.abs(x0).reshape(x0.shape[0], -1)
    s = jnp.clip(jnp.quantile(flat, ratio, axis=1), 1.0, largest)
    s = s.reshape((-1,) + (1,) * (x0.ndim - 1))
    return jnp.clip(x0, -s, s) / s
