"""Grids of times: `steps + 1` strictly decreasing numbers, numpy float64, made outside of the sampler and passed to it.

Every function takes `(process, steps, *, t_start=None, t_end=None)`; the ends default to `process.span`. Any array of one's own is as good.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from .processes import AbstractProcess

Grid = Float[np.ndarray, " times"]


def _ends(process: AbstractProcess, steps: int, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    if int(steps) != steps or steps < 1:
        raise ValueError(f"A grid needs a whole number of steps, at least 1; got {steps}.")
    start, end = process.span
    start, end = (start if t_start is None else float(t_start)), (end if t_end is None else float(t_end))
    check(process, np.array([start, end]))
    return start, end


def check(process: AbstractProcess, ts: Any) -> np.ndarray:
    """The grid as numpy float64. Raises ValueError unless it is a strictly decreasing vector of at least two times in the process's range."""
    ts = np.asarray(ts, np.float64)
    name = type(process).__name__
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"A grid is a vector of at least two times; got shape {ts.shape}.")
    if not np.all(np.diff(ts) < 0):
        where = int(np.argmax(~(np.diff(ts) < 0)))
        raise ValueError(f"A grid must decrease strictly, from noise to data; ts[{where}] = {ts[where]:g} is followed by {ts[where + 1]:g}.")
    low, high = (float(end) for end in process.range)
    slack = 1e-6 * max(1.0, abs(ts[0]))
    if ts[-1] < low - slack or ts[0] > high + slack:
        raise ValueError(f"The grid runs from {ts[0]:g} to {ts[-1]:g}, but {name} is defined for t in [{low:g}, {high:g}]: choose times within.")
    return np.clip(ts, low, high)


def _in_lam(process: AbstractProcess, lams: np.ndarray, start: float, end: float) -> Grid:
    if not np.all(np.isfinite(lams)):
        raise ValueError(
            f"This grid is laid in log(alpha/sigma), which is infinite at t = {start:g} or t = {end:g} of {type(process).__name__}: "
            "give a t_start with alpha > 0 and a t_end with sigma > 0."
        )
    return np.concatenate([[start], process.t_of_lam(lams[1:-1]), [end]])


def uniform(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None) -> Grid:
    """Uniform in t."""
    return np.linspace(*_ends(process, steps, t_start, t_end), steps + 1)


def quadratic(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None) -> Grid:
    """Uniform in the square root of t - min(t_end, 0): finer near the data (DDIM, appendix D.2)."""
    start, end = _ends(process, steps, t_start, t_end)
    shift = min(end, 0.0)
    ts = np.linspace(np.sqrt(start - shift), np.sqrt(end - shift), steps + 1) ** 2 + shift
    ts[0], ts[-1] = start, end
    return ts


def log_snr(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None) -> Grid:
    """Uniform in lam = log(alpha/sigma) (DPM-Solver, section 3.3)."""
    start, end = _ends(process, steps, t_start, t_end)
    with np.errstate(invalid="ignore"):
        return _in_lam(process, np.linspace(process.lam(start), process.lam(end), steps + 1), start, end)


def karras(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, rho: float = 7.0) -> Grid:
    """Uniform in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. (5))."""
    start, end = _ends(process, steps, t_start, t_end)
    ends = np.exp(-np.array([process.lam(start), process.lam(end)]) / rho)
    with np.errstate(divide="ignore"):
        return _in_lam(process, -rho * np.log(np.linspace(ends[0], ends[1], steps + 1)), start, end)


def edm(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, rho: float = 7.0) -> Grid:
    """`karras` with `steps - 1` steps down to t_end, then one to sigma = 0 (Karras et al. 2022, algorithm 1)."""
    if steps < 2:
        raise ValueError("grids.edm needs at least 2 steps: the last one goes to sigma = 0.")
    clean = process.range[0]
    if np.isfinite(process.lam(clean)):
        raise ValueError(f"grids.edm ends at sigma = 0, which {type(process).__name__} does not reach: use grids.karras.")
    return np.append(karras(process, steps - 1, t_start=t_start, t_end=t_end, rho=rho), clean)


def angle(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None) -> Grid:
    """Uniform in the angle atan(sigma/alpha), the variable of the splitting sigma_data = 1."""
    start, end = _ends(process, steps, t_start, t_end)
    first, last = (np.arctan2(process.sigma(t), process.alpha(t)) for t in (start, end))
    thetas = np.linspace(first, last, steps + 1)[1:-1]
    return np.concatenate([[start], process.t_of_lam(-np.log(np.tan(thetas))), [end]])


def trailing(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None) -> Grid:
    """Training steps counted back from the last one in equal strides, then the clean end (diffusers' "trailing"). For `VPDiscrete`."""
    last = _discrete(process, "trailing")
    start, _ = _ends(process, steps, t_start, t_end)
    ts = np.round(np.linspace(start + 1, 0, steps, endpoint=False)) - 1
    return np.append(ts, _clean(t_end)) if start <= last else ts


def leading(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, offset: int = 0) -> Grid:
    """Multiples of floor(T / steps) plus `offset`, then the clean end (diffusers' "leading"). For `VPDiscrete`."""
    start, _ = _ends(process, steps, t_start, t_end)
    _discrete(process, "leading")
    stride = int(start + 1) // steps
    return np.append(np.arange(steps)[::-1] * stride + float(offset), _clean(t_end))


def _clean(t_end: float | None) -> float:
    return -1.0 if t_end is None else float(t_end)


def _discrete(process: AbstractProcess, name: str) -> float:
    if process.range[0] != -1:
        raise ValueError(f"grids.{name} counts training steps and needs a VPDiscrete process; got {type(process).__name__}: use grids.uniform.")
    return process.range[1]
