"""Noise processes: x_t = alpha(t) x_0 + sigma(t) eps.

A process gives log alpha, log sigma, their rates and the inverse of the half log-SNR; the rest follows:

    lam = log(alpha / sigma),   rho = sigma / alpha = exp(-lam),   alpha = exp(log alpha),   sigma = exp(log sigma).           (1)

Variance-preserving processes have alpha^2 + sigma^2 = 1, hence log sigma = log(-expm1(2 log alpha)) / 2 without cancellation.
Every function takes numbers or numpy arrays (computed in float64 on the host) or JAX arrays (computed in the graph, in their dtype).
"""

import abc
from typing import Any

import equinox as eqx
import numpy as np

from ._numerics import floating, namespace
from ._types import ArrayLike, Time


class AbstractProcess(eqx.Module):
    """x_t = alpha(t) x_0 + sigma(t) eps for t in `range`, the noise end last."""

    @property
    @abc.abstractmethod
    def range(self) -> tuple[Any, Any]:
        """(t at the data end, t at the noise end): the times that a grid may use."""

    @property
    @abc.abstractmethod
    def span(self) -> tuple[Any, Any]:
        """(t_start, t_end) that `grids` use unless told otherwise."""

    @abc.abstractmethod
    def log_alpha(self, t: Time) -> Any:
        """log alpha at t."""

    @abc.abstractmethod
    def log_sigma(self, t: Time) -> Any:
        """log sigma at t; -inf where sigma = 0."""

    @abc.abstractmethod
    def rates(self, t: Time) -> tuple[Any, Any]:
        """(d alpha / dt, d sigma / dt)."""

    @abc.abstractmethod
    def t_of_lam(self, lam: Any) -> Any:
        """The time at which the half log-SNR is `lam`."""

    def alpha(self, t: Time) -> Any:
        """Scale of the data, dimensionless."""
        log_alpha = self.log_alpha(t)
        return namespace(log_alpha).exp(log_alpha)

    def sigma(self, t: Time) -> Any:
        """Standard deviation of the noise, in units of x."""
        log_sigma = self.log_sigma(t)
        return namespace(log_sigma).exp(log_sigma)

    def lam(self, t: Time) -> Any:
        """Half log-SNR log(alpha / sigma); +inf where sigma = 0, -inf where alpha = 0."""
        return self.log_alpha(t) - self.log_sigma(t)


class AbstractVP(AbstractProcess):
    """alpha^2 + sigma^2 = 1."""

    @abc.abstractmethod
    def log_alpha_rate(self, t: Time) -> Any:
        """d log alpha / dt."""

    def log_sigma(self, t: Time) -> Any:
        log_alpha = self.log_alpha(t)
        xp = namespace(log_alpha)
        with np.errstate(divide="ignore"):
            return 0.5 * xp.log(-xp.expm1(2 * log_alpha))

    def rates(self, t: Time) -> tuple[Any, Any]:
        alpha, sigma = self.alpha(t), self.sigma(t)
        d_alpha = alpha * self.log_alpha_rate(t)
        with np.errstate(divide="ignore", invalid="ignore"):
            return d_alpha, -alpha * d_alpha / sigma


def _vp_log_alpha(lam: Any) -> Any:
    """log alpha of a variance-preserving process at half log-SNR `lam`."""
    xp = namespace(lam)
    return -0.5 * xp.logaddexp(xp.zeros_like(lam), -2 * lam)


