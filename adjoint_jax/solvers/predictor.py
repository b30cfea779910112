"""Predictor-corrector multistep methods of one evaluation a step (PEC): UniPC and SA-Solver.

The state X_i at which the network was evaluated is a prediction; its output corrects the step that led there before the next is predicted,

    Y_i     = B_i + sum_j C_j F_{i-j}                  j = 0 .. q-1, through the new point: Adams-Moulton          (1)
    B_{i+1} = (m_{i+1}/m_i) Y_i + s_i z_i
    X_{i+1} = B_{i+1} + sum_j P_j F_{i-j}              j = 0 .. p-1: Adams-Bashforth                              (2)

with the weights of `adjoint_jax.solvers.multistep`, whose equations give the published rules. A register carries B, so that corrector and
predictor share their noise. The last prediction is the sample: nothing is evaluated there. Order p + 1 for q = p + 1, p without corrector.
With `denoise` a last step into sigma = 0 starts from Y_N and its own output, of a second evaluation, F(Y_N).                   (3)
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import broadcasting, floating, namespace, trailing
from ..processes import AbstractProcess
from ..splitting import Splitting, level
from .linear import AbstractLinear, Pattern, Row, past_outputs
from .multistep import checked_order, orders
from .step import Step, output, weights

RULES = {"bh1": "bh1", "bh2": "midpoint", "exact": "exact", "vary_coeff": "vary_coeff"}


class AbstractPredictorCorrector(AbstractLinear):
    """Equations (1)-(3) with p = `predictor` and q = `corrector` nodes (0: none)."""

    splitting: eqx.AbstractVar[Splitting]
    predictor: eqx.AbstractVar[int]
    corrector: eqx.AbstractVar[int]
    rule: eqx.AbstractVar[str]
    lower_order_final: eqx.AbstractVar[Any]
    uncorrected: eqx.AbstractVar[tuple[int, ...]]
    denoise: eqx.AbstractVar[bool]

    def order(self, terms: Any) -> int:
        return max(self.predictor, self.corrector)

    @property
    def tau(self) -> float | None:
        return self.splitting.tau

    @property
    def window(self) -> int:
        return max(self.predictor, self.corrector, 2 if self.corrector else 1)

    @property
    def pattern(self) -> Pattern:
        past = past_outputs(self.window - 1)
        noise = ("z0",) if self.splitting.stochastic else ()
        if not self.corrector:
            return Pattern(("x",), ("x", "F0", *past, *noise), past, draws=len(noise))
        values = ("x", "base", "F0", *past)
        reads, second = (("x", values), ("F1",)) if self.denoise else (("x",), ())
        registers = {"base": (*values, *noise), **past}
        return Pattern(reads, (*values, *second, *noise), registers, copies=("base",), draws=len(noise))

    def use(self, valid: Any, steps: int) -> Any:
        """Which nodes the predictor uses, and which the corrector, of the step before: `[steps, 2, window]`."""
        last = [1] if self.denoise else []
        p, q = (orders(steps - len(last), most, self.lower_order_final) for most in (self.predictor, max(self.corrector - 1, 0)))
        p, q = np.append(p, last).astype(int), np.concatenate([[0], np.append(q, last)[:-1].astype(int) + 1]) if self.corrector else 0 * p
        q[[i + 1 for i in self.uncorrected if i + 1 < steps]] = 0
        return np.stack([valid & (np.arange(self.window) < limit[:, None]) for limit in (p, q)], axis=1)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, c = namespace(nodes), self.splitting.ndim
        if valid.ndim == nodes.ndim:  # in diffeqsolve: whatever exists
            index = np.arange(self.window)
            correct = valid & (index < self.corrector) & valid[..., 1:2] if self.corrector else valid & False
            valid = xp.stack([valid & (index < self.predictor), correct], axis=-2)
        valid, (splitting, before) = self.split(valid if valid.dtype == bool else floating(valid, nodes))
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        wide = lambda part: xp.expand_dims(part, -1 - c)  # noqa: E731
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = wide(splitting.scale(end) / splitting.scale(start))
            step = Step.of(splitting, "lam", process, end, nodes, valid[..., 0, :])
            predict = weights(step, splitting.step(start, end), "exact" if self.rule == "vary_coeff" else self.rule)
            noise = [wide(splitting.noise(start, end))] if splitting.stochastic else []
            of_x, of_p = (wide(part) for part in output(splitting, prediction, start))
            shift = dict.fromkeys(self.pattern.registers)
            if not self.corrector:
                return Row(nodes[..., :1], of_x, of_p, (None,), xp.concatenate([ratio, predict, *noise], axis=-1 - c), shift)
            correct, corrected = self._correct(process, before, nodes, valid[..., 1, :], start)
        corrected = wide(corrected.reshape(corrected.shape + (1,) * c)) * xp.ones_like(ratio)
        here = [1 - corrected, corrected, correct]
        base = xp.concatenate([*(ratio * part for part in here), *noise], axis=-1 - c)
        x = xp.concatenate([*(ratio * part for part in here[:2]), ratio * correct + predict, *noise], axis=-1 - c)
        row = Row(nodes[..., :1], of_x, of_p, (None,), x, {**shift, "base": base})
        return self._denoised(row, xp.concatenate(here, axis=-1 - c), predict, xp.isposinf(end.lam)) if self.denoise else row

    def _denoised(self, row: Row, corrected: Any, predict: Any, last: Any) -> Row:
        """The row with the second stage of (3), at Y = `corrected`: where the step is the `last`, its output takes the weight P_0 of the first's."""
        xp, c, end = namespace(row.times), self.splitting.ndim, -1 - self.splitting.ndim
        moved = xp.where(trailing(last, c), xp.take(predict, 0, axis=end), 0)
        weights = xp.moveaxis(row.x, end, 0)
        outputs = 2 + self.window
        weights = xp.stack([*weights[:2], weights[2] - moved, *weights[3:outputs], moved, *weights[outputs:]], axis=end)
        times, of_x, of_p = (xp.concatenate([part, part], axis=axis) for part, axis in ((row.times, -1), (row.of_x, end), (row.of_p, end)))
        active = xp.stack([xp.ones_like(last), last], axis=-1)
        return row._replace(times=times, of_x=of_x, of_p=of_p, reads=(None, corrected), x=weights, active=active)

    def split(self, valid: Any) -> tuple[Any, tuple[Splitting, Splitting]]:
        """The answer of `use` as masks and the splittings of a step and of the one before."""
        return valid, (self.splitting, self.splitting)

    def _correct(self, process: AbstractProcess, splitting: Splitting, nodes: Any, valid: Any, end: Any) -> tuple[Any, Any]:
        """C_0, C_1, ... of (1), the integral from nodes[..., 1] to nodes[..., 0], and whether there is a corrector at all (1 or 0)."""
        xp, c = namespace(nodes), self.splitting.ndim
        some = valid[..., 0]
        swapped = np.array([1, 0, *range(2, nodes.shape[-1])])
        begin = xp.where(some, nodes[..., 1], nodes[..., 0])
        step = Step.of(splitting, "lam", process, end, xp.take(nodes, swapped, axis=-1), xp.take(valid, swapped, axis=-1))
        whole = splitting.step(level(process, begin), end)
        found = xp.take(weights(step, whole, self.rule), swapped, axis=-1 - c)
        return xp.where(some.reshape(some.shape + (1,) * (1 + c)), found, 0), xp.where(some, 1.0, 0.0).astype(nodes.dtype)


