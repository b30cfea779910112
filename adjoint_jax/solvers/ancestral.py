"""Noise around a deterministic step: before it (churn) or after it (ancestral sampling).

In rho = sigma/alpha, where a step s -> t of any one-step solver runs from rho_s to rho_t:

    churn       x at rho_s is first noised to (1 + g) rho_s:  + alpha sqrt((1 + g)^2 - 1) rho_s S z, then stepped to rho_t      (1)
    ancestral   x is stepped to rho_d and noised to rho_t:    + alpha_t u z,   u = min(rho_t, eta rho_t sqrt(rho_s^2 - rho_t^2)/rho_s),
                rho_d^2 = rho_t^2 - u^2                                                                             (2)

A solver's row is changed, not the solver: noise enters the sums as one more value, so that these are exact in every adjoint.
"""

from typing import Any

import diffrax
import equinox as eqx
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .ddim import checked_eta, split
from .linear import AbstractLinear, Pattern, Row, Sum
from .singlestep import ExponentialRK
from .step import output


class _Around(AbstractLinear):
    """A one-step deterministic solver whose rows are changed."""

    solver: eqx.AbstractVar[AbstractLinear]

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    def use(self, valid: Any, steps: int) -> Any:
        return self.solver.use(valid, steps)


def _checked(solver: Any, name: str) -> AbstractLinear:
    solver = ExponentialRK(solver) if isinstance(solver, diffrax.AbstractERK | diffrax.Euler) else solver
    if not isinstance(solver, AbstractLinear) or solver.window != 1 or solver.pattern.registers or solver.draws:
        raise TypeError(f"{name} takes a deterministic one-step solver such as aj.DDIM() or aj.ExponentialRK(...); got {type(solver).__name__}.")
    return solver


class Churn(_Around):
    """A one-step solver on a state that is first noised a little, (1): order and cost of the solver, one draw a step.

    Args:
        solver: `aj.DDIM()` is k-diffusion's Euler, `diffrax.Heun()`, which stands for `aj.ExponentialRK(diffrax.Heun())`, EDM's sampler.
        s_churn: S_churn/N, the g of (1) before its cap at sqrt(2) - 1; N is the number of steps, so this is `S_churn / N`.
        s_min, s_max: the range of rho in which a step is churned.
        s_noise: S of (1).
    Raises:
        TypeError: for a solver with memory or noise of its own.
        ValueError: for a negative s_churn.
    Reference: Karras et al. (2022), algorithm 2.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.Churn(diffrax.Heun(), s_churn=40 / 18), key=key)
    """

    solver: AbstractLinear
    s_churn: float = eqx.field(static=True)
    s_min: float = eqx.field(static=True)
    s_max: float = eqx.field(static=True)
    s_noise: float = eqx.field(static=True)

    def __init__(self, solver: Any, s_churn: float, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0):
        if s_churn < 0:
            raise ValueError(f"s_churn is at least 0; got {s_churn!r}.")
        self.solver, self.s_churn, self.s_noise = _checked(solver, "Churn"), float(s_churn), float(s_noise)
        self.s_min, self.s_max = float(s_min), float(s_max)

    @property
    def pattern(self) -> Pattern:
        base = self.solver.pattern
        return Pattern(tuple(_with_noise(what) for what in base.reads), _with_noise(base.x), {}, draws=1)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp = namespace(nodes)
        start = level(process, nodes[..., 0])
        with np.errstate(divide="ignore", invalid="ignore"):
            rho = start.sigma / start.alpha
            g = xp.where((rho >= self.s_min) & (rho <= self.s_max), min(self.s_churn, np.sqrt(2) - 1), 0)
            t_hat = xp.where(g > 0, process.t_of_lam(start.lam - xp.log1p(g)), nodes[..., 0])
            hat = level(process, t_hat)
            row = self.solver.rows(process, prediction, t_hat[..., None], t_end, valid)
            noise = hat.alpha * rho * xp.sqrt(g * (2 + g)) * self.s_noise
        entry = [hat.alpha / start.alpha, noise]
        reads = tuple(_enter(weights, entry, nodes) for weights in row.reads)
        return row._replace(reads=reads, x=_enter(row.x, entry, nodes), error=None)


def _with_noise(what: Sum) -> Sum:
    """A sum that starts with x, with z0 behind x."""
    return ("x", "z0") if what == "x" else ("x", "z0", *what[1:])


def _enter(weights: Any, entry: list, like: Any) -> Any:
    """The weights of x, z0, F0, ... where those of x, F0, ... are given, (1)."""
    xp = namespace(like)
    entry = [part[..., None] for part in entry]
    if weights is None:
        return xp.concatenate(entry, axis=-1)
    c = weights.ndim - like.ndim
    first, rest = weights[(..., slice(0, 1), *(slice(None),) * c)], weights[(..., slice(1, None), *(slice(None),) * c)]
    return xp.concatenate([*(first * part.reshape(part.shape + (1,) * c) for part in entry), rest], axis=-1 - c)


