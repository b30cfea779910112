"""The change of variables that every solver and adjoint rests on.

For data assumed to have standard deviation c = `sigma_data`,

    m = sqrt(c^2 alpha^2 + sigma^2),  theta = atan2(sigma, c alpha),  z = x / m,
    dz/dtheta = F = cos(theta) eps - sin(theta) x0 / c,    cos(theta) = c alpha / m,  sin(theta) = sigma / m,        (1)

and its limits, coded as limits (u is the variable of integration, dz/du = F):

    c -> infinity   m = alpha   u = rho = sigma / alpha   F = eps     noise prediction: DDIM, DEIS, DPM-Solver             (2)
    c -> 0          m = sigma   u = alpha / sigma         F = x0      data prediction: DPM-Solver++                        (3)

With stochasticity tau (the reverse SDE with tau times its noise; tau = 0 is the ODE) and kappa = 1 + tau^2, where every m above becomes

    m_kappa = m (m/alpha)^(tau^2),   dz = kappa (m/alpha)^(-tau^2) F du + Gaussian noise, of variance in x over a step s -> t     (4)
    m_t^2 (1 - ((m_t/alpha_t) / (m_s/alpha_s))^(2 tau^2)),    tau^2 alpha_t^2 (rho_s^2 - rho_t^2) for c -> infinity.         (5)

c = 0, tau = 1 is SDE-DPM-Solver++. All quantities are functions of (alpha, sigma, lam) only. An array of c broadcasts against the
trailing axes of x: its axes follow those of the times in every answer.
"""

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from ._numerics import GAUSS_POINTS, GAUSS_WEIGHTS, floating, is_concrete, namespace, trailing
from .processes import AbstractProcess


class Level(NamedTuple):
    """A process at some times: every field has the shape of the times."""

    alpha: Any
    sigma: Any
    lam: Any
    alpha_rate: Any
    sigma_rate: Any

    def at(self, index: Any) -> "Level":
        """Every field at an index."""
        return Level(*(part[index] for part in self))


def level(process: AbstractProcess, t: Any) -> Level:
    """alpha, sigma, lam and the rates of `process` at t."""
    return Level(process.alpha(t), process.sigma(t), process.lam(t), *process.rates(t))


