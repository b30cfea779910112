"""Where the interpolated adjoint linearises the network, and its weights: equations (1) to (3) of `adjoint_jax.adjoints.interpolated`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .._numerics import lagrange
from ..networks import conversions
from ..solvers.step import output
from ..splitting import Splitting, level
from ._computation import Computation
from ._nodes import choose


class Table(NamedTuple):
    """For each step: f, sigma, and eps = of_x x + of_p p."""

    fraction: Any
    sigma: Any
    of_x: Any
    of_p: Any


class Way(NamedTuple):
    """To each node: its step; how many come before it, and the first of them; the weights of r there in past nodes and in (this one, past nodes).

    `restart`: whether the next node is reached from this one.
    """

    index: Any
    count: Any
    top: Any
    ahead: Any
    between: Any
    restart: Any


class Plan:
    """What is known on the host: the nodes, last step first, and the table."""

    def __init__(self, computation: Computation, order: int, sigma_data: float, steps: int | None, nodes: str | Sequence[int]):
        term, ts, n = computation.term, np.asarray(computation.ts, np.float64), computation.steps
        self.n, self.save, self.paired, self.order = n, computation.save, computation.paired, order
        at, frame = level(term.process, ts[:-1]), Splitting(sigma_data)
        count = None if steps is None else steps - 1
        if count == 0 and n > 1:
            raise ValueError("InterpolatedAdjoint needs 2 nodes or more, the first step and the last.")
        index = np.arange(n)[::-1] if n < 3 else choose(ts[:-1], at.lam, count, nodes)
        self.index = np.unique(np.concatenate([index, [0, n - 1], np.flatnonzero(~np.isfinite(at.lam))]))[::-1].astype(int)
        lams, finite = np.where(np.isfinite(at.lam), at.lam, 0), np.isfinite(at.lam)
        _, eps = conversions(term.prediction, at)
        self.scale, self.of_output = frame.scale(level(term.process, ts)), np.asarray(output(frame, term.prediction, at)[1])
        self.table = Table(frame.noise_fraction(at), at.sigma, *map(np.asarray, eps))
        self.way, self.gather = self._way(lams, finite), self._gathering(lams, finite)

    def _way(self, lams: np.ndarray, finite: np.ndarray) -> Way:
        """The steps to each node, those to the first few from the last step on."""
        index, q = self.index, self.order
        skips = len(index) > 2 and index[0] - index[min(q, len(index)) - 1] >= q
        even = np.diff(-lams[index[: q + 1]])
        anchored = skips and finite[index[:q]].all() and even.max() <= 2 * even.min()
        bases = np.array([0, *(0 if anchored and n < q else n - 1 for n in range(1, len(index)))])
        tops, counts = index[bases] - 1, np.maximum(index[bases] - index - 1, 0)
        ahead, between = np.zeros((2, len(index), max(counts.max(), 1), q))
        for n, (top, count) in enumerate(zip(tops, counts, strict=True)):
            past = [k for k in index[:n][::-1] if finite[k]]
            for weights, known in ((ahead, past), (between, [index[n], *past])):
                used = known[:q]
                if used and count:
                    weights[n, :count, : len(used)] = lagrange(lams[used], np.ones(len(used), bool), lams[top - np.arange(count)]).T
        return Way(index, counts, tops, ahead, between, np.append(bases[1:] == np.arange(len(index) - 1), True))

    def _gathering(self, lams: np.ndarray, finite: np.ndarray) -> np.ndarray:
        """l of (3), `[N, M]`: through the `order` + 1 nodes nearest in lam."""
        found = np.zeros((self.n, len(self.index)))
        for i in range(self.n):
            if i in self.index:
                found[i, np.flatnonzero(self.index == i)] = 1
                continue
            usable = np.flatnonzero(finite[self.index])
            near = usable[np.argsort(np.abs(lams[self.index[usable]] - lams[i]), kind="stable")[: self.order + 1]]
            found[i, near] = lagrange(lams[self.index[near]], np.ones(len(near), bool), lams[[i]])[:, 0]
        return found