class UniPC(AbstractPredictorCorrector):
    """UniPC-p: order p + 1 with its corrector, p without (UniP-p); one network evaluation a step.

    Measured: 2.0, 3.0, 3.9 to 4.1 for p = 1, 2, 3 with lower_order_final=False. The default's last steps, of orders 2 and 1, show on fine grids: for
    p = 3 the order is 2.2 from 160 to 320 steps, at errors below 1e-6. "vary_coeff" as published measures 1.

    Args:
        order: p, 1 to 4.
        variant: "bh2" or "bh1" (they differ in the predictor of order 2 and the corrector of order 1), "exact", the exact integrals, or
            "vary_coeff", the published form of these, which takes a wrong coefficient and drops terms in correctors of order 2 and above.
        sigma_data: 0 (data prediction, the default), infinity (noise prediction) or any other splitting.
        corrector: whether to correct at all.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`; True as published.
        uncorrected: steps after which the corrector is left out (diffusers' disable_corrector).
    Raises:
        ValueError: for another order or variant.
    Reference: Zhao et al., UniPC (2023).

        aj.sample(term, x_T, args, grid=ts, solver=aj.UniPC(order=2))
    """

    splitting: Splitting
    predictor: int = eqx.field(static=True)
    corrector: int = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    lower_order_final: Any = eqx.field(static=True)
    uncorrected: tuple[int, ...] = eqx.field(static=True)
    denoise: bool = eqx.field(static=True, default=False)

    def __init__(
        self,
        order: int = 2,
        variant: str = "bh2",
        sigma_data: Any = 0.0,
        corrector: bool = True,
        lower_order_final: Any = True,
        uncorrected: tuple[int, ...] = (),
    ):
        if variant not in RULES:
            raise ValueError(f"variant={variant!r} is not known: use one of {', '.join(RULES)}.")
        self.splitting, self.rule = Splitting(sigma_data), RULES[variant]
        self.predictor = checked_order(order, 4, "UniPC")
        self.corrector = order + 1 if corrector else 0
        self.lower_order_final, self.uncorrected = lower_order_final, tuple(uncorrected)


