"""Multistep methods with the Adams-Bashforth coefficients b of even steps, started by Runge-Kutta: PNDM and FON.

With DDIM's step phi(x, e; s -> t) = (alpha_t/alpha_s) x + w_st e (the noise splitting's), x_i -> x_{i+1} is phi(x_i, e) with

    F-PNDM    e = sum_j b_j eps_{i-j}, and in the first three steps, t_m the middle of the step in t,                  (1)
              e = (e_1 + 2 e_2 + 2 e_3 + e_4)/6,  e_1 = eps_i,  e_2 = eps(phi(x_i, e_1; t_m)),  e_3 = eps(phi(x_i, e_2; t_m)),
              e_4 = eps(phi(x_i, e_3; t_{i+1}))
    S-PNDM    e = (3 eps_i - eps_{i-1})/2, and in the first step e = (eps_i + eps(phi(x_i, eps_i; t_{i+1})))/2              (2)

FON is the same in plain (x, t), with phi(x, f; s -> t) = x + (t - s) f and f = dx/dt in place of eps. As published, f is the quotient of a
short DDIM step from the start of the step, also at its other stages:

    f(eps) = (phi(x_i, eps; t_i -> t_i - d) - x_i)/(-d).                                                            (3)
"""

import abc
from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting, floating, namespace
from ..processes import AbstractProcess
from ..splitting import Level, Splitting, level
from .linear import AbstractLinear, Pattern, Row, past_outputs
from .multistep import checked_order
from .plain import velocity
from .step import ADAMS_BASHFORTH, output

WARMUPS = {"runge-kutta": np.array([1, 2, 2, 1]) / 6, "heun": np.array([1, 1]) / 2}
MIDDLE = {"runge-kutta": (0.5, 0.5, 1.0), "heun": (1.0,)}
NOISE = Splitting(np.inf)


class _Started(AbstractLinear):
    """(1)-(3): a Runge-Kutta start, then one evaluation a step."""

    steps_back: eqx.AbstractVar[int]
    warmup: eqx.AbstractVar[str]

    def order(self, terms: Any) -> int:
        return self.steps_back

    @property
    def window(self) -> int:
        return self.steps_back

    @property
    def pattern(self) -> Pattern:
        past, stages = past_outputs(self.steps_back - 1, ("x", "F0")), len(WARMUPS[self.warmup])
        reads = ("x", *(("x", f"F{s}") for s in range(stages - 1)))
        return Pattern(reads, ("x", *(f"F{s}" for s in range(stages)), *past), past)

    @abc.abstractmethod
    def output(self, process: AbstractProcess, prediction: str, times: Any) -> tuple[Any, Any]:
        """(A, B) of the stages' outputs F = A x + B p."""

    @abc.abstractmethod
    def kept(self, process: AbstractProcess, start: Level, t0: Any) -> tuple[Any, Any]:
        """The weights of x and F in what a step integrates."""

    @abc.abstractmethod
    def move(self, start: Level, end: Level, t0: Any, t1: Any) -> tuple[Any, Any]:
        """The weights of x and of what is integrated in phi."""

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, t0, b_start = namespace(nodes), nodes[..., 0], WARMUPS[self.warmup]
        with np.errstate(divide="ignore", invalid="ignore"):
            start, end = level(process, t0), level(process, t_end)
            count = xp.sum(valid, axis=-1)
            whole = xp.isfinite(end.lam)
            first = whole & (count < self.steps_back if self.warmup == "runge-kutta" else (count == 1) & (self.steps_back > 1))
            times = [xp.where(first, t_end if c == 1 else t0 + c * (t_end - t0), t0) for c in MIDDLE[self.warmup]]
            of_x, of_f = self.kept(process, start, t0)
            reads = []
            for t in times:
                ratio, weight = self.move(start, level(process, t), t0, t)
                reads.append(xp.where(first[..., None], xp.stack([ratio + weight * of_x, weight * of_f], axis=-1), 0))
            table = floating(ADAMS_BASHFORTH[:, : self.steps_back], nodes)
            bashforth = xp.take(table, xp.where(whole, count, 1) - 1, axis=0)
            ratio, weight = self.move(start, end, t0, t_end)
            stages = [xp.where(first, float(b), bashforth[..., 0] if s == 0 else 0) for s, b in enumerate(b_start)]
            past = [xp.where(first, 0, bashforth[..., j]) for j in range(1, self.steps_back)]
            x = [ratio + weight * of_x * sum(stages), *(weight * of_f * b for b in stages), *(weight * b for b in past)]
            times = xp.stack([t0, *times], axis=-1)
            fields = self.output(process, prediction, times)
        shift: dict[str, Any] = dict.fromkeys(self.pattern.registers)
        if shift:
            shift["f1"] = xp.stack([of_x, of_f], axis=-1)
        active = xp.stack([xp.ones_like(first), *[first] * (len(b_start) - 1)], axis=-1)
        return Row(times, *fields, (None, *reads), xp.stack(x, axis=-1), shift, active=active)


