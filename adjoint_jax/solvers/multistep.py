"""Exponential multistep methods: one class, told apart by a splitting, a variable, an order and a rule.

With z and F of the splitting (`adjoint_jax.splitting`), integrate the polynomial through the last outputs exactly:

    x_{i+1} = (m_{i+1}/m_i) x_i + sum_{j<k} W_j F_{i-j} + s_i z_i,      W_j = m_{i+1} int_{u_i}^{u_{i+1}} l_j(w(u)) du,  (1)
    F_i = A_i x_i + B_i p_i                                   (the prediction p of any kind is linear in (x, F))      (2)

with l_j the Lagrange basis in the variable w = lam, rho, t or theta, and s_i z_i the noise of a stochastic splitting. c infinite: w = t is
tAB-DEIS, w = rho is rhoAB-DEIS, w = lam is diffusers' DEIS and DPM-Solver; c = 0: w = lam is DPM-Solver++. Published rules differ:

    "midpoint"   second-order steps have W_1 = -(h_i / (2 h_{i-1})) sum_j W_j: DPM-Solver(++)-2M, UniPC's bh2         (3)
    "bh1"        second-order steps have W_1 = -(h_i / (2 h_{i-1})) h_i m_{i+1} du/dlam: UniPC's bh1                  (4)
    "halved"     "midpoint", and third-order steps with half of the second derivative: DPM-Solver(++)-3M as published (5)
    "half"       (5) with exact second-order steps
    "constant"   W_j = b_j sum_j W_j with the Adams-Bashforth coefficients b of even steps: iPNDM                      (6)

Order: k, where F varies little in the first steps (it does from noise with lam <= -4). Step i < k has order i + 1 only, which caps the
global order at 2 elsewhere. A step into sigma = 0 or out of alpha = 0 has infinite length in lam and is of first order, but for w = rho
and c infinite, which reach sigma = 0 in full order (k-diffusion's LMS).
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from .._numerics import GAUSS_POINTS, GAUSS_WEIGHTS, broadcasting, floating, lagrange, namespace, trailing
from ..networks import conversions
from ..processes import AbstractProcess
from ..splitting import Level, Splitting, level
from .linear import AbstractLinear, Pattern, Row, Sum

VARIABLES = ("lam", "rho", "t", "theta")
RULES = ("exact", "midpoint", "bh1", "halved", "half", "constant")
ADAMS_BASHFORTH = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]])


def output(splitting: Splitting, prediction: str, at: Level) -> tuple[Any, Any]:
    """(A, B) of (2), with the axes of sigma_data behind those of the times."""
    of_eps, of_x0 = splitting.field(at)
    x0, eps = (kind._make(trailing(part, splitting.ndim) for part in kind) for kind in conversions(prediction, at))
    parts = [kind.scaled(by) for kind, by in ((eps, of_eps), (x0, of_x0)) if by is not None]
    return tuple(parts[0] if len(parts) == 1 else parts[0].plus(parts[1]))


def _coordinate(variable: str, splitting: Splitting, process: AbstractProcess, lam: Any, t: Any = None) -> Any:
    """The variable w at half log-SNR `lam` (or at time t, where that is known)."""
    xp = namespace(lam)
    if variable == "t":
        return process.t_of_lam(lam) if t is None else t
    if variable == "rho":
        return xp.exp(-lam)
    return lam if variable == "lam" else xp.arctan2(xp.exp(-lam), floating(splitting.sigma_data, lam))


class Step(NamedTuple):
    """One step's integral: from the first of `nodes` `[..., k]` to `end`, through those that are `valid`, in a splitting and a variable."""

    splitting: Splitting
    variable: str
    process: AbstractProcess
    end: Level
    nodes: Any
    lams: Any
    valid: Any

    @classmethod
    def of(cls, splitting: Splitting, variable: str, process: AbstractProcess, end: Level, nodes: Any, valid: Any) -> "Step":
        """Nodes and ends at infinity in lam leave the polynomial, and numbers that do no harm take their places; sigma = 0 is finite in rho."""
        xp = namespace(nodes)
        lams = process.lam(nodes)
        ends = xp.isfinite(end.lam) | xp.asarray(variable == "rho" and splitting.kind == "noise")
        valid = valid & xp.isfinite(lams) & ends[..., None] & xp.isfinite(lams[..., :1])
        lams = xp.where(xp.isfinite(lams), lams, 0)
        return cls(splitting, variable, process, end._replace(lam=xp.where(ends, end.lam, 1)), nodes, lams, valid)

    def _points(self, in_rho: bool) -> tuple[Any, Any]:
        """Quadrature points in lam, `[..., q]`, and their weights in x with the axes of c behind."""
        xp = namespace(self.nodes)
        points, weights = floating(GAUSS_POINTS, self.nodes), floating(GAUSS_WEIGHTS, self.nodes)
        first, last = self.lams[..., :1], self.end.lam[..., None]
        if in_rho:
            rho = xp.exp(-first) + points * (xp.exp(-last) - xp.exp(-first))
            lam, measure = -xp.log(rho), weights * (xp.exp(-first) - xp.exp(-last)) / rho
        else:
            lam, measure = first + points * (last - first), weights * (last - first)
        return lam, trailing(measure, self.splitting.ndim) * self.splitting.density(lam, self.end)

    def exact(self) -> Any:
        """W_1, W_2, ... of (1) by quadrature in lam (or rho, where that is w): `[..., k - 1, *c]`."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        lam, measure = self._points(self.variable == "rho")
        known = _coordinate(self.variable, self.splitting, self.process, self.lams, self.nodes)
        basis = lagrange(known, self.valid, _coordinate(self.variable, self.splitting, self.process, lam))
        return xp.sum(trailing(basis[..., 1:, :], c) * xp.expand_dims(measure, -2 - c), axis=-1 - c)

    def second_order(self, higher: Any, whole: Any) -> Any:
        """`higher` with the weights of steps through two nodes replaced: half of `whole` for the difference over a step, (3), (4)."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        h = (self.end.lam - self.lams[..., 0])[..., None]
        two = (xp.sum(self.valid, axis=-1) == 2)[..., None] & self.valid[..., 1:]
        gap = xp.where(two, self.lams[..., 1:] - self.lams[..., :1], 1)
        return xp.where(trailing(two, c), trailing(h / (2 * gap), c) * xp.expand_dims(whole, -1 - c), higher)

    def halved(self, higher: Any) -> Any:
        """`higher` with the weights of steps through three nodes changed by minus half of the second derivative's term, (5)."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        lam, measure = self._points(False)
        half = xp.sum(trailing((lam - self.lams[..., :1]) ** 2, c) * measure, axis=-1 - c) / 2
        three = (xp.sum(self.valid, axis=-1) == 3)[..., None] & self.valid[..., 1:3]
        gaps = xp.where(three, self.lams[..., 1:3] - self.lams[..., :1], xp.asarray([1.0, 2.0], self.lams.dtype))
        between = gaps[..., :1] - gaps[..., 1:]
        divided = xp.concatenate([1 / (gaps[..., :1] * between), -1 / (gaps[..., 1:] * between)], axis=-1)  # of F_j - F_0
        change = xp.where(trailing(three, c), trailing(divided, c) * xp.expand_dims(half, -1 - c), 0)
        past = higher.shape[-1 - c] - 2
        rest = xp.zeros_like(higher[(..., slice(2, None), *(slice(None),) * c)])
        return higher - (xp.concatenate([change, rest], axis=-1 - c) if past else change)

    def moments(self, most: int) -> list[Any]:
        """int (lam - lam_0)^k / (k! h^k) in x, k = 0 .. most."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        lam, measure = self._points(False)
        along = (lam - self.lams[..., :1]) / (self.end.lam[..., None] - self.lams[..., :1])
        return [xp.sum(trailing(along**k, c) * measure, axis=-1 - c) / math.factorial(k) for k in range(most + 1)]

    def constant(self, whole: Any) -> Any:
        """W_1, W_2, ... of (6)."""
        xp, c, k = namespace(self.nodes), self.splitting.ndim, self.nodes.shape[-1]
        table = floating(ADAMS_BASHFORTH[:, 1:k], self.nodes)
        b = xp.take(table, xp.maximum(xp.sum(self.valid, axis=-1) - 1, 0), axis=0)
        return trailing(b, c) * xp.expand_dims(whole, -1 - c)


