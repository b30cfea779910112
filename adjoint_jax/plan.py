"""Which adjoint a memory budget allows: bytes and cost of each, predicted from a compiled sampler of three steps.

For a program of n steps, temp(n) bytes of temporaries when compiled and resid(n) bytes of residuals when traced,

    S = resid_0(3) - resid_0(2),  R = resid_all(3) - resid_all(2)          a stored state, a kept linearisation, a step
    base = temp(3) - 3 S (or R)                                            one linearisation and its cotangents     (1)
    bytes(keep=K) = (N - K) S + max(K R + base_all, base_0)                                                         (2)
    bytes(levels) = base_0 + the carries and states of `_storage` (1)                                              (3)
    bytes(segments) = base of two segments + a pair of states for each                                             (4)

and the same flops a step for every N. The loops are compiled once whatever their length, so the prediction costs three compilations of a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ._measure import Measure, bytes_of
from ._types import Args, ArrayLike, State
from .adjoints import AdjointDEIS, AdjointDPM, DiscreteAdjoint, InterpolatedAdjoint, LastK, PerStep, ReversibleAdjoint
from .adjoints._storage import HOST, stored_bytes
from .adjoints.drift import fewest_segments
from .audit import chosen_inputs, filled_args
from .sample import prepare
from .solvers import AbstractPaired
from .terms import DiffusionTerm

PREFERRED = (InterpolatedAdjoint, AdjointDEIS, AdjointDPM, LastK)
"""The approximate ones, the best first."""


class PlanRow(NamedTuple):
    """An adjoint, whether it is exact, its predicted bytes, its cost in units of the recomputing exact gradient's 2N F + N B, whether it fits."""

    name: str
    adjoint: Any
    exact: bool
    bytes: int
    cost: float
    fits: bool


class Plan(tuple[PlanRow, ...]):
    """Rows of a plan; prints as a Markdown table. `best` is the chosen adjoint, or None where nothing fits into `budget_bytes`."""

    best: Any = None
    budget_bytes: int = 0

    def __str__(self) -> str:
        lines = ["| adjoint | gradient | MiB | cost | fits |", "|---|---|---|---|---|"]
        for r in self:
            kind, mark = "exact" if r.exact else "approximate", "chosen" if r.adjoint is self.best else "yes" if r.fits else "no"
            lines.append(f"| {r.name} | {kind} | {r.bytes / 2**20:.3g} | {r.cost:.2f} C | {mark} |")
        return "\n".join(lines) + f"\n\nBudget: {self.budget_bytes / 2**20:.3g} MiB of temporaries; C = 2N forward + N backward."


