"""Where the interpolated adjoint linearises the network, and the weights of its polynomials: (1) to (3) of `adjoint_jax.adjoints.interpolated`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    """To each node: its step; how many come before it, and the first of them; the weights there of r at past nodes (at this one and past nodes),
    and of u: `[nodes, steps, order + 1]`. `restart`: whether the next node is reached from this one.
    """

    index: Any
    count: Any
    top: Any
    ahead: Any
    between: Any
    restart: Any


class Rule(NamedTuple):
    """The nodes, last step first; the way to each; the weights of the steps before the last node, `[steps, order + 1]`; how the integrals are
    gathered by node, `[N, M]`: for each leaf of a tree, or all alike.
    """

    nodes: np.ndarray
    way: Way
    tail: np.ndarray
    gather: Any


@dataclass(frozen=True, eq=False)
class Fitted:
    """Nodes and weights fitted to a sampler: for its `grid` and the class of its `solver`, order and sigma_data those of the interpolation.

    `error` is the predicted relative error of dL/dx_T.
    """

    rule: Rule
    error: float
    grid: np.ndarray
    solver: str
    order: int
    sigma_data: float

    def check(self, computation: Computation) -> None:
        """Raises ValueError where the computation is of another sampler."""
        name, ts = type(computation.solver).__name__, np.asarray(computation.ts, np.float64)
        if name != self.solver or ts.shape != self.grid.shape or not np.allclose(ts, self.grid, rtol=1e-5):
            raise ValueError(
                f"This adjoint was fitted to {len(self.grid) - 1} steps of {self.solver}, and this is another grid, of {len(ts) - 1} steps, "
                f"or another solver, {name}: fit it to this one."
            )

    def save(self, path: str | Path) -> None:
        """Writes it as .npz."""
        nodes, way, tail, gather = self.rule
        arrays = {"tail": tail, "nodes": nodes, **{f"way_{name}": value for name, value in way._asdict().items()}}
        arrays |= {f"gather_{i}": value for i, value in enumerate(gather)}
        arrays |= {name: np.asarray(getattr(self, name)) for name in ("error", "grid", "solver", "order", "sigma_data")}
        np.savez(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Fitted":
        """What `save` wrote, for `InterpolatedAdjoint(fitted=...)`. Raises ValueError for another file."""
        with np.load(path) as file:
            if "way_between" not in file:
                raise ValueError(f"{path} holds no fit: give a file that Fitted.save wrote.")
            way = Way(*(file[f"way_{name}"] for name in Way._fields))
            gather = tuple(file[f"gather_{i}"] for i in range(sum(name.startswith("gather_") for name in file)))
            rule = Rule(file["nodes"], way, file["tail"], gather)
            return cls(rule, float(file["error"]), file["grid"], str(file["solver"]), int(file["order"]), float(file["sigma_data"]))


class Plan:
    """What is known on the host: the table of the steps and the rule."""

    def __init__(self, computation: Computation, sigma_data: float, order: int, mode: str, keep: bool, rule: Rule):
        term, ts = computation.term, np.asarray(computation.ts, np.float64)
        self.n, self.save, self.paired, self.order = computation.steps, computation.save, computation.paired, order
        self.twice, self.keep, self.rule = mode == "PECE", keep, rule
        at, frame = level(term.process, ts[:-1]), Splitting(sigma_data)
        _, eps = conversions(term.prediction, at)
        self.scale = frame.scale(level(term.process, ts))
        self.table = Table(frame.noise_fraction(at), at.sigma, *map(np.asarray, eps))


def polynomials(computation: Computation, order: int, sigma_data: float, steps: int | None, nodes: str | Sequence[int]) -> Rule:
    """Lagrange's polynomials in lam."""
    term, ts, n = computation.term, np.asarray(computation.ts, np.float64), computation.steps
    at = level(term.process, ts[:-1])
    count = None if steps is None else steps - 1
    if count == 0 and n > 1:
        raise ValueError("InterpolatedAdjoint needs 2 nodes or more, the first step and the last.")
    index = np.arange(n)[::-1] if n < 3 else choose(ts[:-1], at.lam, count, nodes, "InterpolatedAdjoint")
    index = np.unique(np.concatenate([index, [0, n - 1], np.flatnonzero(~np.isfinite(at.lam))]))[::-1].astype(int)
    lams, finite = np.where(np.isfinite(at.lam), at.lam, 0), np.isfinite(at.lam)
    outputs = np.asarray(output(Splitting(sigma_data), term.prediction, at)[1])
    spread = _gathering(lams, finite, index, order) / outputs[:, None] * outputs[index]
    return Rule(index, _way(lams, finite, index, order), np.zeros((0, order + 1)), spread)


def _way(lams: np.ndarray, finite: np.ndarray, index: np.ndarray, q: int) -> Way:
    """The steps to each node, those to the first few from the last step on."""
    skips = len(index) > 2 and index[0] - index[min(q, len(index)) - 1] >= q
    even = np.diff(-lams[index[: q + 1]])
    anchored = skips and finite[index[:q]].all() and even.max() <= 2 * even.min()
    bases = np.array([0, *(0 if anchored and n < q else n - 1 for n in range(1, len(index)))])
    tops, counts = index[bases] - 1, np.maximum(index[bases] - index - 1, 0)
    ahead, between = np.zeros((2, len(index), max(counts.max(), 1), q + 1))
    for n, (top, count) in enumerate(zip(tops, counts, strict=True)):
        past = [k for k in index[:n][::-1] if finite[k]]
        for weights, known in ((ahead, past), (between, [index[n], *past])):
            used = known[:q]
            if used and count:
                weights[n, :count, : len(used)] = lagrange(lams[used], np.ones(len(used), bool), lams[top - np.arange(count)]).T
    return Way(index, counts, tops, ahead, between, np.append(bases[1:] == np.arange(len(index) - 1), True))


def _gathering(lams: np.ndarray, finite: np.ndarray, index: np.ndarray, order: int) -> np.ndarray:
    """l of (3), `[N, M]`: through the `order` + 1 nodes nearest in lam."""
    found = np.zeros((len(lams), len(index)))
    for i in range(len(lams)):
        if i in index:
            found[i, np.flatnonzero(index == i)] = 1
            continue
        usable = np.flatnonzero(finite[index])
        near = usable[np.argsort(np.abs(lams[index[usable]] - lams[i]), kind="stable")[: order + 1]]
        found[i, near] = lagrange(lams[index[near]], np.ones(len(near), bool), lams[[i]])[:, 0]
    return found