def weights(step: Step, total: Any, rule: str) -> Any:
    """W_0, W_1, ... of (1), `[..., k, *c]`, where `total` is their sum."""
    xp, c = namespace(step.nodes), step.splitting.ndim
    first = xp.expand_dims(total, -1 - c)
    if step.nodes.shape[-1] == 1:
        return first
    higher = step.constant(total) if rule == "constant" else step.exact()
    if rule in ("halved", "half") and step.nodes.shape[-1] > 2:
        higher = step.halved(higher)
    if rule in ("midpoint", "halved"):
        higher = step.second_order(higher, total)
    if rule == "bh1":
        h = step.end.lam - step.lams[..., 0]
        higher = step.second_order(higher, trailing(h, c) * step.splitting.density(step.end.lam[..., None], step.end)[_last(c)])
    return xp.concatenate([first - xp.sum(higher, axis=-1 - c, keepdims=True), higher], axis=-1 - c)


def _last(c: int) -> tuple:
    """The only quadrature point, c axes before the end."""
    return (..., 0, *(slice(None),) * c)


class AbstractMultistep(AbstractLinear):
    """Equations (1)-(6) with k = `steps_back`."""

    steps_back: eqx.AbstractVar[int]
    splitting: eqx.AbstractVar[Splitting]
    variable: eqx.AbstractVar[str]
    rule: eqx.AbstractVar[str]
    lower_order_final: eqx.AbstractVar[Any]

    def order(self, terms: Any) -> int:
        return self.steps_back

    @property
    def window(self) -> int:
        return self.steps_back

    @property
    def pattern(self) -> Pattern:
        past = [f"f{j}" for j in range(1, self.steps_back)]
        noise = ("z0",) if self.splitting.stochastic else ()
        shifted: dict[str, Sum] = dict(zip(past, ["F0", *past[:-1]], strict=False))
        return Pattern(reads=("x",), x=("x", "F0", *past, *noise), registers=shifted, draws=len(noise))

    def use(self, valid: Any, steps: int) -> Any:
        return valid & (np.arange(self.window) < orders(steps, self.steps_back, self.lower_order_final)[:, None])

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        xp, splitting, c = namespace(nodes), self.splitting, self.splitting.ndim
        start, end = level(process, nodes[..., 0]), level(process, t_end)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = splitting.scale(end) / splitting.scale(start)
            step = Step.of(splitting, self.variable, process, end, nodes, valid)
            parts = [xp.expand_dims(ratio, -1 - c), weights(step, splitting.step(start, end), self.rule)]
            if splitting.stochastic:
                parts.append(xp.expand_dims(splitting.noise(start, end), -1 - c))
            of_x, of_p = (xp.expand_dims(part, -1 - c) for part in output(splitting, prediction, start))
        shift = dict.fromkeys(self.pattern.registers)
        return Row(nodes[..., :1], of_x, of_p, (None,), xp.concatenate(parts, axis=-1 - c), shift)