class VPLinear(AbstractVP):
    """log alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2, t in [0, 1]: the VP SDE of Song et al. (2021), eq. (11), with linear beta."""

    beta_min: Any = 0.1
    beta_max: Any = 20.0

    range = property(lambda self: (0.0, 1.0))
    span = property(lambda self: (1.0, 1e-3))

    def log_alpha(self, t: Time) -> Any:
        t = floating(t, t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def log_alpha_rate(self, t: Time) -> Any:
        return -0.5 * floating(t, t) * (self.beta_max - self.beta_min) - 0.5 * self.beta_min

    def t_of_lam(self, lam: Any) -> Any:
        lam = floating(lam, lam)
        scaled = -4 * (self.beta_max - self.beta_min) * _vp_log_alpha(lam)
        root = namespace(scaled).sqrt(self.beta_min**2 + scaled)
        return scaled / ((root + self.beta_min) * (self.beta_max - self.beta_min))


class VPCosine(AbstractVP):
    """alpha = cos((t+s)/(1+s) pi/2) / cos(s/(1+s) pi/2), t in [0, 0.9946] (Nichol & Dhariwal 2021, eq. (17); range of DPM-Solver)."""

    s: Any = 0.008

    range = property(lambda self: (0.0, 0.9946))
    span = property(lambda self: (0.9946, 1e-3))

    def _angle(self, t: Time) -> Any:
        return (floating(t, t) + self.s) / (1 + self.s) * (np.pi / 2)

    def log_alpha(self, t: Time) -> Any:
        xp, angle = namespace(t, self.s), self._angle(t)
        return xp.log(xp.cos(angle)) - xp.log(xp.cos(self._angle(0 * angle)))

    def log_alpha_rate(self, t: Time) -> Any:
        return -namespace(t, self.s).tan(self._angle(t)) * (np.pi / 2) / (1 + self.s)

    def t_of_lam(self, lam: Any) -> Any:
        lam = floating(lam, lam)
        xp = namespace(lam, self.s)
        cosine = xp.exp(_vp_log_alpha(lam)) * xp.cos(self._angle(0 * lam))
        return xp.arccos(cosine) * (1 + self.s) * (2 / np.pi) - self.s


class VPDiscrete(AbstractVP):
    """A trained table: t is the training step as a float in [0, T-1], log alpha linear between steps; t = -1 is the clean end, alpha = 1.

    Args:
        alphas_cumprod: the cumulative products abar_t = alpha^2 of DDPM, `[T]`, strictly decreasing in (0, 1).
    Raises:
        ValueError: where the table is not so.
    """

    alphas_cumprod: Any

    def __init__(self, alphas_cumprod: ArrayLike):
        table = alphas_cumprod
        if namespace(table) is np:
            table = np.asarray(table, np.float64)
            if table.ndim != 1 or len(table) < 2 or not (np.all(np.diff(table) < 0) and 0 < table[-1] and table[0] < 1):
                raise ValueError(f"alphas_cumprod must be a strictly decreasing vector within (0, 1); got shape {table.shape}.")
        self.alphas_cumprod = table

    range = property(lambda self: (-1.0, len(self.alphas_cumprod) - 1.0))
    span = property(lambda self: (len(self.alphas_cumprod) - 1.0, 0.0))

    def _knots(self, like: Any) -> tuple[Any, Any]:
        xp, table = namespace(like, self.alphas_cumprod), floating(self.alphas_cumprod, like)
        return xp.arange(-1, len(table)).astype(table.dtype), xp.concatenate([0 * table[:1], 0.5 * xp.log(table)])

    def log_alpha(self, t: Time) -> Any:
        t = floating(t, t)
        return namespace(t, self.alphas_cumprod).interp(t, *self._knots(t))

    def log_alpha_rate(self, t: Time) -> Any:
        t = floating(t, t)
        xp, (steps, values) = namespace(t, self.alphas_cumprod), self._knots(t)
        segment = xp.clip(xp.searchsorted(steps, t, side="right") - 1, 0, len(steps) - 2)
        return xp.take(xp.diff(values), segment)

    def t_of_lam(self, lam: Any) -> Any:
        lam = floating(lam, lam)
        steps, values = self._knots(lam)
        return namespace(lam, self.alphas_cumprod).interp(_vp_log_alpha(lam), values[::-1], steps[::-1])


class VE(AbstractProcess):
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, t in [0, 1] (Song et al. 2021, eq. (9))."""

    sigma_min: Any = 0.02
    sigma_max: Any = 100.0

    range = property(lambda self: (0.0, 1.0))
    span = property(lambda self: (1.0, 0.0))

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
    """alpha = 1, sigma = t >= 0 (Karras et al. 2022, table 1)."""

    range = property(lambda self: (0.0, np.inf))
    span = property(lambda self: (80.0, 0.002))

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


class FlowMatching(AbstractProcess):
    """alpha = 1 - t, sigma = t, t in [0, 1] (Lipman et al. 2023; rectified flow)."""

    range = property(lambda self: (0.0, 1.0))
    span = property(lambda self: (1.0, 0.0))

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
