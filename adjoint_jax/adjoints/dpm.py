"""AdjointDPM: the augmented ODE of a sample in the noise splitting, integrated from data to noise by a Runge-Kutta method.

With y = x/alpha, rho = sigma/alpha and w = dL/dy = alpha dL/dx, generation is dy/drho = eps, and backwards along it

    dw/drho = -alpha J_eps^T w,    dL/dcond = -int (d eps/d cond)^T w drho,    J_eps = d eps/dx,                      (1)

rho growing from data to noise, dL/dparams likewise, each by the method's own stages and weights. The states x at the stages are those of the
sampler, x / sqrt(alpha^2 + sigma^2) between them by cubics in lam ("stored"), or y is integrated along with (1) ("resolved").

The equation has no linear part that is solved exactly. Where noise dominates, eps ~ x/sigma and (1) is dw/drho = -w/rho: a step from rho to
r rho should divide w by r. Euler's multiplies it by 2 - r; a method whose factor is off by more than itself there is named in a warning.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import broadcasting, is_concrete, lagrange, namespace, varying_like
from .._types import State
from ..networks import conversions
from ..solvers.singlestep import Tableau, stage_time, tableau_of
from ..splitting import Splitting, level
from ..terms import DiffusionTerm
from ._base import AbstractSamplerAdjoint, followed
from ._computation import Computation
from ._continuous import Plan, run
from ._nodes import choose
from .discrete import DiscreteAdjoint, add, constant

NOISE = Splitting(np.inf)


class AdjointDPM(AbstractSamplerAdjoint):
    """The continuous adjoint of equation (1), as published: approximate, of the solver's order in the steps in rho. `AdjointDEIS` is the better one.

    Cost: the sampler, then a forward and a backward evaluation for each stage of each step; memory: the states at the nodes, or one ("resolved").
    Differentiable and refused as by `AdjointDEIS`; intervals out of alpha = 0 and into sigma = 0 are differentiated exactly.
    The release integrates (1) by torchdiffeq's `explicit_adams`, of order up to 11 for even steps, on a grid whose steps differ by a factor of
    400, and is off by 2.5e4 as shipped: no such method is here. The stages are our own, from the tableau: diffeqsolve passes neither through
    shard_map nor through reverse mode twice.

    Args:
        solver: an explicit Runge-Kutta solver of diffrax, `diffrax.Heun()` unless given; `diffrax.Euler()` makes this AdjointDEIS-1.
        steps, nodes: its steps among the sampler's times, as of `AdjointDEIS`.
        states: "stored", the sampler's own; or "resolved", integrated backwards by the same solver from x_0, off by its error.
    Raises:
        TypeError: for a solver without an explicit tableau.
        ValueError: for other nodes or states.
    Reference: Pan, Liew, Tan, Feng & Yan, AdjointDPM (ICLR 2024).

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.AdjointDPM(diffrax.Bosh3()))))(x_T)
    """

    solver: diffrax.AbstractSolver
    steps: int | None = eqx.field(static=True)
    nodes: str | tuple[int, ...] = eqx.field(static=True)
    states: str = eqx.field(static=True)

    def __init__(self, solver: Any = None, steps: int | None = None, nodes: str | Sequence[int] = "lam", states: str = "stored"):
        self.solver, self.steps = diffrax.Heun() if solver is None else solver, steps
        self.nodes = nodes if isinstance(nodes, str) else tuple(int(i) for i in nodes)
        self.states = states
        if states not in ("stored", "resolved"):
            raise ValueError(f'states={states!r} is not known: use "stored" or "resolved".')
        tableau_of(self.solver)

    def run(self, computation: Computation) -> tuple[State, Any]:
        followed(self, computation)
        lams = computation.term.process.lam(computation.ts)
        index = choose(computation.ts, lams, self.steps, self.nodes, "AdjointDPM")
        if len(index) < 2:
            return DiscreteAdjoint().run(computation)
        tableau = _without_idle_stages(tableau_of(self.solver))
        if is_concrete(lams):
            _warn_of_long_steps(self.solver, tableau, float(np.abs(np.diff(lams[index])).max()))
        table = lay_out(computation.term, tableau, computation.ts[index])
        table = constant(Table(*(jnp.asarray(value, None if value.dtype == int else computation.x.dtype) for value in table)))
        table = varying_like(table, computation.x)._replace(gather=table.gather)  # as AdjointDEIS' `gather`
        sweep = lambda *given: (*integrate(tableau, self.states == "resolved", *given[:-1]), None)  # noqa: E731
        stored = index[:1] if self.states == "resolved" else index
        return run(computation, table, Plan(computation, "AdjointDPM", index, stored, index, sweep))


class Table(NamedTuple):
    """The steps k from data to noise; every array has leading axis K - 1, then that of the stages, but `ends`, alpha at the first and last node.

    eps = of_x x + of_p p; x at a stage is the sum of `near` times the states at the nodes `points`; `gather` is -length b.
    """

    t: Any
    alpha: Any
    of_x: Any
    of_p: Any
    length: Any
    gather: Any
    points: Any
    near: Any
    ends: Any


@broadcasting
def lay_out(term: DiffusionTerm, tableau: Tableau, ts: Any) -> Table:
    """The weights at nodes `ts` from data to noise."""
    xp, count, process = namespace(ts), len(ts), term.process
    node = level(process, ts)
    start, end = level(process, ts[:-1]), level(process, ts[1:])
    times = xp.stack([stage_time(NOISE, process, start, end, ts[:-1], ts[1:], float(c)) for c in tableau.c], axis=-1)
    at = level(process, times)
    _, eps = conversions(term.prediction, at)
    length = NOISE.step(start, end) / end.alpha
    width = min(4, count)
    points = np.clip(np.arange(count - 1) - 1, 0, count - width)[:, None] + np.arange(width)
    size = lambda at: xp.sqrt(at.alpha**2 + at.sigma**2)  # noqa: E731
    basis = lagrange(xp.take(node.lam, points, axis=0), np.ones_like(points, bool), at.lam)
    near = xp.swapaxes(basis / xp.take(size(node), points, axis=0)[..., None], -1, -2) * size(at)[..., None]
    return Table(times, at.alpha, *eps, length, -length[:, None] * xp.asarray(tableau.b, length.dtype), points, near, node.alpha[np.array([0, -1])])


def integrate(
    tableau: Tableau, resolved: bool, linearise: Callable, adjoint: State, total: Any, kept: Any, per_step: Any, table: Table
) -> tuple[State, Any]:
    """(1), step by step; a step belongs to the interval of the grid that generation begins it with."""

    def body(acc: Any, slices: Any) -> tuple[Any, None]:
        w, y, total = acc
        row, per_step = slices
        near = kept[row.points] if len(kept) > 1 else kept
        slopes, outputs = [], []
        for s, t in enumerate(row.t):
            w_s = _moved(w, row.length, tableau.a[s], slopes)
            x = row.alpha[s] * _moved(y, row.length, tableau.a[s], outputs) if resolved else jnp.tensordot(row.near[s], near, 1)
            p, transpose = linearise(x, t, per_step)
            of_x, shares, _ = transpose(row.of_p[s] * w_s)
            slopes.append(-row.alpha[s] * (row.of_x[s] * w_s + of_x))
            outputs.append(row.of_x[s] * x + row.of_p[s] * p)
            weight = row.gather[s]
            total = jax.tree.map(lambda sum_, share, weight=weight: add(sum_, weight.astype(share.dtype) * share), total, shares)
        y = _moved(y, row.length, tableau.b, outputs) if resolved else None
        return (_moved(w, row.length, tableau.b, slopes), y, total), None

    start = (table.ends[0] * adjoint, kept[0] / table.ends[0] if resolved else None, total)
    steps = (table._replace(ends=None), jax.tree.map(lambda leaf: leaf[1:], per_step))
    (w, _, total), _ = jax.lax.scan(body, start, steps)
    return w / table.ends[1], total


def _moved(start: State, length: Any, weights: np.ndarray, slopes: list) -> State:
    """start + length sum_j weights_j slopes_j."""
    terms = [float(weight) * slope for weight, slope in zip(weights, slopes, strict=False) if weight]
    return start + length * sum(terms[1:], terms[0]) if terms else start


def _without_idle_stages(tableau: Tableau) -> Tableau:
    """Stages at the end that serve the error estimate alone are left out."""
    used = int(np.max(np.nonzero(tableau.b))) + 1
    return Tableau(tableau.a[:used, :used], tableau.b[:used], tableau.b_error[:used], tableau.c[:used])


def _warn_of_long_steps(solver: Any, tableau: Tableau, longest: float) -> None:
    """Where noise dominates, a step of `longest` in lam must not be off by more than what it should give."""
    length, factors = np.expm1(longest), []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        factors.append(-(1 + length * row[: len(factors)] @ factors) / (1 + c * length))
    factor = 1 + length * tableau.b @ factors
    if abs(factor * np.exp(longest) - 1) > 1:
        warnings.warn(
            f"AdjointDPM with {type(solver).__name__} takes a step of {longest:.2f} in lam, on which it multiplies the adjoint of pure noise by "
            f"{factor:.2g} instead of {np.exp(-longest):.2g}, and the gradient may be off by orders of magnitude: use AdjointDEIS, or more steps.",
            stacklevel=2,
        )
