"""Two-step methods that are their own inverse: BDIA and O-BELM.

With Phi_i(x; j) the step of a one-step solver from t_i to t_j, both directions from the same x_i,

    x_{i+1} = g x_{i-1} - g Phi_i(x_i; i-1) + Phi_i(x_i; i+1),      x_1 = Phi_0(x_0; 1)                            (1)
    x_{i-1} = (1/g) x_{i+1} - (1/g) Phi_i(x_i; i+1) + Phi_i(x_i; i-1)                                             (2)

so that the inverse is (1) on the reversed grid with 1/g for g. O-BELM is (1) on Euler's step in the variable u of a splitting (DDIM for
rho) in z = x/m, hence with g = q^2 m_{i+1}/m_{i-1}, q = (u_{i+1} - u_i) / (u_i - u_{i-1}), for which the term of second order
cancels; reversed, q is 1/q and g is 1/g.
"""

import abc
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._numerics import broadcasting, namespace, zeros_like
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from ._base import fit
from .ddim import DDIM
from .linear import AbstractLinear, Pattern, Row
from .paired import AbstractPaired, Paired
from .singlestep import ExponentialRK


class AbstractTwoStep(AbstractPaired):
    """Equation (1)."""

    @property
    @abc.abstractmethod
    def base(self) -> AbstractLinear:
        """The one-step solver."""

    @abc.abstractmethod
    def gain(self, process: AbstractProcess, before: Any, now: Any, after: Any) -> Any:
        """g of (1), `[..., *c]`, at three successive times."""

    @property
    def window(self) -> int:
        return 2

    @property
    def pattern(self) -> Pattern:
        base = self.base.pattern
        back = [self._renamed(what) for what in base.reads[1:]]
        names = dict.fromkeys(["x", "aux", *base.x, *self._renamed(base.x)])
        return Pattern((*base.reads, *back), tuple(names), {"aux": "x"}, copies=("aux",))

    def _renamed(self, what: Any) -> tuple[str, ...]:
        """A sum of the step towards t_{i-1}, whose first stage is that of the other and whose further ones follow."""
        stages = len(self.base.pattern.reads)
        new = {f"F{s}": f"F{stages - 1 + s}" for s in range(1, stages)}
        return tuple(new.get(name, name) for name in ((what,) if isinstance(what, str) else what))

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, now = namespace(nodes), nodes[..., :1]
        second = valid[..., 1]
        before = xp.where(second, nodes[..., 1], t_end)  # any step of finite length, where there is none before
        ahead = self.base.rows(process, prediction, now, t_end, valid[..., :1])
        back = self.base.rows(process, prediction, now, before, valid[..., :1])
        c = ahead.x.ndim - nodes.ndim
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = self.gain(process, before, nodes[..., 0], t_end)
        wide = second.reshape(second.shape + (1,) * c)
        gain = xp.where(wide, xp.where(wide, gain.reshape(gain.shape + (1,) * (c + second.ndim - gain.ndim)), 1), 0)
        base, at = self.base.pattern.x, lambda row, k: row.x[(..., k, *(slice(None),) * c)]
        parts = {"x": 0, "aux": gain + 0 * at(ahead, 0)}
        for k, (one, two) in enumerate(zip(base, self._renamed(base), strict=True)):
            parts[one] = parts.get(one, 0) + at(ahead, k)
            parts[two] = parts.get(two, 0) - gain * at(back, k)
        join = lambda one, two: xp.concatenate([one, two[(..., slice(1, None), *(slice(None),) * c)]], axis=-1 - c)  # noqa: E731
        active = None
        if len(ahead.reads) > 1:
            unset = xp.ones_like(ahead.times, bool)
            first, further = (unset if row.active is None else row.active for row in (ahead, back))
            active = xp.concatenate([first, further[..., 1:] & second[..., None]], axis=-1)
        return Row(
            times=xp.concatenate([ahead.times, back.times[..., 1:]], axis=-1),
            of_x=join(ahead.of_x, back.of_x),
            of_p=join(ahead.of_p, back.of_p),
            reads=(*ahead.reads, *back.reads[1:]),
            x=xp.stack([parts[name] for name in self.pattern.x], axis=-1 - c),
            registers={"aux": None},
            active=active,
        )

    def resume(self, rows: Row) -> Row:
        """The first step goes to the given neighbour, without the network."""
        xp = namespace(rows.x)
        steps = rows.x.shape[0]
        copied = np.zeros(len(self.pattern.x))
        copied[self.pattern.x.index("aux")] = 1
        first = xp.broadcast_to(xp.asarray(copied, rows.x.dtype).reshape(-1, *(1,) * (rows.x.ndim - 2)), rows.x.shape[1:])
        runs = xp.broadcast_to(xp.arange(steps)[:, None] > 0, rows.times.shape)
        return rows._replace(x=xp.concatenate([first[None], rows.x[1:]]), active=runs if rows.active is None else runs & rows.active)

    def undo_rows(self, process: AbstractProcess, prediction: str, ts: Any) -> Row | None:
        return None

    def undo(self, row: Row, back: Row | None, after: Paired, noise: Any, predict: Callable) -> Paired:
        """(1) solved for x_{i-1}; where g = 0 there is none, and the register is as it began."""
        x, weight = after.aux, fit(row.x[self.pattern.x.index("aux")], after.x)
        rest, *_ = self.advance(row._replace(active=None), x, {"aux": zeros_like(x)}, noise, predict)
        found = (after.x - rest) / jnp.where(weight == 0, 1, weight)
        return Paired(x, jnp.where(weight == 0, x, found))


