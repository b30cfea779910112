"""What every grid shares: its ends, its checks, and how it comes to an end.

A grid is laid between t_start and t_end by one spacing rule; `final` says what happens there:

    "sigma_min"        `steps` steps, the last one to t_end;
    "append_zero"      `steps - 1` steps to t_end, then one to the clean end, sigma = 0;
    "replace_by_zero"  `steps` steps, the last of which goes past t_end to the clean end.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from ..processes import AbstractProcess

Grid: TypeAlias = Float[np.ndarray, " times"]
Final: TypeAlias = Literal["sigma_min", "append_zero", "replace_by_zero"]
FINALS = ("sigma_min", "append_zero", "replace_by_zero")


def whole_steps(steps: int) -> None:
    if int(steps) != steps or steps < 1:
        raise ValueError(f"A grid needs a whole number of steps, at least 1; got {steps}.")


def ends(process: AbstractProcess, t_start: float | None, t_end: float | None) -> tuple[float, float]:
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


def clean_end(process: AbstractProcess, final: str) -> float:
    """The time at which sigma = 0."""
    if np.isfinite(process.lam(process.range[0])):
        raise ValueError(f"final={final!r} goes to sigma = 0, which {type(process).__name__} does not reach: use final='sigma_min'.")
    return float(process.range[0])


def known_final(final: str) -> None:
    if final not in FINALS:
        raise ValueError(f"final={final!r} is not known: use one of {', '.join(FINALS)}.")


def lay(
    process: AbstractProcess,
    steps: int,
    t_start: float | None,
    t_end: float | None,
    final: str,
    between: Callable[[float, float, int], np.ndarray],
) -> Grid:
    """The grid whose times from start to end, n steps, are `between(start, end, n)`, with its final step."""
    whole_steps(steps)
    known_final(final)
    start, end = ends(process, t_start, t_end)
    if final == "sigma_min":
        return between(start, end, steps)
    clean = clean_end(process, final)
    if final == "replace_by_zero":
        return np.append(between(start, end, steps)[:-1], clean)
    if steps < 2:
        raise ValueError("final='append_zero' needs at least 2 steps: the last one goes from t_end to sigma = 0.")
    if end <= clean:
        raise ValueError(f"final='append_zero' adds a step from t_end to sigma = 0, where t_end = {end:g} is already: give a t_end above {clean:g}.")
    return np.append(between(start, end, steps - 1), clean)


def at_lam(process: AbstractProcess, lams: np.ndarray, start: float, end: float) -> Grid:
    """The times at which the half log-SNR is `lams`, whose ends are `start` and `end` to the last digit."""
    if not np.all(np.isfinite(lams)):
        raise ValueError(
            f"This grid is laid in log(alpha/sigma), which is infinite at t = {start:g} or t = {end:g} of {type(process).__name__}: "
            "give a t_start with alpha > 0 and a t_end with sigma > 0."
        )
    return np.concatenate([[start], process.t_of_lam(lams[1:-1]), [end]])


def warped(start: float, end: float, steps: int, rho: float) -> np.ndarray:
    """steps + 1 numbers from start to end, uniform in their rho-th root; the ends are exact."""
    values = np.linspace(start ** (1 / rho), end ** (1 / rho), steps + 1) ** rho
    values[0], values[-1] = start, end
    return values
