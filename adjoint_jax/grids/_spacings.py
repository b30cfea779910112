"""Spacings of any process: uniform in some function of the time or of the noise level rho = sigma/alpha = exp(-lam)."""

import numpy as np

from ..processes import AbstractProcess, VPLinear
from ._base import Final, Grid, at_lam, lay, warped


def uniform(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min") -> Grid:
    """Uniform in t."""
    return lay(process, steps, t_start, t_end, final, lambda start, end, n: np.linspace(start, end, n + 1))


def power(
    process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min", rho: float = 2.0
) -> Grid:
    """Uniform in (t - t_0)^(1/rho), t_0 the clean end of the process's range: DEIS's power of t."""
    origin = float(process.range[0])

    def between(start: float, end: float, n: int) -> np.ndarray:
        ts = warped(start - origin, end - origin, n, rho) + origin
        ts[0], ts[-1] = start, end
        return ts

    return lay(process, steps, t_start, t_end, final, between)


def quadratic(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min") -> Grid:
    """`power` with rho = 2: finer near the data (DDIM, appendix D.2)."""
    return power(process, steps, t_start=t_start, t_end=t_end, final=final, rho=2.0)


def polyexponential(
    process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min", rho: float = 1.0
) -> Grid:
    """lam = lam_end + (lam_start - lam_end) r^rho, r uniform from 1 to 0 (k-diffusion); finer near the noise for rho < 1."""

    def between(start: float, end: float, n: int) -> np.ndarray:
        first, last = process.lam(start), process.lam(end)
        with np.errstate(invalid="ignore"):
            return at_lam(process, last + (first - last) * np.linspace(1, 0, n + 1) ** rho, start, end)

    return lay(process, steps, t_start, t_end, final, between)


def log_snr(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min") -> Grid:
    """Uniform in lam = log(alpha/sigma) (DPM-Solver, section 3.3)."""
    return polyexponential(process, steps, t_start=t_start, t_end=t_end, final=final)


def karras(
    process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min", rho: float = 7.0
) -> Grid:
    """Uniform in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. (5))."""

    def between(start: float, end: float, n: int) -> np.ndarray:
        first, last = np.exp(-np.array([process.lam(start), process.lam(end)]) / rho)
        with np.errstate(divide="ignore"):
            return at_lam(process, -rho * np.log(np.linspace(first, last, n + 1)), start, end)

    return lay(process, steps, t_start, t_end, final, between)


def edm(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, rho: float = 7.0) -> Grid:
    """`karras` with `steps - 1` steps down to t_end, then one to sigma = 0 (Karras et al. 2022, algorithm 1)."""
    if steps < 2:
        raise ValueError("grids.edm needs at least 2 steps: the last one goes to sigma = 0.")
    if np.isfinite(process.lam(process.range[0])):
        raise ValueError(f"grids.edm ends at sigma = 0, which {type(process).__name__} does not reach: use grids.karras.")
    return karras(process, steps, t_start=t_start, t_end=t_end, final="append_zero", rho=rho)


def beta(
    process: AbstractProcess,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    final: Final = "sigma_min",
    a: float = 0.6,
    b: float = 0.6,
) -> Grid:
    """sigma/alpha at the quantiles of a Beta(a, b) distribution laid between its ends, the quantiles uniform: finer at both ends for a, b < 1."""
    from scipy.special import betaincinv  # comes with JAX; slow to import, and no other grid needs it

    def between(start: float, end: float, n: int) -> np.ndarray:
        high, low = np.exp(-np.array([process.lam(start), process.lam(end)]))
        with np.errstate(invalid="ignore", divide="ignore"):
            return at_lam(process, -np.log(low + (high - low) * betaincinv(a, b, 1 - np.linspace(0, 1, n + 1))), start, end)

    return lay(process, steps, t_start, t_end, final, between)


def angle(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "sigma_min") -> Grid:
    """Uniform in the angle atan(sigma/alpha), the variable of the splitting sigma_data = 1."""

    def between(start: float, end: float, n: int) -> np.ndarray:
        first, last = (np.arctan2(process.sigma(t), process.alpha(t)) for t in (start, end))
        thetas = np.linspace(first, last, n + 1)[1:-1]
        return np.concatenate([[start], process.t_of_lam(-np.log(np.tan(thetas))), [end]])

    return lay(process, steps, t_start, t_end, final, between)


def vp(
    process: AbstractProcess,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    final: Final = "sigma_min",
    rho: float = 1.0,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    fit: float | None = None,
) -> Grid:
    """At the noise levels that `VPLinear(beta_min, beta_max)` has at times u uniform in u^(1/rho): its own grid, for any process.

    log(1 + (sigma/alpha)^2) = u^2 (beta_max - beta_min)/2 + u beta_min.                                                    (1)

    Args:
        rho: the power of u; 2 is `quadratic` of the VP process.
        fit: the betas are such that (1) has u = 1 at t_start and u = fit at t_end (EDM's and diff-sampler's rule, fit = 1e-3).
    """

    def between(start: float, end: float, n: int) -> np.ndarray:
        lams = np.array([process.lam(start), process.lam(end)])
        at_lam(process, lams, start, end)  # refuses infinite ends
        other = VPLinear(beta_min, beta_max)
        if fit is not None:
            at_one, at_fit = np.logaddexp(0, -2 * lams)  # (1)
            slope = 2 * (at_fit / fit - at_one) / (fit - 1)
            other = VPLinear(at_one - slope / 2, at_one + slope / 2)
        first, last = other.t_of_lam(lams)
        return at_lam(process, other.lam(warped(first, last, n, rho)), start, end)

    return lay(process, steps, t_start, t_end, final, between)
