"""Which of the sampler's own times a continuous adjoint visits, and its weights there.

With L = log rho = -lam growing from data to noise, the scaled adjoint w = m a (m of the splitting, a = dL/dx) obeys

    dw/dL = f w - m sigma J_eps^T a,     f = rho^2/(c^2 + rho^2),     dL/dcond = -int sigma (d eps/d cond)^T a dL,     (1)

and Adams methods integrate it by w_{k+1} = w_k + sum_j P_kj g_{k-j} (Bashforth), w_k = w_{k-1} + sum_j C_kj g_{k-j} (Moulton), with the
integral of the conditioning by polynomials through the same nodes, gathered by node: sum_k Q_k (...)_k. The first q - 1 steps of a
method of order q integrate from node 0 each time (they are `anchored` there), through all nodes so far: w_1, of low order, then enters
w_2 through g_1 alone, and the start costs no order (AB: at most order 3). Where those steps differ by more than a factor of two, a
polynomial through all of them is wild (error 0.74 instead of 0.08 on the digits' grid uniform in t), and the start is the ordinary one,
of order 2. The published rules integrate instead

    dw/drho = -alpha J_eps^T w,   w = alpha a:   P_k0 = rho_{k+1} (e^h - 1),   h = lam_{k+1} - lam_k < 0               (2)

(AdjointDEIS-1); AdjointDEIS-2M adds (h / (2 h_{k-1})) P_k0 times the difference of the last two.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .._numerics import adams_weights, broadcasting, floating, is_concrete, namespace, past_nodes
from ..networks import conversions
from ..splitting import Splitting, level
from ..terms import DiffusionTerm


class Nodes(NamedTuple):
    """The nodes k = 0 (data) .. K - 1 (noise); every array has leading axis K.

    `reach` multiplies the cotangent of eps (sigma, or alpha where published); eps = of_x x + of_p p.
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
def lay_out(term: DiffusionTerm, splitting: Splitting, t: Any, order: int, bashforth: bool, published: bool) -> Nodes:
    """The weights at times t from data to noise."""
    xp, count = namespace(t), len(t)
    at = level(term.process, t)
    logs = -at.lam
    nodes, valid = past_nodes(logs, order, extra=1)
    following = np.arange(1, count + 1)
    anchored = (following < order) & (following < count) & (not published) & _even(logs, order)
    zero, start = xp.zeros_like(nodes[:1]), xp.where(anchored[:-1], logs[0], logs[:-1])
    predict = published_weights(at.lam, order) if published else adams_weights(nodes[:-1], valid[:-1], start, logs[1:])
    correct = xp.concatenate([zero, adams_weights(nodes[1:], valid[1:], start, logs[1:])])
    gather = _by_node(predict, np.arange(count - 1), count) if published else quadrature(logs, order, count - 1 if bashforth else count)
    _, eps = conversions(term.prediction, at)
    fraction, reach = splitting.noise_fraction(at), at.alpha if published else at.sigma
    return Nodes(t, splitting.scale(at), fraction, reach, *eps, xp.concatenate([predict, zero]), correct, gather, anchored)


def quadrature(logs: Any, order: int, count: int) -> Any:
    """Weights `[K]` of int dL over all intervals, each by a polynomial through `order` of the first `count` nodes."""
    xp = namespace(logs)

    def through(top: np.ndarray) -> Any:
        index = np.minimum(top, max(count - 1, 0))[:, None] - np.arange(order)[None]
        weights = adams_weights(xp.take(logs, np.maximum(index, 0), axis=0), index >= 0, logs[:-1], logs[1:])
        return _by_node(weights, index[:, 0], len(logs))

    ends = np.arange(1, len(logs))
    return xp.where(_even(logs, order), through(np.maximum(ends, order - 1)), through(ends))


def _even(logs: Any, order: int) -> Any:
    """Whether the first steps differ by no more than a factor of two: only then may a start of full order span them."""
    xp = namespace(logs)
    steps = xp.diff(logs[: order + 1])
    return xp.max(steps) <= 2 * xp.min(steps) if len(logs) > 1 else False


def _by_node(weights: Any, top: np.ndarray, count: int) -> Any:
    """Adds weights[i, j] to node top[i] - j."""
    xp, index = namespace(weights), top[:, None] - np.arange(weights.shape[1])[None]
    hits = (index[..., None] == np.arange(count)).astype(np.float64)
    return xp.sum(weights[..., None] * floating(hits, weights), axis=(0, 1))


def published_weights(lams: Any, order: int) -> Any:
    """P of (2) for the steps between nodes at half log-SNR `lams`, `[K - 1, order]` (Blasingame & Liu 2024, AdjointDEIS-1 and -2M)."""
    xp = namespace(lams)
    h = xp.diff(lams)
    first = xp.exp(-lams[1:]) * xp.expm1(h)
    if order == 1:
        return first[:, None]
    ratio = xp.concatenate([xp.zeros_like(h[:1]), h[1:] / (2 * h[:-1])])
    return xp.stack([first * (1 + ratio), -first * ratio], axis=-1)