def orders(steps: int, order: int, lower_order_final: Any) -> np.ndarray:
    """The order of each step, `[steps]`, before warm-up: `order`, or less in the last steps.

    `lower_order_final`: False, never; True, min(order, steps left); a number n, so on grids of fewer than n steps; "euler", the last
    step alone; or the orders themselves, one a step.
    """
    left = np.arange(steps, 0, -1)
    if isinstance(lower_order_final, tuple):
        if len(lower_order_final) != steps:
            raise ValueError(f"One order a step: got {len(lower_order_final)} orders for {steps} steps.")
        return np.minimum(order, lower_order_final)
    if lower_order_final == "euler":
        return np.where(left == 1, 1, order)
    lower = lower_order_final if isinstance(lower_order_final, bool) else steps < lower_order_final
    return np.minimum(order, left) if lower else np.full(steps, order)


def checked_order(order: int, most: int, name: str) -> int:
    if order not in range(1, most + 1):
        raise ValueError(f"{name} has orders 1 to {most}; got order={order!r}.")
    return int(order)


def checked_variable(variable: str, splitting: Splitting) -> str:
    if variable not in VARIABLES:
        raise ValueError(f"variable={variable!r} is not known: use one of {', '.join(VARIABLES)}.")
    if variable == "theta" and (splitting.kind != "finite" or splitting.ndim):
        raise ValueError("variable='theta' is the angle of one finite sigma_data: use 'rho' or 'lam' with 0, infinity or an array.")
    return variable
