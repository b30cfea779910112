"""A one-step solver whose steps end, or draw, as they are told.

Schedulers on a training table go from step t_i to t_i - floor(T / N), whatever the next t_{i+1} is: where the two differ, the state is at
one time and is taken to be at another. DDPM's larger variance is DDIM's step (eta = 1) with more noise than its mean allows for.
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting
from ..processes import AbstractProcess
from .linear import AbstractLinear, Pattern, Row


class Prescribed(AbstractLinear):
    """A one-step solver whose step i goes from ts[i] to `ends[i]`, to be taken for the state at ts[i + 1].

    Order and cost are the solver's where the two are equal.

    Args:
        solver: a solver without memory.
        ends: `[steps]` times at which the steps end; None for those of the grid.
        noise: `[steps]` weights of the noise, in units of x, in place of the solver's own, of which there is one draw a step; None for these.
    Raises:
        TypeError: for a solver with memory.
        ValueError: on a grid with another number of steps, and in `diffeqsolve`, which does not count steps.

        aj.sample(term, x_T, args, grid=[900.0, 450.0, -1.0], solver=aj.solvers.Prescribed(aj.DDIM(), ends=(400.0, -1.0)))
    """

    solver: AbstractLinear
    ends: tuple[float, ...] | None = eqx.field(static=True)
    noise: tuple[float, ...] | None = eqx.field(static=True)

    def __init__(self, solver: AbstractLinear, ends: Any = None, noise: Any = None):
        if not isinstance(solver, AbstractLinear) or solver.window != 1 or solver.pattern.registers:
            raise TypeError(f"Prescribed takes a solver without memory such as aj.DDIM(); got {type(solver).__name__}.")
        if noise is not None and solver.draws != 1:
            raise TypeError(f"Prescribed noise takes the place of one draw a step; {type(solver).__name__} has {solver.draws}.")
        self.solver = solver
        self.ends, self.noise = (None if part is None else tuple(float(each) for each in part) for part in (ends, noise))

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def tau(self) -> float | None:
        return self.solver.tau

    @property
    def pattern(self) -> Pattern:
        return self.solver.pattern._replace(counted=True)

    def use(self, valid: Any, steps: int) -> Any:
        for given in (self.ends, self.noise):
            if given is not None and len(given) != steps:
                raise ValueError(f"One prescribed end or noise a step: got {len(given)} for {steps} steps.")
        return self.solver.use(valid, steps)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        t_end = t_end if self.ends is None else t_end * 0 + np.asarray(self.ends, nodes.dtype)
        row = self.solver.rows(process, prediction, nodes, t_end, valid)
        if self.noise is None:
            return row
        c = row.x.ndim - nodes.ndim
        weights = np.asarray(self.noise, nodes.dtype).reshape(-1, *(1,) * (c + 1))
        drawn = np.asarray([name == "z0" for name in self.pattern.x]).reshape(-1, *(1,) * c)
        return row._replace(x=row.x * ~drawn + weights * drawn)
