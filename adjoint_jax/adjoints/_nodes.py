"""Which of the sampler's own times a continuous adjoint visits, and its weights there.

The states follow dx = [alpha'/alpha x - kappa g^2/2 score] dt + tau g dw, kappa = 1 + tau^2; tau = 0 is the ODE. The noise is additive: it enters the
adjoint a = dL/dx through x alone. With L = log rho = -lam growing from data to noise, w = m^kappa alpha^(1-kappa) a (m of the splitting) obeys

    dw/dL = kappa (f w - m^kappa alpha^(1-kappa) sigma J_eps^T a),   f = rho^2/(c^2 + rho^2),                         (1)
    dL/dcond = -kappa int sigma (d eps/d cond)^T a dL,      dL/dz_i = G_i^T a(t_{i+1}),      x_{i+1} = ... + G_i z_i,

and Adams methods integrate it by w_{k+1} = w_k + sum_j P_kj g_{k-j} (Bashforth), w_k = w_{k-1} + sum_j C_kj g_{k-j} (Moulton); Heun's has
P_k0 = L_{k+1} - L_k alone and the trapezoid for C. The first q - 1 steps of a method of order q integrate from node 0 each time (they are
`anchored` there), through all nodes so far: w_1, of low order, then enters w_2 through g_1 alone, and the start costs no order (AB: at most
order 3). Where those steps differ by more than a factor of two, a polynomial through all of them is wild (error 0.74 instead of 0.08 on the
digits' grid uniform in t), and the start is the ordinary one, of order 2.

What is asked of an interval [t_i, t_{i+1}] of the grid between nodes k - 1 and k is found through the nodes:

    dL/dcond_i = sum_k Q_ik sigma_k (d eps/d cond)_k^T a_k,     Q_i = int over the interval of the polynomials of step k - 1 -> k,     (2)
    w(t_{i+1}) = the cubic in L with the values and the slopes (1) of both nodes (AB: of one slope, in the last step),

and the gradient in a leaf that all intervals share has the weights sum_i Q_ik. The published rules integrate instead

    dw/drho = -kappa alpha J_eps^T w,   w = alpha a:   P_k0 = rho_{k+1} (e^h - 1),   h = lam_{k+1} - lam_k < 0        (3)

(AdjointDEIS-1); AdjointDEIS-2M adds (h / (2 h_{k-1})) P_k0 times the difference of the last two, and its interval has of Q the share that it has of
the step in rho. With exact weights, drho = e^L dL: P_kj = int e^L l_j(L) dL, and Q likewise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .._numerics import adams_weights, broadcasting, floating, is_concrete, namespace, past_nodes
from ..networks import conversions
from ..splitting import Splitting, level
from ..terms import DiffusionTerm


class Rule(NamedTuple):
    """What `AdjointDEIS` was asked for."""

    order: int
    integral_order: int
    mode: str = "PECE"
    published: bool | str = False


class Nodes(NamedTuple):
    """The nodes k = 0 (data) .. K - 1 (noise); every array has leading axis K.

    `reach` multiplies the cotangent of eps in dw (-kappa sigma in (1), alpha kappa with the sign of P in (3)); eps = of_x x + of_p p.
    """

    t: Any
    scale: Any
    fraction: Any
    reach: Any
    of_x: Any
    of_p: Any
    predict: Any
    correct: Any
    gather: Any
    anchored: Any


class Intervals(NamedTuple):
    """The intervals i of the grid between the nodes, in the order of generation, `[n, ...]`.

    `spread`: Q of (2), `[n, K]`; `top`: the node k; w(t_{i+1}) is the sum of `near` `[n, 4]` times (w_{k-1}, w_k, g_{k-1}, g_k), a is w / `scale`.
    """

    spread: Any
    top: Any
    near: Any
    scale: Any


def choose(ts: Any, lams: Any, steps: int | None, nodes: str | Sequence[int], name: str = "AdjointDEIS") -> np.ndarray:
    """Indices of the grid from data to noise. Intervals of infinite length in lam at either end are left out: they are differentiated exactly."""
    n = len(ts) - 1
    low, high = 0, n
    if is_concrete(lams):
        low, high = int(np.isneginf(lams[0])), n - int(np.isposinf(lams[-1]))
    if low > high:
        return np.zeros(0, int)
    if not isinstance(nodes, str):
        return _given(nodes, n, low, high)
    if steps is None:
        return np.arange(low, high + 1)[::-1]
    if not 1 <= steps <= n:
        raise ValueError(f"{name}(steps={steps}) takes its nodes among the sampler's {n} intervals: choose steps between 1 and {n}.")
    steps = min(steps, high - low)
    if nodes == "index":
        return np.unique(np.round(np.linspace(low, high, steps + 1)).astype(int))[::-1]
    if nodes not in ("lam", "t"):
        raise ValueError(f'nodes={nodes!r} is not known: use "lam", "t", "index" or a sequence of indices of the grid.')
    if not is_concrete(ts, lams):
        raise ValueError(f'{name}(steps={steps}, nodes="{nodes}") measures the grid which is traced here: use nodes="index" or a concrete grid.')
    along = np.asarray(lams if nodes == "lam" else ts)[low : high + 1]
    targets = np.linspace(along[0], along[-1], steps + 1)
    return np.unique(np.abs(along[:, None] - targets[None]).argmin(axis=0) + low)[::-1]


def _given(nodes: Sequence[int], n: int, low: int, high: int) -> np.ndarray:
    index = np.asarray(nodes)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer) or (index < 0).any() or (index > n).any():
        raise ValueError(f"nodes must be indices of the grid, integers from 0 to {n}; got {nodes!r}.")
    return np.unique(np.append(np.clip(index, low, high), [low, high]))[::-1]


@broadcasting
def lay_out(term: DiffusionTerm, splitting: Splitting, ts: Any, index: np.ndarray, rule: Rule) -> tuple[Nodes, Intervals]:
    """The weights at the nodes `index` of the grid `ts`, with the stochasticity of the splitting."""
    grid = level(term.process, ts[index[-1] : index[0] + 1])
    xp, count, kappa = namespace(grid.lam), len(index), 1 + splitting.tau**2
    at = grid.at(index - index[-1])
    logs = -at.lam
    growth = 1.0 if rule.published == "exact" else 0.0
    nodes, valid = past_nodes(logs, rule.order, extra=1)
    following = np.arange(1, count + 1)
    anchored = (following < rule.order) & (following < count) & (rule.published is not True) & _even(logs, rule.order)
    zero, start = xp.zeros_like(nodes[:1]), xp.where(anchored[:-1], logs[0], logs[:-1])
    ahead = valid[:-1] & (np.arange(rule.order) < 1) if rule.mode == "Heun" else valid[:-1]
    bashforth = lambda: adams_weights(nodes[:-1], ahead, start, logs[1:], growth)  # noqa: E731
    predict = published_weights(at.lam, rule.order) if rule.published is True else bashforth()
    correct = xp.concatenate([zero, adams_weights(nodes[1:], valid[1:], start, logs[1:])])
    reach = kappa * (-at.sigma if not rule.published else at.alpha if rule.published is True else -at.alpha)
    _, eps = conversions(term.prediction, at)
    intervals = _intervals(splitting, grid, logs, index, rule, growth)
    fraction = kappa * splitting.noise_fraction(at)
    predict = xp.concatenate([predict, zero])
    return Nodes(ts[index], splitting.scale(at), fraction, reach, *eps, predict, correct, xp.sum(intervals.spread, axis=0), anchored), intervals


def _intervals(splitting: Splitting, grid: Any, logs: Any, index: np.ndarray, rule: Rule, growth: float) -> Intervals:
    """(2)."""
    xp, bashforth = namespace(logs), rule.mode == "AB"
    top = np.searchsorted(-index, -np.arange(index[-1], index[0]))
    start, end = -grid.lam[1:], -grid.lam[:-1]
    if rule.published is True:
        share = xp.exp(start - logs[top - 1]) * xp.expm1(end - start) / xp.expm1(logs[top] - logs[top - 1])
        steps = published_weights(-logs, rule.integral_order)
        spread = _by_node(steps[top - 1] * share[:, None], top - 1, len(index))
    else:
        spread = quadrature(logs, rule.integral_order, len(index) - 1 if bashforth else len(index), top, start, end, growth)
    along = (lambda log: -xp.exp(log)) if rule.published is True else xp.exp if growth else lambda log: log
    length = along(logs[top]) - along(logs[top - 1])
    s = (along(start) - along(logs[top - 1])) / length
    near = xp.stack([(1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s), s * (1 - s) ** 2 * length, -(s**2) * (1 - s) * length], axis=-1)
    one_slope = xp.stack([1 - s**2, s**2, s * (1 - s) * length, 0 * s], axis=-1)
    near = xp.where((bashforth & (top == len(index) - 1))[:, None], one_slope, near)
    return Intervals(spread, top, near, splitting.scale(grid.at(slice(1, None))))


def quadrature(logs: Any, order: int, count: int, top: np.ndarray, start: Any, end: Any, growth: float) -> Any:
    """Weights `[n, K]` of int e^(growth L) dL from `start` to `end`, before node `top`, by polynomials through `order` of the first `count` nodes."""
    xp = namespace(logs)

    def through(last: np.ndarray) -> Any:
        index = np.minimum(last, max(count - 1, 0))[:, None] - np.arange(order)[None]
        weights = adams_weights(xp.take(logs, np.maximum(index, 0), axis=0), index >= 0, start, end, growth)
        return _by_node(weights, index[:, 0], len(logs))

    return xp.where(_even(logs, order), through(np.maximum(top, order - 1)), through(top))


def _even(logs: Any, order: int) -> Any:
    """Whether the first steps differ by no more than a factor of two: only then may a start of full order span them."""
    xp = namespace(logs)
    steps = xp.diff(logs[: order + 1])
    return xp.max(steps) <= 2 * xp.min(steps) if len(logs) > 1 else False


def _by_node(weights: Any, last: np.ndarray, count: int) -> Any:
    """`[n, K]`: weights[i, j] at node last[i] - j."""
    nodes = np.arange(count)[None]
    return sum(weights[:, j, None] * floating(last[:, None] - j == nodes, weights) for j in range(weights.shape[1]))


def published_weights(lams: Any, order: int) -> Any:
    """P of (3) for the steps between nodes at half log-SNR `lams`, `[K - 1, order]` (Blasingame & Liu 2024, AdjointDEIS-1 and -2M)."""
    xp = namespace(lams)
    h = xp.diff(lams)
    first = xp.exp(-lams[1:]) * xp.expm1(h)
    if order == 1:
        return first[:, None]
    ratio = xp.concatenate([xp.zeros_like(h[:1]), h[1:] / (2 * h[:-1])])
    return xp.stack([first * (1 + ratio), -first * ratio], axis=-1)
