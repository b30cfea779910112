"""Variance-preserving processes: alpha^2 + sigma^2 = 1."""

import abc
from typing import Any

import numpy as np

from .._numerics import floating, namespace
from .._types import ArrayLike, Time
from ._base import AbstractProcess


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

    @property
    def range(self) -> tuple[Any, Any]:
        return (0.0, 1.0)

    @property
    def span(self) -> tuple[Any, Any]:
        return (1.0, 1e-3)

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

    @property
    def range(self) -> tuple[Any, Any]:
        return (0.0, 0.9946)

    @property
    def span(self) -> tuple[Any, Any]:
        return (0.9946, 1e-3)

    def _offset(self, like: Any) -> Any:
        """A = s/(1+s) pi/2, the angle at t = 0."""
        return floating(self.s / (1 + self.s) * (np.pi / 2), like)

    def _turn(self, t: Time) -> Any:
        """B = t/(1+s) pi/2, the angle since t = 0."""
        return floating(t, t) / (1 + self.s) * (np.pi / 2)

    def log_alpha(self, t: Time) -> Any:
        """log(cos(A + B)/cos A) = log(1 - 2 sin(B/2)^2 - tan(A) sin(B)): nothing cancels near the data."""
        turn, xp = self._turn(t), namespace(t, self.s)
        return xp.log1p(-2 * xp.sin(turn / 2) ** 2 - xp.tan(self._offset(t)) * xp.sin(turn))

    def log_alpha_rate(self, t: Time) -> Any:
        return -namespace(t, self.s).tan(self._offset(t) + self._turn(t)) * (np.pi / 2) / (1 + self.s)

    def t_of_lam(self, lam: Any) -> Any:
        lam = floating(lam, lam)
        xp, offset = namespace(lam, self.s), self._offset(lam)
        short = -xp.expm1(_vp_log_alpha(lam))
        cosine = xp.cos(offset) * (1 - short)
        sine = xp.sqrt(xp.sin(offset) ** 2 + xp.cos(offset) ** 2 * short * (2 - short))
        turn = xp.arctan2(sine * xp.cos(offset) - cosine * xp.sin(offset), cosine * xp.cos(offset) + sine * xp.sin(offset))
        return turn * (1 + self.s) * (2 / np.pi)


ABAR_FLOOR = 2.0**-24
"""abar at the end of a zero-terminal-SNR table: keeps log(abar) finite (diffusers' multistep and Euler schedulers; its DDIM keeps the zero)."""


def zero_terminal_snr(alphas_cumprod: ArrayLike, floor: float = ABAR_FLOOR) -> np.ndarray:
    """A table whose last step is pure noise: sqrt(abar) <- (sqrt(abar) - sqrt(abar_T)) sqrt(abar_0) / (sqrt(abar_0) - sqrt(abar_T)).

    Args:
        alphas_cumprod: abar of DDPM, `[T]`, decreasing.
        floor: the last abar instead of 0, for a table of `VPDiscrete` must stay above it; a quarter of the one before where the floor is not
            below that, as for the linear schedule. Only the predictions "v" and "x0" are of use at so small an alpha.
    Reference:
        Lin et al. 2023, alg. 1.
    Example:
        process = aj.VPDiscrete(aj.grids.zero_terminal_snr(alphas_cumprod))
    """
    root = np.sqrt(np.asarray(alphas_cumprod, np.float64))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    before = root[-2] ** 2
    return np.append(root[:-1] ** 2, floor if floor < before else before / 4)


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
            if table.ndim != 1 or len(table) < 2 or not (np.all(np.diff(table) < 0) and table[-1] > 0 and table[0] < 1):
                raise ValueError(f"alphas_cumprod must be a strictly decreasing vector within (0, 1); got shape {table.shape}.")
        self.alphas_cumprod = table

    @property
    def range(self) -> tuple[Any, Any]:
        return (-1.0, len(self.alphas_cumprod) - 1.0)

    @property
    def span(self) -> tuple[Any, Any]:
        return (len(self.alphas_cumprod) - 1.0, 0.0)

    def _knots(self, like: Any) -> tuple[Any, Any]:
        xp, table = namespace(self.alphas_cumprod), self.alphas_cumprod
        values = xp.concatenate([0 * table[:1], 0.5 * xp.log(table)])
        return floating(np.arange(-1.0, len(table)), like), floating(values, like)

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
