"""EDICT: two chains, each stepped with the other's noise, then mixed.

With Phi(x; F) = (m_1/m_0) x + m_1 (u_1 - u_0) F of a splitting (DDIM for sigma_data infinite), a step s -> t is

    x' = Phi(x; F(y)),   y' = Phi(y; F(x')),   x_1 = p x' + (1 - p) y',   y_1 = p y' + (1 - p) x_1                     (1)

and in every other step ("leapfrog") y goes first: y' = Phi(y; F(x)), x' = Phi(x; F(y')). All F are at s. Inverse: unmix,

    y' = (y_1 - (1 - p) x_1) / p,    x' = (x_1 - (1 - p) y') / p,                                                 (2)

then undo the second of the two steps and the first.
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .linear import Pattern, Row
from .paired import AbstractInvertible
from .step import output

CHAINS = ("x", "aux")
PATTERN = Pattern((CHAINS, (*CHAINS, "F0")), (*CHAINS, "F0", "F1"), {"aux": (*CHAINS, "F0", "F1")}, copies=("aux",), counted=True)


class EDICT(AbstractInvertible):
    """Equation (1): exactly invertible, two evaluations a step, order 1 (p = 1 with leapfrog: 2); poor for few steps. The sample is x, its pair y.

    Args:
        p: share of its own chain in the mix, above 0 and at most 1. The inverse divides by p.
        leapfrog: let y go first in every other step, as the published code does. It counts the steps, so it needs `aj.sample`.
        sigma_data: infinity, the published one; or 0, a positive number, or an array that broadcasts against the trailing axes of x.
    Raises:
        ValueError: for another p or sigma_data.
    Reference: Wallace, Gokul & Naik, EDICT: Exact diffusion inversion via coupled transformations (CVPR 2023).

        pair = aj.invert(term, x_0, args, grid=ts, solver=aj.solvers.EDICT())
        aj.sample(term, pair, args, grid=ts, solver=aj.solvers.EDICT()).x      # x_0
    """

    splitting: Splitting
    p: float = eqx.field(static=True)
    leapfrog: bool = eqx.field(static=True)

    def __init__(self, p: float = 0.93, leapfrog: bool = True, sigma_data: Any = np.inf):
        if not 0 < p <= 1:
            raise ValueError(f"EDICT's p is above 0 and at most 1; got {p!r}.")
        self.p, self.leapfrog, self.splitting = float(p), bool(leapfrog), Splitting(sigma_data)

    def order(self, terms: Any) -> int:
        return 1

    @property
    def pattern(self) -> Pattern:
        return PATTERN._replace(counted=self.leapfrog)

    @property
    def inverse_pattern(self) -> Pattern:
        return self.pattern

    def use(self, valid: Any, steps: int) -> Any:
        """Whether x goes first, `[steps, 1]`."""
        return valid & (np.arange(steps) % (1 + self.leapfrog) == 0)[:, None]

    def inverse_use(self, valid: Any, steps: int) -> Any:
        return self.use(valid, steps)[::-1]

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, c, p = namespace(nodes), self.splitting.ndim, self.p
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio, step = self.splitting.scale(end) / self.splitting.scale(start), self.splitting.step(start, end)
        x_first = valid[..., 0].reshape(valid.shape[:-1] + (1,) * c)
        one, zero = xp.ones_like(ratio), xp.zeros_like(ratio)
        either = lambda x, y: xp.where(x_first, x, y)  # noqa: E731
        stepped = [[ratio, zero, either(step, zero), either(zero, step)], [zero, ratio, either(zero, step), either(step, zero)]]
        x = [p * a + (1 - p) * b for a, b in zip(*stepped, strict=True)]
        aux = [p * b + (1 - p) * a for a, b in zip(x, stepped[1], strict=True)]
        reads = [[either(zero, one), either(one, zero)], [either(ratio, zero), either(zero, ratio), step]]
        return self._row(process, prediction, nodes[..., 0], reads, x, aux)

    @broadcasting
    def inverse_rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, c, p = namespace(nodes), self.splitting.ndim, self.p
        start, end = level(process, t_end), level(process, nodes[..., 0])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio, step = self.splitting.scale(end) / self.splitting.scale(start), self.splitting.step(start, end)
            ratio, step = 1 / ratio, -step / ratio
        x_first = valid[..., 0].reshape(valid.shape[:-1] + (1,) * c)
        one, zero = xp.ones_like(ratio), xp.zeros_like(ratio)
        either = lambda x, y: xp.where(x_first, x, y)  # noqa: E731
        y = [-(1 - p) / p * one, 1 / p * one]  # (2)
        x = [(one - (1 - p) * y[0]) / p, -(1 - p) * y[1] / p]
        second = [ratio * either(b, a) for a, b in zip(x, y, strict=True)]
        reads = [[either(a, b) for a, b in zip(x, y, strict=True)], [*second, step]]
        undone = [[ratio * part for part in chain] for chain in (x, y)]
        steps = [[either(zero, step), either(step, zero)], [either(step, zero), either(zero, step)]]
        return self._row(process, prediction, t_end, reads, undone[0] + steps[0], undone[1] + steps[1])

    def _row(self, process: AbstractProcess, prediction: str, t: Any, reads: list, x: list, aux: list) -> Row:
        """Both evaluations are at t."""
        xp, tail = namespace(t), -1 - self.splitting.ndim
        with np.errstate(divide="ignore", invalid="ignore"):
            fields = [xp.stack([part, part], axis=tail) for part in output(self.splitting, prediction, level(process, t))]
        first, second, of_x, of_aux = (xp.stack(parts, axis=tail) for parts in (*reads, x, aux))
        return Row(xp.stack([t, t], axis=-1), fields[0], fields[1], (first, second), of_x, {"aux": of_aux})
