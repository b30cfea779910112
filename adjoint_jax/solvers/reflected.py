"""A solver that stays in a box: each step is followed by a reflection at its walls.

    x_{i+1} = reflect(step(x_i, history_i))                                                                       (1)

The reflection is not linear, so that all of the history has to be stored to transpose a step; its derivative is +1 or -1.
"""

from typing import Any

import diffrax

from .._reflect import reflect
from .._types import Args, State
from ..processes import AbstractProcess
from ._base import AbstractSampler
from .singlestep import ExponentialRK


class Reflected(AbstractSampler):
    """Equation (1): a solver whose states are folded back into the box [low, high], for data that live there.

    The order is the solver's where no state leaves the box; a multistep method's past slopes know nothing of a reflection. Exact
    adjoints store a multistep method's history at every step; continuous adjoints do not know the reflection and raise.

    Args:
        solver: any solver of `aj.solvers` but the exactly invertible ones, or a bare explicit diffrax one.
        low, high: the walls, numbers or arrays of x's rank; differentiable.
    Raises:
        TypeError: for a solver that carries a second state, which a reflection would make impossible to invert.
    Reference: Lou & Ermon, Reflected diffusion models (2023).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.Reflected(aj.DDIM(), -1.0, 1.0))
    """

    solver: AbstractSampler
    low: Any
    high: Any

    def __init__(self, solver: Any, low: Any = -1.0, high: Any = 1.0):
        if isinstance(solver, diffrax.AbstractERK | diffrax.Euler):
            solver = ExponentialRK(solver)
        if not isinstance(solver, AbstractSampler) or not solver.follows_ode:
            raise TypeError(f"Reflected takes a solver of aj.solvers that carries no second state; got {type(solver).__name__}.")
        self.solver, self.low, self.high = solver, low, high

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def draws(self) -> int:
        return self.solver.draws

    @property
    def follows_ode(self) -> bool:
        return False

    def table(self, process: AbstractProcess, prediction: str, ts: Any) -> Any:
        return self.solver.table(process, prediction, ts)

    def init(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args) -> Any:
        return self.solver.init(terms, t0, t1, y0, args)

    def step(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args, solver_state: Any, made_jump: Any) -> tuple:
        y1, error, _, state, result = self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)
        y1 = reflect(y1, self.low, self.high)
        return y1, error, {"y0": y0, "y1": y1}, state, result

    def remember(self, x: State, state: Any) -> Any:
        return x, state

    def recall(self, memory: Any, state: Any) -> tuple[State, Any]:
        return memory
