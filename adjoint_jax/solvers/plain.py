"""Runge-Kutta methods on dx/dt itself, in the process's own x and t: no part of the ODE is solved exactly.

The prediction p of any kind makes dx/dt linear in x and p, and with a tableau (a, b, c)

    F(x, t) = alpha' x0 + sigma' eps = A(t) x + B(t) p,                                                             (1)
    x_i = x + h sum_j a_ij F(x_j, t_j),    x_1 = x + h sum_j b_j F(x_j, t_j),    t_j = t_0 + c_j h.                    (2)

A network that predicts the flow has A = 0, B = 1: Euler's step is x + h p, safe at alpha = 0 and sigma = 0. A step into sigma = 0 is
Euler's, since few networks are defined there.
"""

from typing import Any

import diffrax
import numpy as np

from .._numerics import broadcasting, namespace
from ..networks import conversions
from ..processes import AbstractProcess
from ..splitting import Level, level
from .linear import AbstractLinear, Pattern, Row
from .singlestep import tableau_of


def velocity(prediction: str, at: Level) -> tuple[Any, Any]:
    """(A, B) of (1)."""
    xp = namespace(at.alpha)
    if prediction == "flow":
        return xp.zeros_like(at.alpha), xp.ones_like(at.alpha)
    x0, eps = conversions(prediction, at)
    parts = [_product(at.alpha_rate, part) for part in x0], [_product(at.sigma_rate, part) for part in eps]
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def _product(rate: Any, part: Any) -> Any:
    """rate * part, and 0 where the rate is: x0 may not be determined where it does not enter."""
    xp = namespace(part)
    return rate * xp.where(rate == 0, 0, part)


class PlainRK(AbstractLinear):
    """An explicit Runge-Kutta solver of diffrax on dx/dt in (x, t), equation (2), the solver's own order; one evaluation a stage.

    `PlainRK(diffrax.Euler())` with a flow prediction is flow matching's x + h v; on `aj.EDM` it is `aj.DDIM()`. Where the ODE is stiff
    (variance-preserving processes near the data) `aj.ExponentialRK` needs far fewer steps.

    Args:
        solver: `diffrax.Euler()`, `diffrax.Heun()` or any other explicit Runge-Kutta solver; its public tableau is read.
    Raises:
        TypeError: for a solver without an explicit tableau.
    Reference: Karras et al. (2022), algorithm 1 with a schedule and a scaling of one's own.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.PlainRK(diffrax.Heun()))
    """

    solver: diffrax.AbstractSolver

    def __init__(self, solver: diffrax.AbstractSolver):
        tableau_of(solver)
        self.solver = solver

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def pattern(self) -> Pattern:
        return tableau_of(self.solver).pattern

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, tableau, t0 = namespace(nodes), tableau_of(self.solver), nodes[..., 0]
        h, one = t_end - t0, xp.ones_like(t0)
        euler = process.sigma(t_end) == 0
        times = xp.stack([xp.where(euler, t0, t_end if c == 1 else t0 + float(c) * h) for c in tableau.c], axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_x, of_p = velocity(prediction, level(process, times))

        def weigh(first: Any, coefficients: np.ndarray, instead: Any) -> Any:
            return xp.stack([first, *(xp.where(euler, instead if j == 0 else 0, float(a) * h) for j, a in enumerate(coefficients))], axis=-1)

        return Row(
            times=times,
            of_x=of_x,
            of_p=of_p,
            reads=(None, *(weigh(one, tableau.a[i, :i], 0) for i in range(1, len(tableau.b)))),
            x=weigh(one, tableau.b, h),
            registers={},
            error=weigh(0 * one, tableau.b_error, 0) if tableau.b_error.any() else None,
            active=xp.stack([~euler | (i == 0) for i in range(len(tableau.b))], axis=-1),
        )
