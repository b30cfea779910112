"""Rex: any explicit exponential Runge-Kutta method, coupled with its own backward step so that the pair is a bijection.

With k the scale m of a splitting and Psi_h(X) the sum over stages of a step of length h in u from X (`adjoint_jax.solvers.singlestep`,
equation (1): the step is (k_1/k_0) X + k_1 Psi_h(X)), from u_0 to u_1 = u_0 + h,

    X_1  = (k_1/k_0) (zeta X_0 + (1 - zeta) Y_0) + k_1 Psi_h(u_0, Y_0)                                             (1)
    Y_1  = (k_1/k_0) Y_0 - k_1 Psi_{-h}(u_1, X_1)                                                               (2)

and, solved backwards,

    Y_0  = (k_0/k_1) Y_1 + k_0 Psi_{-h}(u_1, X_1)                                                               (3)
    X_0  = (k_0/k_1) X_1 / zeta + (1 - 1/zeta) Y_0 - (k_0/zeta) Psi_h(u_0, Y_0).                                   (4)
"""

from typing import Any

import diffrax
import equinox as eqx
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting
from .linear import Pattern, Row
from .paired import AbstractInvertible
from .singlestep import rows as exponential_rows, tableau_of


class Rex(AbstractInvertible):
    """Equations (1), (2), the McCallum-Foster coupling of an explicit Runge-Kutta solver: the solver's order, twice its evaluations.

    The inverse divides by zeta once a step. The coupling is weakly stable: with Euler in data form the two chains part on fine grids (its
    error grows again from 160 to 320 steps); midpoint and better have their order there. The ODE form; the SDE form is not part of this version.

    Args:
        solver: `diffrax.Euler()`, `diffrax.Midpoint()`, `diffrax.Dopri5()` or any other explicit Runge-Kutta solver.
        zeta: coupling of the two chains, above 0 and at most 1.
        sigma_data: 0 (data form, on x0), infinity (noise form, on eps), a positive number, or an array that broadcasts against the
            trailing axes of x. A step into sigma = 0 can be undone for sigma_data > 0 only.
    Raises:
        TypeError: for a solver without an explicit tableau.
        ValueError: for another zeta or sigma_data.
    Reference: Blasingame & Liu, Rex: a family of reversible exponential (stochastic) Runge-Kutta solvers (2025); McCallum & Foster,
        Efficient, accurate and stable gradients for neural ODEs (2024).

        pair = aj.invert(term, x_0, args, grid=ts, solver=aj.Rex(diffrax.Midpoint()))
        aj.sample(term, pair, args, grid=ts, solver=aj.Rex(diffrax.Midpoint())).x      # x_0
    """

    solver: diffrax.AbstractSolver
    zeta: float = eqx.field(static=True)
    splitting: Splitting

    def __init__(self, solver: Any = None, zeta: float = 0.999, sigma_data: Any = 0.0):
        if not 0 < zeta <= 1:
            raise ValueError(f"Rex's zeta is above 0 and at most 1; got {zeta!r}.")
        self.solver, self.zeta, self.splitting = diffrax.Midpoint() if solver is None else solver, float(zeta), Splitting(sigma_data)
        tableau_of(self.solver)

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def pattern(self) -> Pattern:
        return self._pattern("aux", "x")

    @property
    def inverse_pattern(self) -> Pattern:
        return self._pattern("x", "aux")

    def _pattern(self, one: str, two: str) -> Pattern:
        """Stages 0 .. S-1 step from `one`, which gives the new `two`; the rest from that, which gives the new `one`."""
        s = len(tableau_of(self.solver).b)
        stages = [f"F{j}" for j in range(2 * s)]
        first = [one, *((one, *stages[:j]) for j in range(1, s))]
        further = [(two, one, *stages[: s + j]) for j in range(s)]
        new_two, new_one = (two, one, *stages[:s]), (two, one, *stages)
        x, aux = (new_two, new_one) if two == "x" else (new_one, new_two)
        return Pattern((*first, *further), x, {"aux": aux}, copies=("aux",))

    def use(self, valid: Any, steps: int) -> Any:
        return valid

    def inverse_use(self, valid: Any, steps: int) -> Any:
        return valid

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        ahead, back = self._steps(process, prediction, nodes[..., 0], t_end)
        ratio, *ahead_sum = self._parts(ahead)
        _, *back_sum = self._parts(back)
        x = [self.zeta * ratio, (1 - self.zeta) * ratio, *ahead_sum]  # (1)
        aux = [0 * ratio, ratio, *[0 * part for part in ahead_sum], *[-ratio * part for part in back_sum]]  # (2)
        return self._row(ahead, back, x, x, aux)

    @broadcasting
    def inverse_rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        ahead, back = self._steps(process, prediction, t_end, nodes[..., 0])
        ratio, *ahead_sum = self._parts(ahead)
        _, *back_sum = self._parts(back)
        with np.errstate(divide="ignore", invalid="ignore"):
            grown = 1 / ratio
            aux = [grown, 0 * ratio, *back_sum]  # (3), of (aux, x, F...)
            x = [(1 - 1 / self.zeta) * part for part in aux]
            x[1] = x[1] + grown / self.zeta
            x = x + [-grown / self.zeta * part for part in ahead_sum]  # (4)
            return self._row(back, ahead, aux, x, aux)

    def _steps(self, process: AbstractProcess, prediction: str, t0: Any, t1: Any) -> tuple[Row, Row]:
        """The steps of the solver from t0 to t1 and back."""
        tableau = tableau_of(self.solver)
        step = lambda *ends: exponential_rows(self.splitting, tableau, process, prediction, *ends)  # noqa: E731
        return step(t0, t1), step(t1, t0)

    def _parts(self, row: Row) -> list[Any]:
        """The weights of x and of the stages at the end of a step."""
        c = self.splitting.ndim
        return [row.x[(..., k, *(slice(None),) * c)] for k in range(row.x.shape[-1 - c])]

    def _row(self, first: Row, second: Row, start: list[Any], x: list[Any], aux: list[Any]) -> Row:
        """`start`: the weights of the state from which the second step goes."""
        xp, c = namespace(first.x), self.splitting.ndim
        tail = -1 - c
        reads = [xp.stack(start, axis=tail)]
        for weights in second.reads[1:]:
            of_start, *of_stages = (weights[(..., k, *(slice(None),) * c)] for k in range(weights.shape[tail]))
            reads.append(xp.stack([*(of_start * part for part in start), *of_stages], axis=tail))
        return Row(
            times=xp.concatenate([first.times, second.times], axis=-1),
            of_x=xp.concatenate([first.of_x, second.of_x], axis=tail),
            of_p=xp.concatenate([first.of_p, second.of_p], axis=tail),
            reads=(*first.reads, *reads),
            x=xp.stack(x, axis=tail),
            registers={"aux": xp.stack(aux, axis=tail)},
            active=xp.concatenate([first.active, second.active], axis=-1),
        )