def plan(
    term: DiffusionTerm,
    x_T: State | jax.ShapeDtypeStruct,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: diffrax.AbstractSolver | None = None,
    budget_bytes: int,
    wrt: Sequence[str] = ("x_T", "args"),
    key: Any = None,
    noise: Any = None,
    tol: float | None = None,
) -> Plan:
    """Predicts memory and cost of the adjoints for this network and grid, and names the fastest exact one that fits into `budget_bytes`.

    The bytes are the temporaries of the compiled gradient on the default device, without its arguments (term, x_T and args; weights that are
    constants of the program instead are laid out otherwise), its answers and the loss. Where no exact adjoint fits, the best is the
    `InterpolatedAdjoint` of most nodes that does (with the weights of `fit_interpolation` it errs by 3 to 1000 times less at the same bytes and
    cost), or the `AdjointDEIS` where the solver reads the network several times a step. Nothing is run, unless `tol` is given.

    Args:
        term, x_T, args, grid, solver, key, noise: as in `sample`; arrays may be their shapes, `jax.ShapeDtypeStruct`, so that a network too large for
            this machine is planned without weights.
        budget_bytes: what the temporaries may take.
        wrt: the inputs that are differentiated, as in `audit`.
        tol: the drift that a `ReversibleAdjoint` may have. Where it is given, the sampler is run and undone at x_T to find how many segments that
            needs (`segments_needed`), and there is no such row where no number is enough; None: one segment, whatever its drift.

    Returns:
        One row for each adjoint, and `best`.

    Raises:
        ValueError: as `sample`; for a budget or a tol that is not positive, a tol for a solver that is not invertible or with shapes in place of
            arrays; where `wrt` names no float.
        NotImplementedError: on a backend that does not tell the memory of its programs.

        adjoint = aj.plan(term, x_T, args, grid=ts, budget_bytes=8 * 2**30).best
    """
    if not budget_bytes > 0:
        raise ValueError(f"budget_bytes={budget_bytes!r}: a positive number of bytes.")
    chosen = chosen_inputs(x_T, args, wrt)
    arrays, rest = eqx.partition((term, x_T, args, key, noise), lambda leaf: eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))

    def computation(chosen: Any, arrays: Any) -> Any:
        term, x_T, args, key, noise = eqx.combine(arrays, rest)
        return prepare(term, chosen.get("x_T", x_T), filled_args(chosen, args), grid, solver, key, noise, False)

    def objective(adjoint: Any, steps: int) -> Callable:
        def value(chosen: Any, arrays: Any) -> Any:
            out, _ = adjoint.run(_shortened(computation(chosen, arrays), steps))
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out))

        return value

    whole = eqx.filter_eval_shape(computation, chosen, arrays)
    carry = eqx.filter_eval_shape(lambda *a: computation(*a).carry(), chosen, arrays)
    if tol is not None and not isinstance(whole.solver, AbstractPaired):
        raise ValueError(f"tol is the drift of an exactly invertible solver, and {type(whole.solver).__name__} is none: leave it out.")
    if tol is not None and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((term, x_T, args, key, noise))):
        raise ValueError("tol runs the sampler, which shapes in place of arrays do not allow: give arrays, or leave tol out.")
    reversible = ReversibleAdjoint(tol=tol) if isinstance(whole.solver, AbstractPaired) else None
    if reversible and tol is not None:
        found = fewest_segments(term, x_T, args, grid=grid, solver=whole.solver, tol=tol, key=key, noise=noise)
        reversible = None if found is None else ReversibleAdjoint(found, tol)
    measure = Measure(objective, (chosen, arrays), whole.steps, 0 if noise is None else bytes_of(whole.noise) // whole.steps)
    rows = _exact(measure, bytes_of(carry), budget_bytes, reversible, 2 * bytes_of(carry[0]))
    rows += _approximate(measure, bytes_of(carry[0]), budget_bytes, _families(objective, chosen, arrays))
    result = Plan(rows)
    result.budget_bytes = int(budget_bytes)
    fitting = [row for row in rows if row.fits]
    exact = sorted((row for row in fitting if row.exact), key=lambda row: row.cost)
    rest = sorted((row for row in fitting if not row.exact), key=lambda row: (PREFERRED.index(type(row.adjoint)), -row.cost))
    result.best = next((row.adjoint for row in (*exact, *rest)), None)
    return result


def _families(objective: Callable, chosen: Any, arrays: Any) -> list[type]:
    """Which approximate adjoints take this sampler: those that it can be traced with; x_T alone has no gradient by truncation."""
    found: list[Any] = []
    for family in PREFERRED if set(chosen) != {"x_T"} else PREFERRED[:-1]:
        adjoint = LastK(1) if family is LastK else family()  # pyright: ignore[reportCallIssue]
        try:
            jax.eval_shape(jax.grad(objective(adjoint, 2)), chosen, arrays)
            found.append(family)
        except ValueError:
            continue
    return found


def _exact(measure: Measure, carry: int, budget: int, reversible: Any, pair: int) -> list[PlanRow]:
    """Keeping all, as many as fit, or none; undoing the steps where they can be undone; states on the host; checkpoints of several levels."""
    n, recompute, keep = measure.steps, DiscreteAdjoint(), DiscreteAdjoint(keep="all")
    state, base_0, forward, work_0 = measure.state, measure.base_0, measure.forward, measure.work_0
    linearisation, work_all = measure.slope(keep), measure.work(keep) or 2
    base_all = measure.base(keep, measure.short * linearisation)
    rows = []

    def row(name: str, adjoint: Any, needed: int, work: float) -> None:
        rows.append(PlanRow(name, adjoint, True, int(needed), work / work_0, needed <= budget))

    def kept(k: int) -> int:
        return (n - k) * state + max(k * linearisation + base_all, base_0 if k < n else 0)

    row('keep="all"', keep, kept(n), work_all)
    if fitting := [k for k in range(1, n) if kept(k) <= budget]:
        k = fitting[-1]
        row(f"keep={k}", DiscreteAdjoint(keep=k), kept(k), work_0 - k / n * (work_0 - work_all))
    row("keep=0", recompute, kept(0), work_0)
    if reversible is not None:
        count, two = reversible.segments, ReversibleAdjoint(2, reversible.tol)
        row(f"ReversibleAdjoint({count})", reversible, measure.base(two, 2 * pair) + count * pair, measure.work(two) or 3)
    if HOST is not None and jax.default_backend() != "cpu":
        row('states="host"', DiscreteAdjoint(states="host"), base_0, work_0 * (1 + 1e-6))  # transfers, so never before keep=0
    for levels in (2, 3, 4):
        adjoint = DiscreteAdjoint(states="multilevel", levels=levels)
        row(f'states="multilevel", levels={levels}', adjoint, base_0 + stored_bytes(n, levels, carry, state), work_0 + (levels - 1) * forward)
    if not any(found.fits for found in rows):
        adjoint = DiscreteAdjoint(remat="block", states="multilevel", levels=3)
        needed = measure.base(DiscreteAdjoint(remat="block"), measure.short * state) + stored_bytes(n, 3, carry, state)
        row('remat="block", states="multilevel", levels=3', adjoint, needed, work_0 + 3 * forward)
    return rows


def _approximate(measure: Measure, x: int, budget: int, families: list[type]) -> list[PlanRow]:
    """Each at a quarter of the nodes, at half of them, and at as many as fit; truncation at a quarter of the steps."""
    n, short, rows = measure.steps, measure.short, []
    forward, work_0 = measure.forward, measure.work_0
    for family in families:
        if family is LastK:
            k = max(n // 4, 1)
            needed, cost = measure.base_0 + k * measure.state, forward / work_0 + k / n * (1 - forward / work_0)
            rows.append(PlanRow(f"LastK({k})", LastK(k), False, int(needed), cost, needed <= budget))
            continue
        every, make, further = {
            InterpolatedAdjoint: (InterpolatedAdjoint(mode="PEC"), lambda m: InterpolatedAdjoint(steps=m, mode="PEC"), 0),
            AdjointDEIS: (AdjointDEIS(nodes="index"), lambda m: AdjointDEIS(steps=m), 1),
            AdjointDPM: (AdjointDPM(nodes="index"), lambda m: AdjointDPM(steps=m), 1),
        }[family]
        base = measure.base(every, (short + further) * x) if further else measure.base(make(2), 2 * x)  # with a step between the nodes
        spent = measure.work(every)
        node = (spent - forward) * short / (short + further) if spent else 3
        most = min(max(int((budget - base) // x) - further, 2), n)
        for steps in sorted({min(max(n // 4, 2), n), min(max(n // 2, 2), n), most}):
            needed, cost = base + (steps + further) * x, (n * forward + (steps + further) * node) / (n * work_0)
            rows.append(PlanRow(f"{family.__name__}(steps={steps})", make(steps), False, int(needed), cost, needed <= budget))
    return rows


def _shortened(computation: Any, steps: int) -> Any:
    """The first steps of a computation."""
    per_step = lambda leaf: isinstance(leaf, PerStep)  # noqa: E731
    args = jax.tree.map(lambda leaf: PerStep(leaf.value[:steps]) if per_step(leaf) else leaf, computation.args, is_leaf=per_step)
    rows, noise = jax.tree.map(lambda leaf: leaf[:steps], (computation.rows, computation.noise))
    return replace(computation, ts=computation.ts[: steps + 1], rows=rows, noise=noise, args=args)
