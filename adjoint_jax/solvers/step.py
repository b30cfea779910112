"""The weights of one exponential multistep step: integrals of a Lagrange basis, or what published codes take for them.

`adjoint_jax.solvers.multistep` has the equations; (1)-(8) are its numbers.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .._numerics import GAUSS_POINTS, GAUSS_WEIGHTS, floating, lagrange, namespace, trailing
from ..networks import conversions
from ..processes import AbstractProcess
from ..splitting import Level, Splitting

VARIABLES = ("lam", "rho", "t", "theta")
RULES = ("exact", "midpoint", "bh1", "halved", "half", "sign", "bracket", "constant", "riemann", "vary_coeff")
RIEMANN_POINTS = 10_000
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
    def of(cls, splitting: Splitting, variable: str, process: AbstractProcess, end: Level, nodes: Any, valid: Any, lams: Any = None) -> "Step":
        """Nodes and ends at infinity in lam leave the polynomial, and numbers that do no harm take their places; sigma = 0 is finite in rho."""
        xp = namespace(nodes)
        lams = process.lam(nodes) if lams is None else lams
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

    def third_order(self, higher: Any, rule: str, whole: Any) -> Any:
        """`higher` with the weights of steps through three nodes changed by a multiple of the second divided difference, (5), (6)."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        w = xp.exp(-self.lams[..., :3]) if rule == "bracket" else self.lams[..., :3]
        three = (xp.sum(self.valid, axis=-1) == 3)[..., None] & self.valid[..., 1:3]
        gaps = xp.where(three, w[..., 1:] - w[..., :1], xp.asarray([1.0, 2.0], w.dtype))
        between = gaps[..., :1] - gaps[..., 1:]
        divided = xp.concatenate([1 / (gaps[..., :1] * between), -1 / (gaps[..., 1:] * between)], axis=-1)  # of F_j - F_0
        if rule == "bracket":
            h = xp.exp(-self.end.lam) - w[..., 0]
            excess = trailing(h * (h - gaps[..., 0]) - gaps[..., 0] * gaps[..., 1], c) / 2 * whole
        else:
            lam, measure = self._points(False)
            excess = xp.sum(trailing((lam - self.lams[..., :1]) ** 2, c) * measure, axis=-1 - c) / 2
        if rule == "sign":
            excess = excess + trailing((self.end.lam - self.lams[..., 0]) ** 2 * self.end.alpha, c)
        change = xp.where(trailing(three, c), trailing(divided, c) * xp.expand_dims(excess, -1 - c), 0)
        past = higher.shape[-1 - c] - 2
        rest = xp.zeros_like(higher[(..., slice(2, None), *(slice(None),) * c)])
        return higher - (xp.concatenate([change, rest], axis=-1 - c) if past else change)

    def riemann(self, total: Any) -> Any:
        """W_0, W_1, ... by the left Riemann sum of (8) in w = t or rho; `total` where there is no polynomial."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        in_rho = self.variable == "rho"
        known = xp.exp(-self.lams) if in_rho else self.nodes
        first, last = known[..., :1], (xp.exp(-self.end.lam) if in_rho else self.process.t_of_lam(self.end.lam))[..., None]
        at = first + floating(np.arange(RIEMANN_POINTS) / RIEMANN_POINTS, self.nodes) * (last - first)
        if in_rho:
            lam, rate = -xp.log(at), -1 / at
        else:
            d_alpha, d_sigma = self.process.rates(at)
            lam, rate = self.process.lam(at), d_alpha / self.process.alpha(at) - d_sigma / self.process.sigma(at)
        measure = trailing(rate * (last - first) / RIEMANN_POINTS, c) * self.splitting.density(lam, self.end)
        basis = trailing(lagrange(known, self.valid, at), c)
        found = xp.sum(xp.where(basis != 0, basis * xp.expand_dims(measure, -2 - c), 0), axis=-1 - c)
        some = trailing(self.valid[..., :1] | (np.arange(self.nodes.shape[-1]) > 0), c)
        return xp.where(some, found, xp.expand_dims(total, -1 - c))

    def _moments(self, most: int, h: Any) -> list[Any]:
        """int (lam - lam_0)^k / (k! h^k) in x, k = 0 .. most."""
        xp, c = namespace(self.nodes), self.splitting.ndim
        lam, measure = self._points(False)
        along = (lam - self.lams[..., :1]) / h
        return [xp.sum(trailing(along**k, c) * measure, axis=-1 - c) / math.factorial(k) for k in range(most + 1)]

    def vary_coeff(self, whole: Any) -> Any:
        """UniPC's published corrector "vary_coeff" through the nodes (start, end, past ...).

        With K differences D_i = (F_i - F_0)/r_i, the new point's last, and A the inverse of r_i^k/(k+1)!, it takes sum_{k < K-1} M_{k+1} A_k
        for the past ones and, by a loop index left over, M_K A_{K-2} instead of sum_k M_{k+1} A_k for the new one.
        """
        xp, c, nodes = namespace(self.nodes), self.splitting.ndim, self.nodes.shape[-1]
        count = xp.sum(self.valid, axis=-1)
        h = xp.where((count > 1)[..., None], self.end.lam[..., None] - self.lams[..., :1], 1)
        moments = self._moments(nodes - 1, h)
        found = [xp.zeros_like(whole)] * nodes
        for most in range(1, nodes):
            here = count == most + 1
            index = [*range(2, most + 1), 1]
            r = (self.lams[..., index] - self.lams[..., :1]) / h
            r = xp.where(here[..., None], r, xp.arange(1, most + 1, dtype=r.dtype))
            a = xp.linalg.inv(xp.stack([r**k / math.factorial(k + 1) for k in range(most)], axis=-1))
            for i, j in enumerate(index):
                last = i == most - 1
                rows = [max(most - 2, 0)] if last else range(most - 1)
                term = sum(moments[most if last else k + 1] * trailing(a[..., k, i] / r[..., i], c) for k in rows)
                found[j] = xp.where(trailing(here, c), term, found[j])
        found[0] = whole - sum(found[1:])
        return xp.stack(found, axis=-1 - c)

    def constant(self, whole: Any) -> Any:
        """W_1, W_2, ... of (7)."""
        xp, c, k = namespace(self.nodes), self.splitting.ndim, self.nodes.shape[-1]
        table = floating(ADAMS_BASHFORTH[:, 1:k], self.nodes)
        b = xp.take(table, xp.maximum(xp.sum(self.valid, axis=-1) - 1, 0), axis=0)
        return trailing(b, c) * xp.expand_dims(whole, -1 - c)


def weights(step: Step, total: Any, rule: str) -> Any:
    """W_0, W_1, ... of (1), `[..., k, *c]`, where `total` is their sum."""
    xp, c = namespace(step.nodes), step.splitting.ndim
    if rule == "riemann":
        return step.riemann(total)
    if rule == "vary_coeff":
        return step.vary_coeff(total)
    first = xp.expand_dims(total, -1 - c)
    if step.nodes.shape[-1] == 1:
        return first
    higher = step.constant(total) if rule == "constant" else step.exact()
    if rule in ("halved", "half", "sign", "bracket") and step.nodes.shape[-1] > 2:
        higher = step.third_order(higher, rule, total)
    if rule in ("midpoint", "halved", "sign"):
        higher = step.second_order(higher, total)
    if rule == "bh1":
        h = step.end.lam - step.lams[..., 0]
        higher = step.second_order(higher, trailing(h, c) * step.splitting.density(step.end.lam[..., None], step.end)[_last(c)])
    return xp.concatenate([first - xp.sum(higher, axis=-1 - c, keepdims=True), higher], axis=-1 - c)


def _last(c: int) -> tuple:
    """The only quadrature point, c axes before the end."""
    return (..., 0, *(slice(None),) * c)
