"""DC-Solver: UniPC whose newest output is moved in time before it predicts, to make up for the corrector's mismatch.

With the outputs F_i, F~_{i-1}, ... at t_i, t_{i-1}, ..., and l_j their Lagrange basis in t over K + 1 nodes,

    F~_i = l_0(t') F_i + sum_{j=1..K} l_j(t') F~_{i-j},       t' = r_i t_i + (1 - r_i) t_{i-1}.                        (1)

The corrector sees F_i, the predictor and everything later F~_i. r_i = 1 changes nothing; a step that has fewer outputs is not compensated.
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._numerics import broadcasting, floating, is_concrete, lagrange, namespace, trailing
from ..processes import AbstractProcess
from ..splitting import Splitting
from .linear import Pattern, Row
from .multistep import checked_order
from .predictor import RULES, AbstractPredictorCorrector


class DCSolver(AbstractPredictorCorrector):
    """UniPC-p with dynamic compensation, equation (1); one network evaluation a step. Order p + 1 where all r_i = 1, as `UniPC`;
    with ratios that do not tend to 1 with the steps it is 1 (measured for 0.9): they are a correction for few steps.

    The ratios are differentiable: fit them by the gradient of the distance to a fine solution.

    Args:
        ratios: r_i, one a step.
        order: p, 1 to 4.
        compensation: K, 1 to p, the degree of (1) ("dc_order").
        variant, sigma_data, lower_order_final: as `aj.UniPC`.
    Raises:
        ValueError: for another order or variant, and for another number of ratios than steps.
    Reference: Zhao et al., DC-Solver: improving predictor-corrector diffusion sampler via dynamic compensation (2024).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.DCSolver(ratios=np.ones(len(ts) - 1)))
    """

    splitting: Splitting
    ratios: Any
    predictor: int = eqx.field(static=True)
    corrector: int = eqx.field(static=True)
    compensation: int = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    lower_order_final: Any = eqx.field(static=True)
    uncorrected: tuple[int, ...] = eqx.field(static=True)
    denoise: bool = eqx.field(static=True, default=False)

    def __init__(
        self, ratios: Any, order: int = 2, compensation: int = 1, variant: str = "bh2", sigma_data: Any = 0.0, lower_order_final: Any = True
    ):
        if variant not in RULES:
            raise ValueError(f"variant={variant!r} is not known: use one of {', '.join(RULES)}.")
        self.splitting, self.rule = Splitting(sigma_data), RULES[variant]
        self.ratios = ratios if isinstance(ratios, jax.Array) else np.asarray(ratios, np.float64)
        self.predictor, self.corrector = checked_order(order, 4, "DCSolver"), order + 1
        if compensation not in range(1, order + 1):
            raise ValueError(f"compensation is a degree from 1 to the order, here {order}; got {compensation!r}.")
        self.compensation, self.lower_order_final, self.uncorrected = compensation, lower_order_final, ()

    @property
    def pattern(self) -> Pattern:
        base = super().pattern
        past = tuple(f"f{j}" for j in range(1, self.compensation + 1))
        return base._replace(registers={**base.registers, "f1": ("F0", *past)})

    def use(self, valid: Any, steps: int) -> Any:
        """The masks of the predictor and the corrector, and behind each the step's ratio: `[steps, 2, window + 1]`."""
        ratios = np.asarray(self.ratios, np.float64) if is_concrete(self.ratios) else self.ratios
        if ratios.shape != (steps,):
            raise ValueError(f"One ratio a step: got shape {ratios.shape} for {steps} steps.")
        xp = namespace(ratios)
        masks = xp.asarray(super().use(valid, steps), ratios.dtype)
        return xp.concatenate([masks, xp.broadcast_to(ratios[:, None, None], (steps, 2, 1))], axis=-1)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        if valid.ndim == nodes.ndim:
            raise ValueError("DCSolver's ratios belong to the steps of a grid, which only aj.sample knows: use aj.sample(..., solver=solver).")
        xp, c, ratios = namespace(nodes), self.splitting.ndim, floating(valid[..., 0, -1], nodes)
        row = super().rows(process, prediction, nodes, t_end, valid[..., :-1] > 0)
        past = nodes[..., : self.compensation + 1]
        there = xp.concatenate([xp.ones_like(past[..., :1], bool), past[..., 1:] != past[..., :-1]], axis=-1)  # others repeat the first time
        moved = nodes[..., 0] + xp.where(there[..., -1], 1 - ratios, 0) * (nodes[..., 1] - nodes[..., 0])
        shares = lagrange(past, there, moved[..., None])[..., 0]  # (1)
        base = row.registers["base"]
        predict = row.x - base
        cut = lambda part, i, j=None: part[(..., slice(i, j), *(slice(None),) * c)]  # noqa: E731
        moved = cut(predict, 2, 3) * trailing(shares, c) + xp.concatenate([cut(0 * predict, 2, 3), cut(predict, 3, 2 + shares.shape[-1])], -1 - c)
        x = base + xp.concatenate([cut(0 * base, 0, 2), moved, cut(predict, 2 + shares.shape[-1])], -1 - c)
        return row._replace(x=x, registers={**row.registers, "f1": shares})
