"""Exponential Runge-Kutta methods with stages in lam: DPM-Solver's singlestep methods and their stochastic forms, SEEDS.

A step s -> t of h in lam has stages at lam_s + r_j h, each reached by a multistep step (`adjoint_jax.solvers.multistep`) through the stages before:

    order 1      X_t through {s}
    order 2      X_1 through {s},  X_t through {s, 1}, "midpoint" or exactly                                      (1)
    order 3      X_1 through {s},  X_2 through {s, 1},  X_t through {s, 2} ("midpoint") or {s, 1, 2} ("heun")       (2)

The difference to the step of one order less through the same stages, x_t of (2) less that of (1), estimates the error: DPM-Solver-12 and -23.

The noise of a stochastic splitting is that of one Brownian path: n_j = (m_j/m_{j-1}) n_{j-1} + s_{j-1,j} z_j at the stages in turn, X_j + n_j.
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting, floating, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .linear import AbstractLinear, Pattern, Row
from .multistep import checked_order, orders
from .step import Step, output, weights

NODES = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}


class ExponentialStages(AbstractLinear):
    """Equations (1), (2) in any splitting: order 2 with two, order 3 with three network evaluations a step and, where tau > 0, as many draws.

    Measured order for tau = 0: 1.0, 2.0, 3.0, for sigma_data = 0, 0.7, 1 and infinite.

    Where tau = 0, orders 2 and 3 embed the order below, free of evaluations: steps under `diffrax.PIDController` in `diffeqsolve`, or
    `adaptive_grid`.

    Args:
        order: 1 to 3.
        sigma_data: infinity is DPM-Solver-2S and -3S, and with tau = 1 SEEDS-2 and -3; 0 is DPM-Solver++(2S), (3S).
        tau: stochasticity, at least 0.
        solver_type: "midpoint", the published default, or "heun".
        nodes: the r_j; by default 1/2, and 1/3 and 2/3. Or one such tuple a step.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`; a tuple is DPM-Solver-fast's pattern. Only stages that a step has are evaluated.
        inner: "exact", or "midpoint" for the second stage of order 3 as in diffusers.
    Raises:
        ValueError: for another order, splitting or rule, and for nodes that do not increase within (0, 1].
    Reference: Lu et al., DPM-Solver (2022) and DPM-Solver++ (2022); Gonzalez et al., SEEDS (2023).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.ExponentialStages(order=2, sigma_data=0.0))
    """

    splitting: Splitting
    steps_back: int = eqx.field(static=True)
    solver_type: str = eqx.field(static=True)
    nodes: tuple = eqx.field(static=True)
    lower_order_final: Any = eqx.field(static=True)
    inner: str = eqx.field(static=True)

    def __init__(
        self,
        order: int = 2,
        sigma_data: Any = np.inf,
        tau: float = 0.0,
        solver_type: str = "midpoint",
        nodes: tuple | None = None,
        lower_order_final: Any = False,
        inner: str = "exact",
    ):
        self.steps_back, self.splitting = checked_order(order, 3, "ExponentialStages"), Splitting(sigma_data, tau)
        if solver_type not in ("midpoint", "heun") or inner not in ("exact", "midpoint"):
            raise ValueError(f"solver_type is 'midpoint' or 'heun' and inner 'exact' or 'midpoint'; got {solver_type!r} and {inner!r}.")
        self.solver_type, self.inner, self.lower_order_final = solver_type, inner, lower_order_final
        self.nodes = NODES[order] if nodes is None else tuple(nodes)
        for r in self.nodes if self.nodes and isinstance(self.nodes[0], tuple) else (self.nodes,):
            if len(r) != order - 1 or not all(a < b for a, b in zip((0, *r), r, strict=False)) or max(r, default=1) > 1:
                raise ValueError(f"nodes of order {order} are {order - 1} numbers that increase within (0, 1]; got {r!r}.")

    def order(self, terms: Any) -> int:
        return self.steps_back

    @property
    def tau(self) -> float | None:
        return self.splitting.tau

    @property
    def pattern(self) -> Pattern:
        s = self.steps_back
        draws = [f"z{j}" for j in range(s)] if self.splitting.stochastic else []
        stage = lambda j: ("x", *(f"F{i}" for i in range(j)), *draws[:j])  # noqa: E731
        error = None if draws or s == 1 else stage(s)[1:]
        return Pattern(("x", *(stage(j) for j in range(1, s))), stage(s), {}, draws=len(draws), error=error)

    def use(self, valid: Any, steps: int) -> Any:
        """The order of each step and its nodes, `[steps, order]`."""
        order, given = orders(steps, self.steps_back, self.lower_order_final), self.nodes
        if not given or not isinstance(given[0], tuple):
            given = [given if o == self.steps_back else (*NODES[o], *given[o - 1 :]) for o in order]
        if len(given) != steps:
            raise ValueError(f"One tuple of nodes a step: got {len(given)} for {steps} steps.")
        return np.array([(o, *r) for o, r in zip(order, given, strict=True)], np.float64)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, splitting, c, s = namespace(nodes), self.splitting, self.splitting.ndim, self.steps_back
        t0 = nodes[..., 0]
        valid = np.asarray([s, *self.nodes]) if valid.dtype == bool else valid  # a mask in diffeqsolve, which knows no place in the grid
        known = {1, *np.unique(valid[..., 0]).astype(int).tolist()}
        valid = floating(valid, nodes)
        start, end = level(process, t0), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            h = end.lam - start.lam
            order = xp.where(xp.isfinite(h), valid[..., 0], 1)
            h = xp.where(xp.isfinite(h), h, 0)
            inner = [process.t_of_lam(xp.where(xp.isfinite(start.lam), start.lam, 0) + valid[..., j] * h) for j in range(1, s)]
            times = xp.stack([t0 + 0 * h, *(xp.where(order > j, t, t0) for j, t in enumerate(inner, 1))], axis=-1)
            at = [level(process, times[..., j]) for j in range(s)]
            reads = [self._sum(process, times, at, j, at[j], xp.where(order > j, j, 0), {j}) for j in range(1, s)]
            x = self._sum(process, times, at, s, end, order, known)
            below = {max(k - 1, 1) for k in known}
            lower = None if self.pattern.error is None else self._sum(process, times, at, s, end, xp.maximum(order - 1, 1), below)
            fields = [output(splitting, prediction, level_j) for level_j in at]
        of_x, of_p = (xp.stack([field[k] for field in fields], axis=-1 - c) for k in range(2))
        active = xp.stack([order > j for j in range(s)], axis=-1)
        error = None if lower is None else (x - lower)[(..., slice(1, None), *(slice(None),) * c)]  # x has the same weight in both
        return Row(times, of_x, of_p, (None, *reads), x, {}, error, active)

    def _sum(self, process: AbstractProcess, times: Any, at: list, j: int, end: Any, order: Any, known: set[int]) -> Any:
        """The weights of x, of F_0 .. F_{j-1} and of the draws in the state at `end`, stage j or the end of a step of `order`, one of `known`."""
        xp, splitting, c = namespace(times), self.splitting, self.splitting.ndim
        last = j == self.steps_back
        stage_rule = "midpoint" if (self.solver_type == "midpoint" if last else self.inner == "midpoint") else "exact"
        whole = splitting.step(at[0], end)
        found = 0
        for k in sorted(known):  # and no other: in the graph each takes long to compile
            used = np.arange(k) != 1 if k == 3 and self.solver_type == "midpoint" else np.arange(k) < k
            valid = xp.asarray(used) & (order == k)[..., None]
            step = Step.of(splitting, "lam", process, end, times[..., :k], valid)
            through = weights(step, whole, stage_rule if k == 2 else "exact")
            through = xp.pad(through, [(0, 0)] * (through.ndim - 1 - c) + [(0, j - k)] + [(0, 0)] * c)
            found = found + xp.where((order == k).reshape(order.shape + (1,) * (1 + c)), through, 0)
        parts = [xp.expand_dims(splitting.scale(end) / splitting.scale(at[0]), -1 - c), found]
        if splitting.stochastic:
            visited = [*at[:j], end]
            for k in range(j):
                onto = order > k + 1 if k + 1 < j else False
                beyond = _either(onto, visited[k + 1], end)
                noise = splitting.noise(visited[k], beyond) * splitting.scale(end) / splitting.scale(beyond)
                parts.append(xp.expand_dims(xp.where((order > k).reshape(order.shape + (1,) * c), noise, 0), -1 - c))
        return xp.concatenate(parts, axis=-1 - c)


def _either(condition: Any, one: Any, two: Any) -> Any:
    """Level `one` where the condition holds, else `two`."""
    xp = namespace(one.lam)
    return type(one)(*(xp.where(condition, a, b) for a, b in zip(one, two, strict=True)))
