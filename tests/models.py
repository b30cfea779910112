"""Closed-form data: Gaussians whose flow map is known, and a mixture with parameters to differentiate."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adjoint_jax as aj
from adjoint_jax.networks import conversions
from adjoint_jax.splitting import level

PROCESSES = {
    "vp_linear": aj.VPLinear(),
    "vp_cosine": aj.VPCosine(),
    "vp_discrete": aj.VPDiscrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
    "ve": aj.VE(0.02, 10.0),
    "edm": aj.EDM(),
    "flow": aj.FlowMatching(),
}
SPANS = {"flow": (0.98, 0.01), "edm": (10.0, 0.02)}
PREDICTIONS = ("eps", "x0", "v", "score", "flow")


def span(name: str) -> tuple[float, float]:
    """(t_start, t_end) with finite lam."""
    return SPANS.get(name, PROCESSES[name].span)


def convert(process: Any, prediction: str, x0: Any, eps: Any, t: Any) -> Any:
    """The prediction of a kind that stands for (x0, eps)."""
    at = level(process, jnp.asarray(t, x0.dtype))
    return {
        "eps": eps,
        "x0": x0,
        "v": at.alpha * eps - at.sigma * x0,
        "score": -eps / at.sigma,
        "flow": at.alpha_rate * x0 + at.sigma_rate * eps,
    }[prediction]


def gaussian(process: Any, prediction: str, s: Any) -> aj.DiffusionTerm:
    """Data N(0, s^2): x0 = alpha s^2 x / v, eps = sigma x / v, v = alpha^2 s^2 + sigma^2."""

    def network(x: Any, t: Any, args: Any) -> Any:
        at = level(process, jnp.asarray(t, x.dtype))
        width = jnp.broadcast_to(jnp.asarray(s, x.dtype), x.shape)
        v = at.alpha**2 * width**2 + at.sigma**2
        return convert(process, prediction, at.alpha * width**2 * x / v, at.sigma * x / v, t)

    return aj.DiffusionTerm(network, process, prediction)


def flow_map(process: Any, s: Any, t0: Any, t1: Any) -> Any:
    """x_{t1} / x_{t0} for data N(0, s^2)."""
    start, end = (process.alpha(t) ** 2 * np.asarray(s) ** 2 + process.sigma(t) ** 2 for t in (t0, t1))
    return np.sqrt(end / start)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in two dimensions; `args` = {"params": shifts of the means `[3, 2]`, "cond": `[2]` or `[B, 2]`}."""

    process: Any
    prediction: str = "eps"

    MEANS = np.array([[0.9, 0.4], [-0.7, 0.8], [0.1, -1.0]])
    WIDTHS = np.array([0.6, 0.7, 0.8])

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        at = level(self.process, jnp.asarray(t, x.dtype))
        cond = jnp.broadcast_to(args["cond"], x.shape)[:, None, :]
        means = (jnp.asarray(self.MEANS, x.dtype) + args["params"])[None] + 0.3 * cond
        v = (at.alpha**2 * jnp.asarray(self.WIDTHS, x.dtype) ** 2 + at.sigma**2)[None]
        d = x[:, None, :] - at.alpha * means
        r = jax.nn.softmax(-0.5 * jnp.sum(d**2, axis=-1) / v - jnp.log(v), axis=-1)
        eps = at.sigma * jnp.sum((r / v)[..., None] * d, axis=1)
        x0 = jnp.sum(r[..., None] * (means + (at.alpha * jnp.asarray(self.WIDTHS, x.dtype)[None] ** 2 / v)[..., None] * d), axis=1)
        return convert(self.process, self.prediction, x0, eps, t)

    def term(self) -> aj.DiffusionTerm:
        return aj.DiffusionTerm(self, self.process, self.prediction)

    @staticmethod
    def inputs(batch: int = 6, dtype: Any = jnp.float64) -> tuple[Any, Any, Any]:
        """(x_T, args, target)."""
        keys = jax.random.split(jax.random.key(3), 4)
        normal = lambda key, *shape: jax.random.normal(key, shape, dtype)  # noqa: E731
        return normal(keys[0], batch, 2), {"params": 0.1 * normal(keys[1], 3, 2), "cond": normal(keys[2], batch, 2)}, normal(keys[3], batch, 2)


def relative(found: Any, exact: Any) -> float:
    """|found - exact| / |exact|; 0 where both are zero."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    distance = np.linalg.norm(found - exact)
    return float(distance / np.linalg.norm(exact)) if distance else 0.0


def check_conversion(process: Any, prediction: str, t: float) -> tuple[Any, Any]:
    """Recovers (x0, eps) = (0.3, -1.2) from the prediction at t; returns what was recovered."""
    x0, eps = np.float64(0.3), np.float64(-1.2)
    at = level(process, np.float64(t))
    x = at.alpha * x0 + at.sigma * eps
    p = np.asarray(convert(process, prediction, jnp.asarray(x0), jnp.asarray(eps), t))
    return tuple(kind.of_x * x + kind.of_p * p for kind in conversions(prediction, at))
