"""Align Your Steps (Sabour et al. 2024): noise levels sigma/alpha found by optimising a bound, for three families of models.

Ten levels each; for another number of steps their logarithms are interpolated linearly.
"""

import numpy as np

from ..processes import AbstractProcess
from ._base import Final, Grid, check, clean_end, known_final, whole_steps

LEVELS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
"""Levels of Stable Diffusion 1.5, Stable Diffusion XL and Stable Video Diffusion, without the zero behind them."""
TRAINING_STEPS = {
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
"""The same as training steps of the scaled-linear betas, for use as a grid: `np.append(TRAINING_STEPS["sd15"], -1.0)`."""


def ays(
    process: AbstractProcess,
    steps: int = 10,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    final: Final = "append_zero",
    family: str = "sd15",
) -> Grid:
    """The levels of a family, log-linear between them: 10 steps of "append_zero" are the published table.

    Args:
        t_start, t_end: replace the first and the last time of the table; a level beyond the process's range is taken at its end.
        family: "sd15", "sdxl" or "svd".
    Raises:
        ValueError: for another family; where the times do not decrease.
    Reference:
        Sabour et al. 2024.
    Example:
        ts = aj.grids.ays(process, 10, family="sdxl")
    """
    whole_steps(steps)
    known_final(final)
    if family not in LEVELS:
        raise ValueError(f"family={family!r} has no Align Your Steps table: use one of {', '.join(LEVELS)}.")
    nodes = steps if final == "append_zero" else steps + 1
    logs = np.log(LEVELS[family])
    ts = process.t_of_lam(-np.interp(np.linspace(0, len(logs) - 1, nodes), np.arange(len(logs)), logs))
    ts = np.clip(ts, float(process.range[0]), float(process.range[1]))
    ts[0] = ts[0] if t_start is None else float(t_start)
    ts[-1] = ts[-1] if t_end is None else float(t_end)
    if final == "sigma_min":
        return check(process, ts)
    kept = ts if final == "append_zero" else ts[:-1]
    return check(process, np.append(kept, clean_end(process, final)))
