"""The nodes and weights of an interpolated adjoint by least squares on what a pilot recorded, on the host.

Of r_i, u_i (`adjoint_jax.adjoints.interpolated`) and g_i = u_i^T dp_i/dtheta at every step of a pilot all that is needed is their products, G.
Between nodes j > k, step i is fitted by r at k and the last order - 1 nodes before it, and u_i; and before r at k is known, by the last order
nodes. An error of r_i enters dL/dx_i as

    e_i = |S_i / (sigma_i b_i)| ||r_i - sum_m w_m r_m - w_u u_i|| / ||dL/dx_i||,      eps = a x + b p,                    (1)

and that of the way ahead enters r at the node, so that a gap costs sum_i e_i^2 + ||S_k r_k / (sigma_k b_k)||^2 / ||dL/dx_k||^2 sum_i (e_i ahead)^2.
The M nodes are those of least cost, by dynamic programming over the gaps. Predicted error: the root of the cost.
"""

from typing import Any, NamedTuple

import numpy as np

from .._paths import cheapest_nodes
from ._interpolation import Rule, Way

LONGEST_GAP = 64


class Record(NamedTuple):
    """What a pilot saw at steps 0 .. N - 1: r and u `[N, pilots, images, size]`, ||dL/dx_i|| `[N, pilots, images]`, S/(sigma b) `[N]`, half log-SNR
    `[N]`, and g of each leaf `[N, pilots, size]`."""

    r: Any
    u: Any
    size: Any
    reach: Any
    lam: Any
    leaves: list


class Moments:
    """G of r and u, each image to the scale of its u; G of each leaf."""

    def __init__(self, record: Record, order: int):
        self.n, self.order, self.lam = len(record.r), order, _finite(record.lam)
        r, u, size = (np.asarray(part, np.float64) for part in (record.r, record.u, record.size))
        scale = np.mean(np.linalg.norm(u, axis=-1), axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        both = (np.concatenate([r, u]) / scale[..., None]).reshape(2 * self.n, -1)
        self.gram = both @ both.T
        self.ridge = max(1e-14, 1e-2 * float(np.finfo(np.asarray(record.r).dtype).eps))
        self.influence = np.asarray(record.reach) ** 2 / np.maximum(np.sum((size / scale) ** 2, axis=(1, 2)), 1e-300)
        flat = [np.asarray(leaf, np.float64).reshape(self.n, -1) for leaf in record.leaves]
        self.leaves = [leaf @ leaf.T for leaf in flat]

    def fit(self, targets: np.ndarray, known: Any) -> tuple[np.ndarray, np.ndarray]:
        """Weights of r at `known` and of u for r at `targets`, `[targets, known + 1]`, and the squared errors that are left."""
        places = np.concatenate([np.broadcast_to(np.asarray(known, int), (len(targets), len(known))), self.n + targets[:, None]], axis=1)
        inner, right = self.gram[places[:, :, None], places[:, None, :]], self.gram[places, targets[:, None]]
        weights = _solved(inner, right, self.ridge)
        left = self.gram[targets, targets] - 2 * np.sum(weights * right, axis=1) + np.einsum("ta,tab,tb->t", weights, inner, weights)
        return weights, np.maximum(left, 0)

    def costs(self) -> np.ndarray:
        """(1), squared and summed over the steps between nodes, in the order of the sweep: node m is step N - 1 - m; column N: no further node."""
        n, q = self.n, self.order
        found = np.full((n + 1, n + 1), np.inf)
        for j in range(n):
            past = list(range(j, min(j + q, n)))
            found[n - 1 - j, n] = self._cost(np.arange(j), past)
            for k in range(max(j - 1 - LONGEST_GAP, 0), j):
                steps = np.arange(k + 1, j)
                within, before = self._cost(steps, [k, *past[: q - 1]]), self._cost(steps, past)
                found[n - 1 - j, n - 1 - k] = within + self.influence[k] * self.gram[k, k] * before
        return found

    def _cost(self, targets: np.ndarray, known: list[int]) -> float:
        return float(np.sum(self.influence[targets] * self.fit(targets, known)[1])) if len(targets) else 0.0


def fitted_rule(record: Record, order: int, steps: int | None, tol: float) -> tuple[Rule, float]:
    """The rule for `steps` nodes, or for as few as the predicted error `tol` allows; and its predicted error."""
    moments = Moments(record, order)
    costs = moments.costs()

    def chosen(count: int) -> tuple[np.ndarray, float]:
        path = cheapest_nodes(costs, count, coefficient=1.0)
        return len(costs) - 2 - path[:-1], float(np.sqrt(np.sum(costs[path[:-1], path[1:]])))

    if steps is None:
        low, steps = 0, moments.n
        while steps - low > 1:
            middle = (low + steps) // 2
            low, steps = (low, middle) if chosen(middle)[1] <= tol else (middle, steps)
    index, predicted = chosen(steps)
    return _rule(moments, index), predicted


def _rule(moments: Moments, index: np.ndarray) -> Rule:
    q, m = moments.order, len(index)
    tops, counts = np.append(index[0], index[:-1]) - 1, np.append(0, index[:-1] - index[1:] - 1)
    ahead, between = np.zeros((2, m, max(counts.max(), 1), q + 1))
    for k in range(1, m):
        steps = tops[k] - np.arange(counts[k])
        ahead[k, : counts[k]] = _padded(moments, steps, index[max(k - q, 0) : k][::-1])
        between[k, : counts[k]] = _padded(moments, steps, index[max(k - q + 1, 0) : k + 1][::-1])
    tail = _padded(moments, np.arange(index[-1])[::-1], index[::-1][:q])
    gather = tuple(_gathered(gram, moments, index) for gram in moments.leaves)
    return Rule(index, Way(index, counts, tops, ahead, between, np.ones(m, bool)), tail, gather)


def _padded(moments: Moments, steps: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Weights `[steps, order + 1]`, zeros where there are fewer nodes."""
    weights = np.zeros((len(steps), moments.order + 1))
    if len(steps):
        weights[:, [*range(len(known)), -1]] = moments.fit(steps, known)[0]
    return weights


def _gathered(gram: np.ndarray, moments: Moments, index: np.ndarray) -> np.ndarray:
    """g at every step by the order + 1 nodes nearest in lam, `[N, M]`."""
    found = np.zeros((moments.n, len(index)))
    found[index, np.arange(len(index))] = 1
    for i in np.setdiff1d(np.arange(moments.n), index):
        near = np.argsort(np.abs(moments.lam[index] - moments.lam[i]), kind="stable")[: moments.order + 1]
        places = index[near]
        found[i, near] = _solved(gram[np.ix_(places, places)][None], gram[places, i][None], moments.ridge)[0]
    return found


def _solved(inner: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
    """(inner + ridge) w = right, a stack of them, each variable to its own scale; zero where there is nothing."""
    scale = np.sqrt(np.einsum("taa->ta", inner))
    scale = np.where(scale > 0, scale, 1.0)
    scaled = inner / scale[:, :, None] / scale[:, None, :] + ridge * np.eye(inner.shape[-1])
    return np.linalg.solve(scaled, (right / scale)[..., None])[..., 0] / scale


def _finite(lam: np.ndarray) -> np.ndarray:
    """Infinite ends brought to one step beyond the last finite one."""
    finite = lam[np.isfinite(lam)]
    return np.clip(lam, finite.min() - 1, finite.max() + 1)