class Splitting(eqx.Module):
    """The linear part that is solved exactly, named by the assumed standard deviation of the data.

    Args:
        sigma_data: 0, infinity, a positive number, or an array of positive numbers that broadcasts against the trailing axes of x.
        tau: stochasticity; 0 is the ODE, 1 the reverse SDE. An array has one entry for each of the steps that are asked for.
    Raises:
        ValueError: where a concrete sigma_data is negative or not a number, an array holds 0 or infinity, or tau is negative.
    """

    sigma_data: Any
    tau: Any

    def __init__(self, sigma_data: Any, tau: Any = 0.0):
        self.sigma_data, self.tau = sigma_data, tau if np.ndim(tau) else float(tau)
        if is_concrete(tau) and not (np.all(np.greater_equal(tau, 0)) and np.all(np.isfinite(tau))):
            raise ValueError(f"tau is a number, at least 0; got {tau!r}.")
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
    def stochastic(self) -> bool:
        """Whether there is noise at all."""
        return bool(np.ndim(self.tau)) or self.tau > 0

    def _squared(self, axes: int = 0) -> Any:
        """tau^2; of an array with `axes` axes behind."""
        return trailing(self.tau**2, axes) if np.ndim(self.tau) else self.tau**2

    @property
    def ndim(self) -> int:
        """Number of channel axes of sigma_data."""
        return np.ndim(self.sigma_data)

    def _wide(self, like: Any, *values: Any) -> tuple[Any, ...]:
        """c in the dtype of `like`, and the values with the axes of c behind."""
        return floating(self.sigma_data, like), *(trailing(value, self.ndim) for value in values)

    def scale(self, at: Level) -> Any:
        """m_kappa of (4), which is m of (1)-(3) where tau = 0."""
        m = self._width(at)
        return m * (m / trailing(at.alpha, self.ndim)) ** self._squared(self.ndim) if self.stochastic else m

    def _width(self, at: Level) -> Any:
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
        m = self._width(at)
        return c * alpha / m, -sigma / (c * m)

    def step(self, start: Level, end: Level) -> Any:
        """The weight of a first-order step in x, m_end (u_end - u_start) for the ODE, by differences that hold at alpha = 0 and sigma = 0."""
        if self.kind == "noise":
            return (1 + self._squared()) * _rotation(start, end) / start.alpha
        if self.kind == "data":
            if self.stochastic:
                return -end.alpha * namespace(end.lam).expm1(-(1 + self._squared()) * (end.lam - start.lam))
            return -_rotation(start, end) / start.sigma
        angle = self.angle(start, end)
        if not self.stochastic:
            return self._width(end) * angle
        cosines = self._cosine(start, angle[..., None] * floating(GAUSS_POINTS, angle)) / self._cosine(start, angle)[..., None]
        mean = cosines ** self._squared(self.ndim + 1) @ floating(GAUSS_WEIGHTS, angle)
        return (1 + self._squared(self.ndim)) * self._width(end) * angle * mean

    def angle(self, start: Level, end: Level) -> Any:
        """theta_end - theta_start for a finite c."""
        c, a0, s0, a1, s1, cross = self._wide(start.alpha, start.alpha, start.sigma, end.alpha, end.sigma, _rotation(start, end))
        return namespace(a0).arctan2(c * cross, c**2 * a0 * a1 + s0 * s1)

    def _cosine(self, start: Level, turned: Any) -> Any:
        """m_start cos(theta_start + turned) for a finite c, `turned` with one more axis or none."""
        xp = namespace(turned)
        c, alpha, sigma = self._wide(start.alpha, start.alpha, start.sigma)
        ahead, aside = c * alpha, sigma + 0 * c
        if turned.ndim > ahead.ndim:
            ahead, aside = ahead[..., None], aside[..., None]
        return ahead * xp.cos(turned) - aside * xp.sin(turned)

    def density(self, lam: Any, end: Level) -> Any:
        """The weight of F in x per unit of lam at half log-SNR `lam`, `[..., q]`, of steps that end at `end`, `[...]`: m_end du/dlam for the ODE."""
        xp = namespace(lam)
        if self.kind == "noise":
            return -(1 + self._squared(1)) * end.alpha[..., None] * xp.exp(-lam)
        if self.kind == "data":
            return (1 + self._squared(1)) * end.alpha[..., None] * xp.exp((1 + self._squared(1)) * (lam - end.lam[..., None]))
        c, wide = self._wide(lam, lam)
        m = self._width(end)
        m, alpha = (part.reshape(end.lam.shape + (1,) + part.shape[end.lam.ndim :]) for part in (m, trailing(end.alpha, self.ndim)))
        density = -m * c / (c**2 * xp.exp(wide) + xp.exp(-wide))
        if not self.stochastic:
            return density
        squared = self._squared(1 + self.ndim)
        return density * (1 + squared) * ((m / alpha) ** 2 / (c**2 + xp.exp(-2 * wide))) ** (squared / 2)

    def noise(self, start: Level, end: Level) -> Any:
        """The standard deviation of the noise that a step adds to x, (5)."""
        xp = namespace(start.alpha)
        if self.kind == "noise":
            return self._squared() ** 0.5 * _root((start.sigma * end.alpha / start.alpha) ** 2 - end.sigma**2)
        if self.kind == "data":
            return end.sigma * _root(-xp.expm1(-2 * self._squared() * (end.lam - start.lam)))
        widths = [self._width(at) / trailing(at.alpha, self.ndim) for at in (start, end)]
        return self._width(end) * _root(-xp.expm1(2 * self._squared(self.ndim) * (xp.log(widths[1]) - xp.log(widths[0]))))

    def noise_fraction(self, at: Level) -> Any:
        """rho^2 / (c^2 + rho^2) = sin(theta)^2, the share of the noise in the variance: the linear part of the adjoint."""
        if self.kind != "finite":
            return namespace(at.alpha).ones_like(at.alpha) * float(self.kind == "data")
        c, alpha, sigma = self._wide(at.alpha, at.alpha, at.sigma)
        return sigma**2 / (c**2 * alpha**2 + sigma**2)


def _root(square: Any) -> Any:
    """The square root, with slope 0 at 0, or what rounding makes of it: there tau is 0, or no step is taken."""
    xp = namespace(square)
    return xp.where(square <= 0, 0, xp.sqrt(xp.where(square <= 0, 1, square)))


def _rotation(start: Level, end: Level) -> Any:
    """alpha_0 sigma_1 - sigma_0 alpha_1 = sigma_0 alpha_1 expm1(-h) = -sigma_1 alpha_0 expm1(h), h = lam_1 - lam_0; the bounded form of the two."""
    xp = namespace(start.lam)
    h = end.lam - start.lam
    forward, backward = start.sigma * end.alpha, start.alpha * end.sigma
    return xp.where(h > 0, forward * xp.expm1(-xp.abs(h)), -backward * xp.expm1(-xp.abs(h)))
