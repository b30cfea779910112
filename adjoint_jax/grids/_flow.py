"""Shifted grids of flow matching: uniform in the time u before the shift

    s = k u / (1 + (k - 1) u),    lam(s) = lam(u) - log k,                                                                  (1)

so that large images, of which k > 1 times as much noise is needed, are given more steps near the noise. A process that is no flow has
its times at the levels sigma/alpha = s/(1 - s).
"""

from typing import Any

import numpy as np

from ..processes import AbstractProcess, FlowMatching
from ._base import Final, Grid, lay


def shift_time(u: Any, shift: float) -> Any:
    """s of (1) for k = `shift`; `shift_time(s, 1 / shift)` is its inverse. The shift of a model trained with dynamic shifting is k = exp(mu)."""
    _positive(shift)
    return shift * u / (1 + (shift - 1) * u)


def shifted(
    process: AbstractProcess,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    final: Final = "sigma_min",
    shift: float = 3.0,
    terminal: float | None = None,
) -> Grid:
    """Uniform in u of (1).

    Args:
        t_start, t_end: times after the shift; `shift_time` makes them from those before it.
        shift: k; 3 for Stable Diffusion 3, exp(mu) for dynamic shifting.
        terminal: stretch 1 - s linearly after the shift, so that the last s above sigma = 0 is this number instead of t_end's (diffusers'
            shift_terminal).
    Raises:
        ValueError: for a shift that is not positive, a terminal outside of (0, 1).
    Reference:
        Esser et al. 2024 (Stable Diffusion 3).
    Example:
        ts = aj.grids.shifted(aj.FlowMatching(), 28, shift=3.0)
    """
    _positive(shift)
    if terminal is not None and not 0 < terminal < 1:
        raise ValueError(f"terminal is a flow time between 0 and 1; got {terminal}.")

    def between(start: float, end: float, n: int) -> np.ndarray:
        first, last = _flow_time(process, start), _flow_time(process, end)
        s = shift_time(np.linspace(shift_time(first, 1 / shift), shift_time(last, 1 / shift), n + 1), shift)
        if terminal is None:
            return np.concatenate([[start], _of_flow_time(process, s[1:-1]), [end]])
        kept = s[:-1] if final == "replace_by_zero" else s  # the last of `s` is replaced then
        stretched = 1 - (1 - kept) * (1 - terminal) / (1 - kept[-1])
        return np.append(_of_flow_time(process, stretched), s[len(kept) :])

    return lay(process, steps, t_start, t_end, final, between)


def _positive(shift: float) -> None:
    if not 0 < shift < np.inf:
        raise ValueError(f"A shift must be a positive number; got {shift}.")


def _flow_time(process: AbstractProcess, t: float) -> float:
    """s with s/(1 - s) = sigma/alpha."""
    return t if isinstance(process, FlowMatching) else float(FlowMatching().t_of_lam(process.lam(t)))


def _of_flow_time(process: AbstractProcess, s: np.ndarray) -> np.ndarray:
    """The inverse of `_flow_time`."""
    return s if isinstance(process, FlowMatching) else process.t_of_lam(FlowMatching().lam(s))
