"""Many schedules of one length, sampled by one compiled program: their weights and times are data."""

from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import numpy as np

from .. import grids
from .._types import Args, State
from ..adjoints._computation import Computation, run_direct
from ..processes import AbstractProcess
from ..sample import prepare
from ..solvers import Schedule, Scheduled
from ..solvers._base import as_dtype
from ..terms import DiffusionTerm


class Program:
    """The sampler of all schedules of `steps` steps for one term, batch and arguments; `start` is a grid of as many steps."""

    def __init__(self, term: DiffusionTerm, x_T: State, args: Args, start: np.ndarray, steps: int):
        self.laid_out = prepare(term, x_T, args, start, Scheduled(Schedule((1,) * steps, 1.0), wide=True), None, None, False)

    def table(self, schedule: Schedule) -> tuple[np.ndarray, Any]:
        """Times and rows in float64. Raises ValueError for a splitting that cannot start or end there, or a variable that it does not have."""
        term, ts = self.laid_out.term, np.asarray(schedule.times)
        return ts, Scheduled(schedule, wide=True).table(term.process, term.prediction, ts)

    def along(self, ts: np.ndarray, rows: Any) -> Computation:
        return eqx.tree_at(lambda c: (c.ts, c.rows), self.laid_out, (ts, as_dtype(rows, self.laid_out.x.dtype)))


def follow(term: DiffusionTerm, x_T: State, args: Args, schedules: Iterable[Schedule]) -> Iterator[State | None]:
    """x_0 of each schedule, or None for one that its process does not allow. Raises ValueError unless all have times and one length.

    The values are those of `aj.sample(term, x_T, args, grid=schedule.times, solver=schedule)`, without compiling anew for each.

        samples = aj.search.follow(term, x_T, args, aj.search.usual(process, grid, steps=8).values())
    """
    program, steps = None, None
    for schedule in schedules:
        steps = schedule.steps if steps is None else steps
        if schedule.times is None or schedule.steps != steps:
            raise ValueError(
                f"follow: a schedule of {schedule.steps} steps, times {schedule.times}; give schedules of {steps} steps with their times."
            )
        try:
            program = program or Program(term, x_T, args, np.asarray(schedule.times), schedule.steps)
            computation = program.along(*program.table(schedule))
        except ValueError:
            yield None
        else:
            yield _end(computation)


@eqx.filter_jit
def _end(computation: Computation) -> State:
    return run_direct(computation)[0]


def distances(x: Any, reference: Any) -> np.ndarray:
    """||x_b - r_b|| / ||r_b|| of each image of a batch, in float64."""
    away, size = (np.linalg.norm(np.asarray(part, np.float64).reshape(len(part), -1), axis=1) for part in (x - reference, reference))
    return away / size


def fine_grid(process: AbstractProcess, steps: int, t_start: float | None = None, t_end: float | None = None) -> np.ndarray:
    """A grid uniform in log(alpha/sigma) for `search_schedule`; where alpha = 0 at its start, after one step off it."""
    start = float(process.span[0]) if t_start is None else t_start
    if np.isfinite(process.lam(start)):
        return grids.log_snr(process, steps, t_start=start, t_end=t_end)
    return np.append(start, grids.log_snr(process, steps - 1, t_start=start - 1e-3, t_end=t_end))
