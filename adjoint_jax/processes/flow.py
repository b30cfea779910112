"""Straight paths from data to noise."""

from typing import Any

import numpy as np

from .._numerics import floating, namespace
from .._types import Time
from ._base import AbstractProcess


class FlowMatching(AbstractProcess):
    """alpha = 1 - t, sigma = t, t in [0, 1] (Lipman et al. 2023; rectified flow)."""

    @property
    def range(self) -> tuple[Any, Any]:
        return (0.0, 1.0)

    @property
    def span(self) -> tuple[Any, Any]:
        return (1.0, 0.0)

    def log_alpha(self, t: Time) -> Any:
        t = floating(t, t)
        with np.errstate(divide="ignore"):
            return namespace(t).log1p(-t)

    def log_sigma(self, t: Time) -> Any:
        t = floating(t, t)
        with np.errstate(divide="ignore"):
            return namespace(t).log(t)

    def rates(self, t: Time) -> tuple[Any, Any]:
        zero = 0 * floating(t, t)
        return zero - 1, zero + 1

    def t_of_lam(self, lam: Any) -> Any:
        lam = floating(lam, lam)
        xp = namespace(lam)
        return xp.exp(-xp.logaddexp(xp.zeros_like(lam), lam))
