"""Any explicit Runge-Kutta method in the splitting's own variable is an exponential Runge-Kutta method in x.

With z = x/m, dz/du = F, stage times t_i at u_0 + c_i (u_1 - u_0), and the tableau (a, b, c):

    x_i = (m_i/m_0) x + m_i (u_1 - u_0) sum_j a_ij F_j,    x_1 = (m_1/m_0) x + m_1 (u_1 - u_0) sum_j b_j F_j.          (1)

sigma_data infinite is rhoRK-DEIS; Heun there is EDM's sampler. For an array of sigma_data the stages share their times: u is the
angle of the geometric mean c_r, and F_j is multiplied by

    d theta_c / d theta_r = (c/c_r) (c_r^2 alpha^2 + sigma^2) / (c^2 alpha^2 + sigma^2).                                (2)

A step into sigma = 0 is Euler's, since no stage can be evaluated there.
"""

from typing import Any, NamedTuple

import diffrax
import numpy as np

from .._numerics import broadcasting, floating, namespace, trailing
from ..processes import AbstractProcess
from ..splitting import Level, Splitting, level
from .linear import AbstractLinear, Pattern, Row
from .step import output


class Tableau(NamedTuple):
    """An explicit Butcher tableau, the first stage written out: a `[s, s]`, b and b_error `[s]`, c `[s]`."""

    a: np.ndarray
    b: np.ndarray
    b_error: np.ndarray
    c: np.ndarray

    @property
    def pattern(self) -> Pattern:
        """x and the stages before it enter each stage, x and all stages the end, whatever the variable of integration."""
        values = ("x", *(f"F{s}" for s in range(len(self.b))))
        reads = ("x", *(values[: s + 1] for s in range(1, len(self.b))))
        return Pattern(reads, values, {}, error=values if self.b_error.any() else None)


def tableau_of(solver: diffrax.AbstractSolver) -> Tableau:
    """The tableau of an explicit stock solver. Raises TypeError for any other."""
    if isinstance(solver, diffrax.Euler):
        return Tableau(np.zeros((1, 1)), np.ones(1), np.zeros(1), np.zeros(1))
    if not isinstance(solver, diffrax.AbstractERK):
        raise TypeError(f"ExponentialRK takes an explicit Runge-Kutta solver of diffrax such as diffrax.Heun(); got {type(solver).__name__}.")
    stock: Any = solver.tableau
    b = np.asarray(stock.b_sol, np.float64)
    a = np.zeros((len(b), len(b)))
    for i, lower in enumerate(stock.a_lower):
        a[i + 1, : i + 1] = lower
    return Tableau(a, b, np.asarray(stock.b_error, np.float64), np.concatenate([[0.0], stock.c]))


def stage_time(splitting: Splitting, process: AbstractProcess, start: Level, end: Level, t0: Any, t1: Any, c: float) -> Any:
    """The time at which u has gone the fraction c of the step; for a stochastic splitting of c = 0 or infinity, du times kappa (m/alpha)^(-tau^2)."""
    if c in (0.0, 1.0):
        return t1 if c else t0
    xp = namespace(t0)
    if splitting.kind == "noise":
        first, last = start.sigma / start.alpha, end.sigma / end.alpha
        return process.t_of_lam(-xp.log(first + c * (last - first)))
    if splitting.kind == "data":
        kappa = 1 + splitting.tau**2
        first, last = (start.alpha / start.sigma) ** kappa, (end.alpha / end.sigma) ** kappa
        return process.t_of_lam(xp.log(first + c * (last - first)) / kappa)
    width = floating(splitting.sigma_data, t0)
    turned = c * splitting.angle(start, end)
    sine = start.sigma * xp.cos(turned) + width * start.alpha * xp.sin(turned)
    cosine = width * start.alpha * xp.cos(turned) - start.sigma * xp.sin(turned)
    return process.t_of_lam(xp.log(cosine) - xp.log(width * sine))


def _reference(splitting: Splitting) -> Splitting:
    """The scalar splitting whose variable the stages share."""
    if not splitting.ndim:
        return splitting
    xp = namespace(splitting.sigma_data)
    return Splitting(xp.exp(xp.mean(xp.log(splitting.sigma_data))))


