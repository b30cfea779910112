"""DDIM with noise: not of the family of `splitting`, since the noise of a step is a share of what the step takes away.

    x_t = alpha_t x0 + sqrt(sigma_t^2 - s^2) eps + s z,      s = eta alpha_t (rho_t/rho_s) sqrt(rho_s^2 - rho_t^2)     (1)

eta = 0 is the ODE's first-order step, eta = 1 ancestral sampling of DDPM with the small variance, in between k-diffusion's
Euler-ancestral. Small steps are those of the reverse SDE of tau = eta: s^2 -> eta^2 alpha_t^2 (rho_s^2 - rho_t^2) as rho_t -> rho_s, and
sqrt(sigma_t^2 - s^2)/alpha_t - rho_s -> -(1 + eta^2) (rho_s - rho_t). Invariant under x -> c x, hence for every process.
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .linear import AbstractLinear, Pattern, Row
from .step import output


def checked_eta(eta: float, name: str) -> float:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}'s eta is a share of the noise, from 0 to 1; got {eta!r}.")
    return float(eta)


def split(rho: Any, rho_end: Any, eta: float) -> tuple[Any, Any]:
    """(sqrt(rho_t^2 - u^2), u) for u = s/alpha_t of (1): the level to step to, and the noise that leads from there to rho_t."""
    xp = namespace(rho)
    up = xp.minimum(rho_end, eta * rho_end * xp.sqrt(rho**2 - rho_end**2) / rho)
    return xp.sqrt(rho_end**2 - up**2), up


class DDIM(AbstractLinear):
    """Equation (1), from s to t: order 1, one network evaluation a step and, where eta > 0, one draw.

    Args:
        eta: share of the noise, 0 (deterministic) to 1.
    Raises:
        ValueError: for another eta.
    Reference: Song, Meng & Ermon, Denoising diffusion implicit models (2021), eq. (12).

        aj.sample(term, x_T, args, grid=ts, solver=aj.DDIM())
    """

    splitting: Splitting
    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        self.eta, self.splitting = checked_eta(eta, "DDIM"), Splitting(np.inf)

    def order(self, terms: Any) -> int:
        return 1

    @property
    def tau(self) -> float | None:
        return self.eta

    @property
    def pattern(self) -> Pattern:
        return Pattern(("x",), ("x", "F0", "z0"), {}, draws=1) if self.eta else Pattern(("x",), ("x", "F0"), {})

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp = namespace(nodes)
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = [end.alpha / start.alpha, self.splitting.step(start, end)]
            if self.eta:
                left, noise = (end.alpha * part for part in split(start.sigma / start.alpha, end.sigma / end.alpha, self.eta))
                # (1): sqrt(sigma^2 - s^2) - sigma = -s^2 / (sqrt(sigma^2 - s^2) + sigma), without the difference
                taken = xp.where(end.sigma > 0, noise**2 / xp.where(end.sigma > 0, left + end.sigma, 1), 0)
                weights = [weights[0], weights[1] - taken, noise]
            of_x, of_p = (part[..., None] for part in output(self.splitting, prediction, start))
        return Row(nodes[..., :1], of_x, of_p, (None,), xp.stack(weights, axis=-1), {})
