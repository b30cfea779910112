"""Variance-exploding processes: alpha = 1."""

from typing import Any

import numpy as np

from .._numerics import floating, namespace
from .._types import Time
from ._base import AbstractProcess


class VE(AbstractProcess):
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, t in [0, 1] (Song et al. 2021, eq. (9))."""

    sigma_min: Any = 0.02
    sigma_max: Any = 100.0

    @property
    def range(self) -> tuple[Any, Any]:
        return (0.0, 1.0)

    @property
    def span(self) -> tuple[Any, Any]:
        return (1.0, 0.0)

    def _log_ratio(self, like: Any) -> tuple[Any, Any]:
        low, high = floating(self.sigma_min, like), floating(self.sigma_max, like)
        xp = namespace(low)
        return xp.log(low), xp.log(high / low)

    def log_alpha(self, t: Time) -> Any:
        return 0 * floating(t, t)

    def log_sigma(self, t: Time) -> Any:
        low, ratio = self._log_ratio(t)
        return low + floating(t, t) * ratio

    def rates(self, t: Time) -> tuple[Any, Any]:
        return self.log_alpha(t), self.sigma(t) * self._log_ratio(t)[1]

    def t_of_lam(self, lam: Any) -> Any:
        low, ratio = self._log_ratio(lam)
        return (-floating(lam, lam) - low) / ratio


class EDM(AbstractProcess):
    """alpha = 1, sigma = t >= 0: the noise level is the time (Karras et al. 2022, table 1)."""

    @property
    def range(self) -> tuple[Any, Any]:
        return (0.0, np.inf)

    @property
    def span(self) -> tuple[Any, Any]:
        return (80.0, 0.002)

    def log_alpha(self, t: Time) -> Any:
        return 0 * floating(t, t)

    def log_sigma(self, t: Time) -> Any:
        t = floating(t, t)
        with np.errstate(divide="ignore"):
            return namespace(t).log(t)

    def rates(self, t: Time) -> tuple[Any, Any]:
        return self.log_alpha(t), self.log_alpha(t) + 1

    def t_of_lam(self, lam: Any) -> Any:
        lam = floating(lam, lam)
        return namespace(lam).exp(-lam)
