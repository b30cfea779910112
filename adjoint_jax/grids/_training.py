"""Grids of training steps for `VPDiscrete`, and the times that references hand a network trained on them.

Nodes are training steps, from t_start down to 0, whole by the rule of each reference. `final` says how they end (`_base`):
`sigma_min` at t = 0, `append_zero` at the clean end t = -1 behind t = 0, `replace_by_zero` at t = -1 in place of it. The first is the
rule of diffusers' DEIS, the second of its DDIM, Euler and Heun, the third of its DPM-Solver and UniPC. Where a t_end is given, the last time is that.

A process here has log alpha linear between training steps. diffusers has sigma/alpha linear from time to level, and log(sigma/alpha) linear from
level to time (`between`); the two are no inverses of each other, and differ from ours between the steps only:

    rho(t) = interp(t; k, rho_k),      t(rho) = interp(log rho; log rho_k, k),      rho = sigma/alpha.                         (1)
"""

from typing import Literal

import numpy as np

from ..processes import AbstractProcess, FlowMatching, VPDiscrete
from ._base import Final, Grid, check, known_final, whole_steps

Between = Literal["sigma", "log_sigma"]
FLOW_STEPS = 1000  # diffusers' num_train_timesteps of a flow


def linspace(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "append_zero") -> Grid:
    """Whole training steps nearest to even spacing from t_start to 0, halves to the even one (diffusers' "linspace")."""
    start = _start(process, "linspace", steps, t_start)
    nodes = _nodes(steps, final)
    # Upwards and turned round, as there: at a half, rounding error decides.
    return _finish(process, np.round(np.linspace(0, start, nodes))[::-1] if nodes > 1 else np.array([start]), t_end, final)


def leading(
    process: AbstractProcess,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    final: Final = "append_zero",
    offset: int = 0,
) -> Grid:
    """Multiples of floor(T / nodes) plus `offset` (diffusers' "leading"); the final time has no offset."""
    start = _start(process, "leading", steps, t_start)
    nodes = _nodes(steps, final)
    ts = np.arange(nodes)[::-1] * (int(start + 1) // nodes) + float(offset)
    return _finish(process, ts, t_end, final)


def trailing(process: AbstractProcess, steps: int, *, t_start: float | None = None, t_end: float | None = None, final: Final = "append_zero") -> Grid:
    """Training steps counted back from t_start in equal strides, which end at t = -1 (diffusers' "trailing")."""
    start = _start(process, "trailing", steps, t_start)
    known_final(final)
    # arange as there, for the same halves; for 61 and other numbers of steps it makes one node too many, at t = -1, which is left out here.
    ts = np.round(np.arange(start + 1, 0, -(start + 1) / steps))[:steps] - 1
    return check(process, np.append(ts, _last(t_end, final)))


def model_times(
    process: AbstractProcess,
    ts: Grid,
    *,
    between: Between = "log_sigma",
    rounding: Literal["round", "truncate"] | None = None,
    single: bool = False,
) -> Grid:
    """The training steps that a reference hands its network for the levels of a grid: not `ts` itself wherever it interpolates or rounds.

    Args:
        process: `VPDiscrete`, or `FlowMatching` for 1000 t.
        ts: a grid or some of its times.
        between: the quantity that is linear between training steps, (1).
        rounding: "round", halves to the even number (diffusers' Karras and lam spacings); "truncate" (its exponential, beta and flow spacings, and
            Karras and lam of DPM-Solver with the cosine table); None (its Euler and Heun).
        single: (1) on a float32 table of logarithms, as diffusers ships it (all but its lam spacing): the first time may then lie below T - 1
            by rounding error, and be truncated to T - 2.
    Returns:
        as many times as `ts`, each within the table.
    Raises:
        ValueError: for another process, or another name.
    Example:
        ts = aj.grids.karras(process, 20, final="append_zero")
        told = aj.grids.model_times(process, ts[:-1], rounding="round")
    """
    if rounding not in (None, "round", "truncate"):
        raise ValueError(f"rounding={rounding!r} is not known: use 'round', 'truncate' or None.")
    if isinstance(process, FlowMatching):
        times = FLOW_STEPS * ts
    else:
        steps, known = _table(process, between, "model_times")
        levels = _level(process, ts, between)
        if single and between == "log_sigma":  # the table's logarithm is taken in float32, that of a level in float64
            known, levels = (np.log(np.float64(np.float32(np.exp(values)))) for values in (known, levels))
            known = np.float32(known)
        times = np.interp(levels, known, steps)
    return {None: np.asarray, "round": np.round, "truncate": np.trunc}[rounding](times)


def at_model_times(process: AbstractProcess, times: np.ndarray, *, between: Between = "sigma") -> Grid:
    """The times of the process at which its level is the one that a reference gives to fractional training steps: inverse of `model_times`.

    Example:
        ts = aj.grids.at_model_times(process, aj.grids.uniform(process, 19))  # diffusers' EulerDiscreteScheduler, 20 steps, before its zero
    """
    steps, known = _table(process, between, "at_model_times")
    level = np.interp(np.asarray(times, np.float64), steps, known)
    return process.t_of_lam(-np.log(level) if between == "sigma" else -level)


def _level(process: AbstractProcess, ts: np.ndarray, between: str) -> np.ndarray:
    """The quantity of (1) at `ts`."""
    with np.errstate(divide="ignore"):
        return np.exp(-process.lam(ts)) if between == "sigma" else -process.lam(ts)


def _table(process: AbstractProcess, between: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The training steps, and at each the quantity that is linear between them."""
    if between not in ("sigma", "log_sigma"):
        raise ValueError(f"between={between!r} is not known: use 'sigma' or 'log_sigma'.")
    steps = np.arange(_discrete(process, name) + 1)
    return steps, _level(process, steps, between)


def _discrete(process: AbstractProcess, name: str) -> float:
    if not isinstance(process, VPDiscrete):
        raise ValueError(f"grids.{name} counts training steps and needs a VPDiscrete process; got {type(process).__name__}: use grids.uniform.")
    return process.range[1]


def _start(process: AbstractProcess, name: str, steps: int, t_start: float | None) -> float:
    last = _discrete(process, name)
    whole_steps(steps)
    return last if t_start is None else float(t_start)


def _nodes(steps: int, final: str) -> int:
    known_final(final)
    return steps if final == "append_zero" else steps + 1


def _last(t_end: float | None, final: str) -> float:
    return float(t_end) if t_end is not None else 0.0 if final == "sigma_min" else -1.0


def _finish(process: AbstractProcess, nodes: np.ndarray, t_end: float | None, final: str) -> Grid:
    kept = nodes if final == "append_zero" else nodes[:-1]
    return check(process, np.append(kept, _last(t_end, final)))
