"""DPM-Solver-v3: exponential Adams methods in the variable that empirical model statistics l, s, b choose, dimension by dimension.

With L, S, B and f of `adjoint_jax.solvers.statistics`, relative to the start s of a step s -> t,

    g = e^(S_s - S) f - e^(S_s) (B - B_s)        varies little along the ODE,                                        (1)
    x_t = R x_s - K int_s^t w(lam) (g(lam) + e^(S_s) (B(lam) - B_s)) dlam,     w = e^((L - L_s) + (S - S_s)),               (2)
    R = K/alpha_s,    K = alpha_t e^(L_s - L_t),

exactly; g is replaced by the polynomial through its last values. l = 1, s = b = 0 is data prediction, l = 0, s = -1, b = 0 noise prediction.
The "pseudo" polynomial takes powers for the products of Newton's form, sum_k [g_0 .. g_k] (lam - lam_s)^k.

As in `adjoint_jax.solvers.predictor` the state X_i that the network sees is a prediction, and f_i corrects the step that led there:

    Y_i = (2) from Y_{i-1} through f_{i-1}, f_i, f_{i-2}, ...,    X_{i+1} = (2) from Y_i through f_i, f_{i-1}, ...              (3)
"""

from typing import Any

import equinox as eqx
import numpy as np

from .._numerics import GAUSS_POINTS, GAUSS_WEIGHTS, broadcasting, floating, is_concrete, lagrange, namespace, trailing
from ..networks import conversions
from ..processes import AbstractProcess
from ..splitting import Level, level
from .linear import AbstractLinear, Pattern, Row, past_outputs
from .multistep import checked_order, orders
from .statistics import ModelStatistics

CORRECTORS = (None, "pseudo", "exact")


def powers(nodes: Any, valid: Any, at: Any) -> Any:
    """The basis of sum_k [g_0 .. g_k] (w - w_0)^k, arguments and answer as of `lagrange`; the valid nodes come first."""
    xp, k = namespace(nodes, at), nodes.shape[-1]
    basis = [xp.zeros_like(at) for _ in range(k)]
    along = at - nodes[..., :1]
    for order in range(k):
        for j in range(order + 1):
            product = xp.ones_like(nodes[..., 0])
            for m in range(order + 1):
                if m != j:
                    product = product * xp.where(valid[..., order], nodes[..., j] - nodes[..., m], 1)
            basis[j] = basis[j] + xp.where(valid[..., order, None], along**order / product[..., None], 0)
    return xp.stack(basis, axis=-2)