def _speed(splitting: Splitting, reference: Splitting, at: Level) -> Any:
    """(2); 1 for a scalar sigma_data."""
    if not splitting.ndim:
        return namespace(at.alpha).ones_like(at.alpha)
    c, r = floating(splitting.sigma_data, at.alpha), floating(reference.sigma_data, at.alpha)
    return c / r * trailing(reference.scale(at) ** 2, splitting.ndim) / splitting.scale(at) ** 2


@broadcasting
def rows(splitting: Splitting, tableau: Tableau, process: AbstractProcess, prediction: str, t0: Any, t1: Any) -> Row:
    """The weights of steps from t0 to t1, arrays of one shape."""
    xp, s, c = namespace(t0), len(tableau.b), splitting.ndim
    reference = _reference(splitting)
    start, end = level(process, t0), level(process, t1)
    euler = xp.isposinf(end.lam)
    with np.errstate(divide="ignore", invalid="ignore"):
        times = [xp.where(euler, t0, stage_time(reference, process, start, end, t0, t1, float(ci))) for ci in tableau.c]
        at = [level(process, t) for t in times]
        outputs = [output(splitting, prediction, level_i) for level_i in at]
        speeds = [_speed(splitting, reference, level_i) for level_i in at]
        first, last, *scales = (splitting.scale(level_i) for level_i in (start, end, *at))
        length = trailing(reference.step(start, end) / reference.scale(end), c)
        euler_step = splitting.step(start, end)
    wide, tail = trailing(euler, c), -1 - c

    def weigh(ratio: Any, coefficients: np.ndarray, m: Any, instead: Any) -> Any:
        """`ratio`, then m (u_1 - u_0) times a row of the tableau; (instead, 0, ...) for Euler's step."""
        row = [xp.where(wide, 0 if j else instead, float(a) * m * length * speeds[j]) for j, a in enumerate(coefficients)]
        return xp.stack([ratio, *row], axis=tail)

    with np.errstate(divide="ignore", invalid="ignore"):
        return Row(
            times=xp.stack(times, axis=-1),
            of_x=xp.stack([of_x for of_x, _ in outputs], axis=tail),
            of_p=xp.stack([of_p for _, of_p in outputs], axis=tail),
            reads=(None, *(weigh(scales[i] / first, tableau.a[i, :i], scales[i], 0) for i in range(1, s))),
            x=weigh(last / first, tableau.b, last, euler_step),
            registers={},
            error=weigh(xp.zeros_like(last), tableau.b_error, last, 0) if tableau.b_error.any() else None,
            active=xp.stack([xp.ones_like(euler), *[~euler] * (s - 1)], axis=-1),
        )


class ExponentialRK(AbstractLinear):
    """An explicit Runge-Kutta solver of diffrax made exponential by a splitting: equation (1), the solver's own order.

    One network evaluation a stage.

    Args:
        solver: `diffrax.Euler()`, `diffrax.Heun()`, `diffrax.Tsit5()` or any other explicit Runge-Kutta solver; its public tableau is read.
        sigma_data: 0, a positive number, infinity, or an array of positive numbers that broadcasts against the trailing axes of x.
    Raises:
        TypeError: for a solver without an explicit tableau.
    Reference: Zhang & Chen (2023), rhoRK-DEIS (sigma_data infinite); Karras et al. (2022), algorithm 1 (Heun).

        aj.sample(term, x_T, args, grid=ts, solver=aj.ExponentialRK(diffrax.Heun()))
    """

    solver: diffrax.AbstractSolver
    splitting: Splitting

    def __init__(self, solver: diffrax.AbstractSolver, sigma_data: Any = np.inf):
        tableau_of(solver)
        self.solver, self.splitting = solver, Splitting(sigma_data)

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def pattern(self) -> Pattern:
        return tableau_of(self.solver).pattern

    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        return rows(self.splitting, tableau_of(self.solver), process, prediction, nodes[..., 0], t_end)
