"""Noise processes: x_t = alpha(t) x_0 + sigma(t) eps.

A process gives log alpha, log sigma, their rates and the inverse of the half log-SNR; the rest follows:

    lam = log(alpha / sigma),   rho = sigma / alpha = exp(-lam),   alpha = exp(log alpha),   sigma = exp(log sigma).           (1)

Variance-preserving processes have alpha^2 + sigma^2 = 1, hence log sigma = log(-expm1(2 log alpha)) / 2 without cancellation.
Every function takes numbers or numpy arrays (computed in float64 on the host) or JAX arrays (computed in the graph, in their dtype).
"""

import abc
from typing import Any

import equinox as eqx

from .._numerics import namespace
from .._types import Time


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