class DPMSolverV3(AbstractLinear):
    """DPM-Solver-v3, equations (1)-(3): one evaluation a step.

    Measured order: p without corrector; 2 with "pseudo", for p = 1 to 3; p with "exact" (3.8 for p = 3). So for l = 1, s = b = 0. With other
    statistics order 3 is 2: a warm-up of lower order shows where g varies in the first steps (2.2 for l = 0.9), and so do the kinks of the
    statistics, which are linear between their nodes, once the steps are shorter than the gaps (2.3). It is made for few steps.

    Args:
        statistics: l, s and b of the network, from `estimate_statistics` or `ModelStatistics.load`; the grid lies within their nodes.
        order: p, 1 to 3: the number of values of g in the predictor.
        corrector: "pseudo", through p + 1 values, the published choice; "exact", through p; or None.
        pseudo: whether the predictor takes the pseudo polynomial too.
        lower_order_final: as `adjoint_jax.solvers.multistep.orders`; True as published.
        published: integrals by the trapezoidal rule on the nodes of the statistics, as in the published code, instead of quadrature to rounding.
    Raises:
        ValueError: for another order or corrector, and for a grid beyond the statistics.
    Reference: Zheng et al., DPM-Solver-v3: improved diffusion ODE solver with empirical model statistics (2023).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.DPMSolverV3(statistics))
    """

    statistics: ModelStatistics
    steps_back: int = eqx.field(static=True)
    corrector: str | None = eqx.field(static=True)
    pseudo: bool = eqx.field(static=True)
    lower_order_final: Any = eqx.field(static=True)
    published: bool = eqx.field(static=True)

    def __init__(
        self,
        statistics: ModelStatistics,
        order: int = 2,
        corrector: str | None = "pseudo",
        pseudo: bool = False,
        lower_order_final: Any = True,
        published: bool = False,
    ):
        if corrector not in CORRECTORS:
            raise ValueError(f"corrector={corrector!r} is not known: use 'pseudo', 'exact' or None.")
        self.statistics, self.steps_back = statistics, checked_order(order, 3, "DPMSolverV3")
        self.corrector = None if corrector == "exact" and order == 1 else corrector  # through one value it is the predictor
        self.pseudo, self.lower_order_final, self.published = pseudo, lower_order_final, published

    def order(self, terms: Any) -> int:
        return self.steps_back

    @property
    def window(self) -> int:
        return self.steps_back + (self.corrector == "pseudo")

    @property
    def pattern(self) -> Pattern:
        past = past_outputs(self.window - 1)
        if self.corrector is None:
            return Pattern(("x",), ("x", "F0", *past, "one"), past)
        values = ("x", "base", "F0", *past, "one")
        return Pattern(("x",), values, {"base": values, **past}, copies=("base",))

    def use(self, valid: Any, steps: int) -> Any:
        """Which nodes the predictor uses, and which the corrector, of the step before: `[steps, 2, window]`."""
        p = np.minimum(orders(steps, self.steps_back, self.lower_order_final), np.arange(1, steps + 1))
        q = np.concatenate([[0], p[:-1] + (self.corrector == "pseudo")]) * (self.corrector is not None)
        return np.stack([valid & (np.arange(self.window) < limit[:, None]) for limit in (p, q)], axis=1)

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, c = namespace(nodes), self.statistics.ndim
        if valid.ndim == nodes.ndim:  # in diffeqsolve: whatever exists
            index, count = np.arange(self.window), xp.sum(valid, axis=-1, keepdims=True)
            before = xp.minimum(count - 1, self.steps_back) + (self.corrector == "pseudo")
            valid = xp.stack([valid & (index < self.steps_back), valid & (index < before)], axis=-2)
        lams = process.lam(nodes)
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        if is_concrete(lams, end.lam):
            self._check(lams, end.lam)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_x, of_p = self._output(prediction, start)
            ratio, predict, constant = self._step(start, lams, end, valid[..., 0, :], self.pseudo)
            wide = lambda part: xp.expand_dims(part, -1 - c)  # noqa: E731
            shift = dict.fromkeys(self.pattern.registers)
            if self.corrector is None:
                x = xp.concatenate([wide(ratio), predict, wide(constant)], axis=-1 - c)
                return Row(nodes[..., :1], wide(of_x), wide(of_p), (None,), x, shift)
            base = self._corrected(process, nodes, lams, start, valid[..., 1, :])
            x = wide(ratio) * base + xp.concatenate([wide(0 * ratio), wide(0 * ratio), predict, wide(constant)], axis=-1 - c)
        return Row(nodes[..., :1], wide(of_x), wide(of_p), (None,), x, {**shift, "base": base})

    def _check(self, lams: Any, end: Any) -> None:
        """Raises ValueError for times beyond the statistics."""
        first, last, slack = self.statistics.lam[0], self.statistics.lam[-1], 1e-6 * self.statistics.gap
        low, high = float(np.min(lams)), float(np.max(end))
        if not (low >= first - slack and high <= last + slack):
            raise ValueError(f"The statistics go from lam = {first:g} to {last:g}, the grid from {low:g} to {high:g}: estimate them on this grid.")

    def _output(self, prediction: str, at: Level) -> tuple[Any, Any]:
        """(A, B) of f = A x + B p."""
        eps = [trailing(part * at.sigma / at.alpha, self.statistics.ndim) for part in conversions(prediction, at)[1]]
        slope = self.statistics.at(at.lam)[0]
        return eps[0] - slope / trailing(at.alpha, self.statistics.ndim), eps[1] + 0 * slope

    def _points(self, first: Any, last: Any) -> tuple[Any, Any]:
        """Quadrature points in lam and their weights, `[..., q]`."""
        xp, first, last = namespace(first), first[..., None], last[..., None]
        if not self.published:
            return first + floating(GAUSS_POINTS, first) * (last - first), floating(GAUSS_WEIGHTS, first) * (last - first)
        at = xp.clip(floating(self.statistics.lam, first), first, last)
        padded = xp.concatenate([at[..., :1], at, at[..., -1:]], axis=-1)
        return at, (padded[..., 2:] - padded[..., :-2]) / 2

    def _step(self, start: Level, lams: Any, end: Level, valid: Any, pseudo: bool) -> tuple[Any, Any, Any]:
        """The weights in (2) of x, of f at the nodes `lams` `[..., k]`, the first of which is `start`, and of one."""
        xp, c = namespace(lams), self.statistics.ndim
        at, measure = self._points(lams[..., 0], end.lam)
        _, *nodes = self.statistics.at(lams)
        _, *inner = self.statistics.at(at)
        _, last, *_ = self.statistics.at(end.lam)
        first = [part[(..., slice(0, 1), *(slice(None),) * c)] for part in nodes]
        scale = trailing(end.alpha, c) * xp.exp(xp.squeeze(first[0], -1 - c) - last)
        growth = trailing(measure, c) * xp.exp((inner[0] - first[0]) + (inner[1] - first[1]))
        drift, shifts = (xp.exp(first[1]) * (part - first[2]) for part in (inner[2], nodes[2]))
        basis = (powers if pseudo else lagrange)(lams, valid, at)
        flat = growth.reshape((*growth.shape[: growth.ndim - c], -1))
        weight = (basis @ flat).reshape((*basis.shape[:-1], *growth.shape[growth.ndim - c :]))
        constant = scale * (xp.sum(weight * shifts, axis=-1 - c) - xp.sum(growth * drift, axis=-1 - c))
        return scale / trailing(start.alpha, c), -xp.expand_dims(scale, -1 - c) * weight * xp.exp(first[1] - nodes[1]), constant

    def _corrected(self, process: AbstractProcess, nodes: Any, lams: Any, end: Level, valid: Any) -> Any:
        """Y_i of (3) as weights of x, Y_{i-1}, f_i, f_{i-1}, ... and one; x alone where there is no corrector."""
        xp, c, k = namespace(nodes), self.statistics.ndim, nodes.shape[-1]
        some, swapped = valid[..., 1], np.array([1, 0, *range(2, k)])
        valid = xp.take(valid, swapped, axis=-1) & some[..., None]
        ratio, weight, constant = self._step(level(process, nodes[..., 1]), xp.take(lams, swapped, axis=-1), end, valid, self.corrector == "pseudo")
        weight = xp.take(weight, swapped, axis=-1 - c)
        parts = [xp.expand_dims(part, -1 - c) for part in (0 * ratio, ratio, constant)]
        found = xp.concatenate([*parts[:2], weight, parts[2]], axis=-1 - c)
        alone = floating(np.eye(1, k + 3)[0], nodes).reshape((k + 3,) + (1,) * c)
        return xp.where(some.reshape(some.shape + (1,) * (1 + c)), found, alone)