def _checked_warmup(warmup: str) -> str:
    if warmup not in WARMUPS:
        raise ValueError(f"warmup={warmup!r} is not known: use 'runge-kutta' or 'heun'; aj.solvers.IPNDM starts without.")
    return warmup


class PNDM(_Started):
    """Pseudo numerical methods, (1) and (2): DDIM's step with a Runge-Kutta start and then Adams-Bashforth's combination of eps for even steps.

    F-PNDM is the default, S-PNDM `PNDM(2, "heun")`, diffusers' PNDM with `skip_prk_steps` `PNDM(4, "heun")`. One evaluation a step; in the
    order - 1 first steps of "runge-kutta" four, in the first of "heun" two. Order 2 on grids that are even
    in a smooth variable (measured: in lam 2.0, in t 1.9), 1 on uneven grids: the coefficients know nothing of the grid. `aj.DEIS` has those that do.

    Args:
        order: 1 to 4.
        warmup: "runge-kutta" or "heun".
    Raises:
        ValueError: for another order or warm-up.
    Reference: Liu et al., Pseudo numerical methods for diffusion models on manifolds (2022).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.PNDM())
    """

    steps_back: int = eqx.field(static=True)
    warmup: str = eqx.field(static=True)

    def __init__(self, order: int = 4, warmup: str = "runge-kutta"):
        self.steps_back, self.warmup = checked_order(order, 4, "PNDM"), _checked_warmup(warmup)

    def output(self, process: AbstractProcess, prediction: str, times: Any) -> tuple[Any, Any]:
        return output(NOISE, prediction, level(process, times))

    def kept(self, process: AbstractProcess, start: Level, t0: Any) -> tuple[Any, Any]:
        return 0 * t0, 0 * t0 + 1

    def move(self, start: Level, end: Level, t0: Any, t1: Any) -> tuple[Any, Any]:
        return end.alpha / start.alpha, NOISE.step(start, end)


class FON(_Started):
    """Fourth-order numerical method: Runge-Kutta, then Adams-Bashforth with the coefficients of even steps, on dx/dt in (x, t).

    Cost as `PNDM`. Order 4 on grids even in t, 2 on those even in another smooth variable, 1 on uneven ones.
    With a difference the error stays above that of the quotient, whatever the steps.

    Args:
        order: 1 to 4.
        warmup: "runge-kutta" or "heun".
        difference: the d of (3), in the process's time, 1 on a training table as published; None is dx/dt itself at every stage.
    Raises:
        ValueError: for another order, warm-up or difference.
    Reference: Liu et al., Pseudo numerical methods for diffusion models on manifolds (2022), FON.

        aj.sample(term, x_T, args, grid=aj.grids.uniform(term.process, 20), solver=aj.solvers.FON())
    """

    steps_back: int = eqx.field(static=True)
    warmup: str = eqx.field(static=True)
    difference: float | None = eqx.field(static=True)

    def __init__(self, order: int = 4, warmup: str = "runge-kutta", difference: float | None = None):
        self.steps_back, self.warmup = checked_order(order, 4, "FON"), _checked_warmup(warmup)
        if difference is not None and not difference > 0:
            raise ValueError(f"difference is a positive length of time, or None for dx/dt itself; got {difference!r}.")
        self.difference = difference

    def output(self, process: AbstractProcess, prediction: str, times: Any) -> tuple[Any, Any]:
        at = level(process, times)
        return velocity(prediction, at) if self.difference is None else output(NOISE, prediction, at)

    def kept(self, process: AbstractProcess, start: Level, t0: Any) -> tuple[Any, Any]:
        if self.difference is None:
            return 0 * t0, 0 * t0 + 1
        end = level(process, t0 - self.difference)
        return (end.alpha / start.alpha - 1) / -self.difference, NOISE.step(start, end) / -self.difference  # (3)

    def move(self, start: Level, end: Level, t0: Any, t1: Any) -> tuple[Any, Any]:
        return 0 * t0 + 1, t1 - t0