class BDIA(AbstractTwoStep):
    """Bidirectional integration approximation, equation (1): exactly invertible; the solver's evaluations a step, one for DDIM.

    g = 1 is the leapfrog: order 2 with DDIM (and with Heun). g < 1: the solver's order; the inverse multiplies errors by 1/g a step, so
    that 50 steps at g = 0.5 lose all digits even in float64.

    Args:
        gamma: g of (1), above 0 and at most 1.
        solver: a deterministic one-step solver, or a bare diffrax one: `aj.DDIM()` is BDIA-DDIM, `diffrax.Heun()` (EDM's sampler)
            takes its step in both directions, three evaluations.
    Raises:
        ValueError: for another gamma.
        TypeError: for a solver with memory or noise of its own.
    Reference: Zhang, Lewis & Kleijn, Exact diffusion inversion via bidirectional integration approximation (2023).

        pair = aj.invert(term, x_0, args, grid=ts, solver=aj.BDIA())
        aj.sample(term, pair, args, grid=ts, solver=aj.BDIA()).x      # x_0
    """

    solver: AbstractLinear
    gamma: float = eqx.field(static=True)

    def __init__(self, gamma: float = 1.0, solver: Any = None):
        if not 0 < gamma <= 1:
            raise ValueError(f"BDIA's gamma is above 0 and at most 1; got {gamma!r}.")
        self.gamma, self.solver = float(gamma), _one_step(DDIM() if solver is None else solver, "BDIA")

    @property
    def base(self) -> AbstractLinear:
        return self.solver

    def order(self, terms: Any) -> int:
        # the two directions' terms of odd order cancel
        p = self.solver.order(terms) or 1
        return p + 1 if self.gamma == 1 and p % 2 else p

    def gain(self, process: AbstractProcess, before: Any, now: Any, after: Any) -> Any:
        return namespace(now).full_like(now, self.gamma)

    @property
    def inverse(self) -> AbstractPaired:
        if self.gamma < 1:
            warnings.warn(
                f"The inverse of BDIA(gamma={self.gamma:g}) multiplies errors by 1/gamma = {1 / self.gamma:.3g} a step: use gamma=1.",
                stacklevel=4,
            )
        return _Growing(self)


class _Growing(AbstractTwoStep):
    """The inverse of BDIA, equation (2)."""

    forward: BDIA

    @property
    def base(self) -> AbstractLinear:
        return self.forward.solver

    def order(self, terms: Any) -> int:
        return self.forward.order(terms)

    def gain(self, process: AbstractProcess, before: Any, now: Any, after: Any) -> Any:
        return namespace(now).full_like(now, 1 / self.forward.gamma)

    @property
    def inverse(self) -> AbstractPaired:
        return self.forward


class BELM(AbstractTwoStep):
    """O-BELM, equation (1) with g = q^2 m_{i+1}/m_{i-1}: order 2, one evaluation a step, exactly invertible and its own inverse.

    Args:
        sigma_data: infinity, the published one (on eps, in rho); or 0, a positive number, or an array that broadcasts against the
            trailing axes of x.
    Raises:
        ValueError: for another sigma_data.
    Reference: Wang, Yin, Dong, Zhu, Zhao & Zhang, BELM (NeurIPS 2024), O-BELM.

        pair = aj.invert(term, x_0, args, grid=ts, solver=aj.solvers.BELM())
    """

    splitting: Splitting

    def __init__(self, sigma_data: Any = np.inf):
        self.splitting = Splitting(sigma_data)

    @property
    def base(self) -> AbstractLinear:
        return ExponentialRK(diffrax.Euler(), self.splitting.sigma_data)

    def order(self, terms: Any) -> int:
        return 2

    def gain(self, process: AbstractProcess, before: Any, now: Any, after: Any) -> Any:
        times = [level(process, t) for t in (before, now, after)]
        scales = [self.splitting.scale(at) for at in times]
        lengths = [self.splitting.step(*ends) / scale for ends, scale in zip(pairwise(times), scales[1:], strict=True)]
        return (lengths[1] / lengths[0]) ** 2 * scales[2] / scales[0]

    @property
    def inverse(self) -> AbstractPaired:
        return self


def _one_step(solver: Any, name: str) -> AbstractLinear:
    solver = ExponentialRK(solver) if isinstance(solver, diffrax.AbstractERK | diffrax.Euler) else solver
    plain = isinstance(solver, AbstractLinear) and solver.window == 1 and not solver.pattern.registers and not solver.draws
    if not plain or solver.pattern.reads[0] != "x":
        raise TypeError(f"{name} takes a deterministic one-step solver such as aj.DDIM() or aj.ExponentialRK(...); got {type(solver).__name__}.")
    return solver