class SASolver(AbstractPredictorCorrector):
    """SA-Solver: stochastic Adams methods on x0, predictor of p and corrector of q nodes that share their noise; one evaluation and one draw a step.

    Order max(p, q) at tau = 0 with lower_order_final=False (measured: 2.1 for p = q = 2, 3.0 for 3 and 0, 3.9 for 3 and 4); the default as
    in `UniPC`.

    Args:
        predictor: p, 1 to 4.
        corrector: q, 0 (none) to 4, the new point included.
        tau: stochasticity, at least 0; or one number a step.
        sigma_data: the splitting; 0 is the published one.
        variant: "exact", or "few_steps": steps through two nodes by UniPC's bh1, as published for few steps and in diffusers.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`; True as published. With `denoise` it does not count the last step.
        denoise: whether a last step into sigma = 0 starts from the corrected state, which is evaluated once more, as published for many
            steps: one more evaluation, and `DiscreteAdjoint` stores max(p, q) + 1 states a step.
    Raises:
        ValueError: for other orders, tau or variant, and for denoise without a corrector.
    Reference: Xue et al., SA-Solver (2023).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.SASolver(), key=key)
    """

    splitting: Splitting
    predictor: int = eqx.field(static=True)
    corrector: int = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    lower_order_final: Any = eqx.field(static=True)
    uncorrected: tuple[int, ...] = eqx.field(static=True)
    taus: tuple[float, ...] | None = eqx.field(static=True)
    denoise: bool = eqx.field(static=True)

    def __init__(
        self,
        predictor: int = 3,
        corrector: int = 4,
        tau: Any = 1.0,
        sigma_data: Any = 0.0,
        variant: str = "exact",
        lower_order_final: Any = True,
        denoise: bool = False,
    ):
        if variant not in ("exact", "few_steps"):
            raise ValueError(f"variant={variant!r} is not known: use 'exact' or 'few_steps'.")
        if denoise and not corrector:
            raise ValueError("denoise=True is about the corrected state: it needs a corrector of at least 1.")
        self.taus = None if np.ndim(tau) == 0 else tuple(float(each) for each in tau)
        self.splitting = Splitting(sigma_data, max(self.taus) if self.taus else tau)
        self.rule = "exact" if variant == "exact" else "bh1"
        self.predictor = checked_order(predictor, 4, "SASolver")
        self.corrector = checked_order(corrector, 4, "SASolver's corrector") if corrector else 0
        self.lower_order_final, self.uncorrected, self.denoise = lower_order_final, (), bool(denoise)

    @property
    def tau(self) -> float | None:
        return None if self.taus else super().tau

    def use(self, valid: Any, steps: int) -> Any:
        masks = super().use(valid, steps)
        if self.taus is None:
            return masks
        if len(self.taus) != steps:
            raise ValueError(f"One tau a step: got {len(self.taus)} for {steps} steps.")
        taus = np.array([self.taus, (0.0, *self.taus[:-1])]).T
        return np.concatenate([masks, taus[..., None]], axis=-1)

    def split(self, valid: Any) -> tuple[Any, tuple[Splitting, Splitting]]:
        if self.taus is None:
            return super().split(valid)
        taus = valid[..., -1]
        return valid[..., :-1] > 0, (Splitting(self.splitting.sigma_data, taus[..., 0]), Splitting(self.splitting.sigma_data, taus[..., 1]))
