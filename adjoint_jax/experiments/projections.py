"""Constraints on what is driven, as projections after an optimiser's update (the way of `optax.projections`), and one penalty.

Of x, n entries an image (and a step) of standard deviation s, started at x*, norms over those entries:

    shell     r = s sqrt(n):  x r/|x|                                                                      (1)
    chi       r = clip(|x|, s q(0.05), s q(0.95)), q the quantiles of chi_n:  x r/|x|                       (2)
    norm      r = |x*|:  x r/|x|                                                                           (3)
    linf      clip(x, x* - s R, x* + s R)                                                                   (4)
    l2        x* + (x - x*) min(1, s R/|x - x*|)                                                            (5)
    penalty   minus the log-density of |x|/s under chi_n, per entry: (r^2/2 - (n - 1) log r)/n               (6)

Gaussian noise in many dimensions lies on the shell (1), and a network has seen no other: without a constraint the noise grows and the
images go flat. (4) and (5) are about the *original* noise, whatever the iterate. References for (6): Samuel et al. (NeurIPS 2023); Eyring
et al., ReNO (NeurIPS 2024), section 3.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.stats import chi as chi_distribution

TAIL = 0.05
"""Probability left out at each end of (2)."""


def _norm(x: Any, axes: tuple[int, ...]) -> Any:
    return jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))


def _count(x: Any, axes: tuple[int, ...]) -> int:
    return int(np.prod([x.shape[axis] for axis in axes]))


def _to_norm(x: Any, radius: Any, axes: tuple[int, ...]) -> Any:
    return x * (jnp.asarray(radius, x.dtype) / _norm(x, axes))


def _shell(x: Any, start: Any, spread: Any, radius: float | None, axes: tuple[int, ...]) -> Any:
    return _to_norm(x, spread * _count(x, axes) ** 0.5, axes)  # (1)


def _chi(x: Any, start: Any, spread: Any, radius: float | None, axes: tuple[int, ...]) -> Any:
    low, high = (spread * float(quantile) for quantile in chi_distribution.ppf((TAIL, 1 - TAIL), _count(x, axes)))
    return _to_norm(x, jnp.clip(_norm(x, axes), low, high), axes)  # (2)


def _same_norm(x: Any, start: Any, spread: Any, radius: float | None, axes: tuple[int, ...]) -> Any:
    return _to_norm(x, _norm(start, axes), axes)  # (3)


def _linf(x: Any, start: Any, spread: Any, radius: float, axes: tuple[int, ...]) -> Any:
    return jnp.clip(x, start - spread * radius, start + spread * radius)  # (4)


def _l2(x: Any, start: Any, spread: Any, radius: float, axes: tuple[int, ...]) -> Any:
    change = x - start
    return start + change * jnp.minimum(1, spread * radius / jnp.maximum(_norm(change, axes), jnp.finfo(x.dtype).tiny))  # (5)


PROJECTIONS: dict[str, Callable | None] = {"none": None, "shell": _shell, "chi": _chi, "norm": _same_norm, "linf": _linf, "l2": _l2}
BALLS = ("linf", "l2")


def projection(name: str, radius: float | None = None) -> Callable[[Any, Any, Any, tuple[int, ...]], Any]:
    """`project(x, start, spread, axes)` by name, equations (1) to (5); `spread` may be traced, and with it s R.

    Raises ValueError for an unknown name, a ball without radius, or a radius without ball.
    """
    if name not in PROJECTIONS:
        raise ValueError(f"The projection {name} is not known: use one of {', '.join(PROJECTIONS)}.")
    if (name in BALLS) != (radius is not None) or (radius is not None and not 0 < radius < np.inf):
        raise ValueError(f"A radius, a positive number, is for the projections {' and '.join(BALLS)}; got {name} and {radius}.")
    function = PROJECTIONS[name] or (lambda x, *_: x)
    return lambda x, start, spread, axes: function(x, start, spread, radius, axes)


def concentration(x: Any, spread: Any, axes: tuple[int, ...]) -> Any:
    """The penalty (6), without its constant, summed over all axes but `axes`."""
    n = _count(x, axes)
    r = _norm(x, axes) / spread
    return jnp.sum(r**2 / 2 - (n - 1) * jnp.log(r)) / n