class Ancestral(_Around):
    """A one-step solver that steps too far and is noised back, (2): one draw a step.

    `Ancestral(aj.DDIM())` is `aj.DDIM(eta)` and k-diffusion's `euler_ancestral`, `Ancestral(ExponentialStages(2))` its `dpm_2_ancestral`,
    `Ancestral(ExponentialStages(2, 0.0))` its `dpmpp_2s_ancestral`.

    Args:
        solver: a deterministic one-step solver, or a bare diffrax one.
        eta: share of the noise, 0 to 1.
        s_noise: factor of the noise.
    Raises:
        TypeError: for a solver with memory or noise of its own.
        ValueError: for another eta.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.Ancestral(aj.solvers.ExponentialStages(2)), key=key)
    """

    solver: AbstractLinear
    eta: float = eqx.field(static=True)
    s_noise: float = eqx.field(static=True)

    def __init__(self, solver: Any, eta: float = 1.0, s_noise: float = 1.0):
        self.solver, self.eta, self.s_noise = _checked(solver, "Ancestral"), checked_eta(eta, "Ancestral"), float(s_noise)

    @property
    def tau(self) -> float | None:
        return self.eta  # as DDIM's

    @property
    def pattern(self) -> Pattern:
        base = self.solver.pattern
        x = (*((base.x,) if isinstance(base.x, str) else base.x), "z0")
        return Pattern(base.reads, x, {}, draws=1)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp = namespace(nodes)
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            down, up = split(start.sigma / start.alpha, end.sigma / end.alpha, self.eta)
            t_down = xp.where(down > 0, process.t_of_lam(-xp.log(xp.where(down > 0, down, 1))), t_end)
            row = self.solver.rows(process, prediction, nodes, t_down, valid)
            back = end.alpha / process.alpha(t_down)
        c = row.x.ndim - nodes.ndim
        wide = lambda part: part.reshape(part.shape + (1,) * (c + 1))  # noqa: E731
        noise = xp.broadcast_to(wide(end.alpha * up * self.s_noise), (*up.shape, 1, *row.x.shape[row.x.ndim - c :]))
        return row._replace(x=xp.concatenate([row.x * wide(back), noise], axis=-1 - c), error=None)


class DPMSolverPPSDE(AbstractLinear):
    """k-diffusion's DPM-Solver++ (stochastic): two evaluations and two draws a step, on x0.

    With r = 1/2 in lam, X_1 is an ancestral first-order step s -> s_1, and the end an ancestral step s -> t with x0(X_1) in place of x0(x). The
    two draws are independent here, so that the pair is not one Brownian path: the drift has order 1.

    Args:
        eta: share of the noise, 0 to 1.
        s_noise: factor of the noise.
    Raises:
        ValueError: for another eta.
    Reference: k-diffusion's `sample_dpmpp_sde`.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.DPMSolverPPSDE(), key=key)
    """

    splitting: Splitting
    eta: float = eqx.field(static=True)
    s_noise: float = eqx.field(static=True)

    def __init__(self, eta: float = 1.0, s_noise: float = 1.0):
        self.splitting, self.eta, self.s_noise = Splitting(0.0), checked_eta(eta, "DPMSolverPPSDE"), float(s_noise)

    def order(self, terms: Any) -> int:
        return 1

    @property
    def tau(self) -> float | None:
        return self.eta

    @property
    def pattern(self) -> Pattern:
        return Pattern(("x", ("x", "F0", "z0")), ("x", "F0", "F1", "z1"), {}, draws=2)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp = namespace(nodes)
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            euler = xp.isposinf(end.lam)
            t_mid = process.t_of_lam(xp.where(euler, start.lam, (start.lam + xp.where(euler, 0, end.lam)) / 2))
            mid = level(process, t_mid)
            first, last = (self._step(start, at) for at in (mid, end))
            fields = [output(self.splitting, prediction, at) for at in (start, mid)]
        x = xp.stack([last[0], xp.where(euler, last[1], 0), xp.where(euler, 0, last[1]), last[2]], axis=-1)
        of_x, of_p = (xp.stack([field[k] for field in fields], axis=-1) for k in range(2))
        times, active = xp.stack([nodes[..., 0], t_mid], axis=-1), xp.stack([xp.ones_like(euler), ~euler], axis=-1)
        return Row(times, of_x, of_p, (None, xp.stack(first, axis=-1)), x, {}, active=active)

    def _step(self, start: Any, end: Any) -> tuple[Any, Any, Any]:
        """The weights of x, x0 and z in an ancestral step of first order."""
        down, up = split(start.sigma / start.alpha, end.sigma / end.alpha, self.eta)
        kept = down / (start.sigma / start.alpha)
        return end.alpha / start.alpha * kept, end.alpha * (1 - kept), end.alpha * up * self.s_noise


def EDMHeun(s_churn: float = 0.0, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0) -> AbstractLinear:
    """EDM's sampler: Heun in rho = sigma/alpha, order 2, two evaluations a step but one into sigma = 0; churned, (1), where s_churn > 0.

    The solver is `aj.ExponentialRK(diffrax.Heun())`, or `Churn` around it.

    Args:
        s_churn, s_min, s_max, s_noise: as `Churn`; s_churn is S_churn / N.
    Raises:
        ValueError: for a negative s_churn.
    Reference: Karras et al. (2022), algorithms 1 and 2.

        aj.sample(term, x_T, args, grid=aj.grids.edm(process, 18), solver=aj.EDMHeun())
    """
    heun = ExponentialRK(diffrax.Heun())
    return Churn(heun, s_churn, s_min, s_max, s_noise) if s_churn else heun
