"""The change of variables that every solver and adjoint rests on.

For data assumed to have standard deviation c = `sigma_data`,

    m = sqrt(c^2 alpha^2 + sigma^2),  theta = atan2(sigma, c alpha),  z = x / m,
    dz/dtheta = F = cos(theta) eps - sin(theta) x0 / c,    cos(theta) = c alpha / m,  sin(theta) = sigma / m,        (1)

and its limits, coded as limits (u is the variable of integration, dz/du = F):

    c -> infinity   m = alpha   u = rho = sigma / alpha   F = eps     noise prediction: DDIM, DEIS, DPM-Solver             (2)
    c -> 0          m = sigma   u = alpha / sigma         F = x0      data prediction: DPM-Solver++                        (3)

All quantities are functions of (alpha, sigma, lam) only. An array of c broadcasts against the trailing axes of x: its axes follow
those of the times in every answer.
"""

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from ._numerics import floating, is_concrete, namespace, trailing
from .processes import AbstractProcess


class Level(NamedTuple):
    """A process at some times: every field has the shape of the times."""

    alpha: Any
    sigma: Any
    lam: Any
    alpha_rate: Any
    sigma_rate: Any


def level(process: AbstractProcess, t: Any) -> Level:
    """alpha, sigma, lam and the rates of `process` at t."""
    return Level(process.alpha(t), process.sigma(t), process.lam(t), *process.rates(t))


class Splitting(eqx.Module):
    """The linear part that is solved exactly, named by the assumed standard deviation of the data.

    Args:
        sigma_data: 0, infinity, a positive number, or an array of positive numbers that broadcasts against the trailing axes of x.
    Raises:
        ValueError: where a concrete sigma_data is negative or not a number, or an array holds 0 or infinity.
    """

    sigma_data: Any

    def __init__(self, sigma_data: Any):
        self.sigma_data = sigma_data
        if is_concrete(sigma_data):
            c = np.asarray(sigma_data, np.float64)
            if np.isnan(c).any() or (c < 0).any() or (c.ndim and not (np.isfinite(c) & (c > 0)).all()):
                raise ValueError(f"sigma_data must be 0, infinity, a positive number or an array of finite positive numbers; got {sigma_data!r}.")

    @property
    def kind(self) -> str:
        """ "noise" (c infinite), "data" (c = 0) or "finite"."""
        if not is_concrete(self.sigma_data) or np.ndim(self.sigma_data):
            return "finite"
        c = float(self.sigma_data)
        return "noise" if np.isinf(c) else "data" if c == 0 else "finite"

    @property
    def ndim(self) -> int:
        """Number of channel axes of sigma_data."""
        return np.ndim(self.sigma_data)

    def _wide(self, like: Any, *values: Any) -> tuple[Any, ...]:
        """c in the dtype of `like`, and the values with the axes of c behind."""
        return floating(self.sigma_data, like), *(trailing(value, self.ndim) for value in values)

    def scale(self, at: Level) -> Any:
        """m of (1)-(3)."""
        if self.kind == "noise":
            return at.alpha
        if self.kind == "data":
            return at.sigma
        c, alpha, sigma = self._wide(at.alpha, at.alpha, at.sigma)
        return namespace(alpha).sqrt(c**2 * alpha**2 + sigma**2)

    def field(self, at: Level) -> tuple[Any, Any]:
        """The weights (of eps, of x0) in F; None where a limit leaves one out."""
        if self.kind == "noise":
            return namespace(at.alpha).ones_like(at.alpha), None
        if self.kind == "data":
            return None, namespace(at.alpha).ones_like(at.alpha)
        c, alpha, sigma = self._wide(at.alpha, at.alpha, at.sigma)
        m = self.scale(at)
        return c * alpha / m, -sigma / (c * m)

    def step(self, start: Level, end: Level) -> Any:
        """m_end (u_end - u_start), the weight of a first-order step in x, by differences that do not cancel and hold at alpha = 0, sigma = 0."""
        if self.kind == "noise":
            return _rotation(start, end) / start.alpha
        if self.kind == "data":
            return -_rotation(start, end) / start.sigma
        return self.scale(end) * self.angle(start, end)

    def angle(self, start: Level, end: Level) -> Any:
        """theta_end - theta_start for a finite c."""
        c, a0, s0, a1, s1, cross = self._wide(start.alpha, start.alpha, start.sigma, end.alpha, end.sigma, _rotation(start, end))
        return namespace(a0).arctan2(c * cross, c**2 * a0 * a1 + s0 * s1)

    def density(self, lam: Any, end: Level) -> Any:
        """m_end du/dlam at half log-SNR `lam`, `[..., q]`, of steps that end at `end`, `[...]`."""
        xp = namespace(lam)
        if self.kind == "noise":
            return -end.sigma[..., None] * xp.exp(end.lam[..., None] - lam)
        if self.kind == "data":
            return end.alpha[..., None] * xp.exp(lam - end.lam[..., None])
        c, wide = self._wide(lam, lam)
        m = self.scale(end)
        m = m.reshape(end.lam.shape + (1,) + m.shape[end.lam.ndim :])
        return -m * c / (c**2 * xp.exp(wide) + xp.exp(-wide))

    def noise_fraction(self, at: Level) -> Any:
        """rho^2 / (c^2 + rho^2) = sin(theta)^2, the share of the noise in the variance: the linear part of the adjoint."""
        if self.kind != "finite":
            return namespace(at.alpha).ones_like(at.alpha) * float(self.kind == "data")
        c, alpha, sigma = self._wide(at.alpha, at.alpha, at.sigma)
        return sigma**2 / (c**2 * alpha**2 + sigma**2)


def _rotation(start: Level, end: Level) -> Any:
    """alpha_0 sigma_1 - sigma_0 alpha_1 = sigma_0 alpha_1 expm1(-h) = -sigma_1 alpha_0 expm1(h), h = lam_1 - lam_0; the bounded form of the two."""
    xp = namespace(start.lam)
    h = end.lam - start.lam
    forward, backward = start.sigma * end.alpha, start.alpha * end.sigma
    return xp.where(h > 0, forward * xp.expm1(-xp.abs(h)), -backward * xp.expm1(-xp.abs(h)))
