"""Solver schedules found by search: for a number of steps, what each should do and where it should end.

    minimise  E = prod_b (||x_b - r_b|| / ||r_b||)^(1/B),    x the schedule's x_0, r that of the reference, over a batch of B        (1)

(the geometric mean, for a few images that a sampler takes elsewhere would rule an arithmetic one) in three turns. Dynamic programming
for the nodes (`adjoint_jax.search.cheapest_nodes`) on the cost of Euler's jumps along the reference's trajectory, z = x/m and F of
`adjoint_jax.splitting` with c = 1,

    C_ij = ||z_i + (u_j - u_i) F_i - z_j||.                                                                             (2)

Evolution over all discrete choices and the nodes, from the usual samplers on the usual grids. And descent by quasi-Newton steps on the
nodes, through the sampler, as logarithms of their distances on the fine grid. Schedules of one length are all evaluated by one program,
and differentiated by one: in its weights and times, which central differences of the host's float64 tables then take to the nodes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

from .._numerics import fetched
from .._paths import cheapest_nodes
from .._traced import in_order
from ..adjoints import DiscreteAdjoint
from ..adjoints._computation import Computation, run_direct
from ..sample import sample
from ..solvers import ExponentialRK, Schedule
from ..solvers.step import output
from ..splitting import Splitting, level
from ..terms import DiffusionTerm
from ._candidates import Candidate, cross, fixed_grids, from_schedules, mutate, starters, times as times_of
from ._following import Program

KEEP = 12
COEFFICIENTS = (1.0, 1.15)
TINY = 1e-20
"""Keeps (1) finite for an image that is met exactly."""
DIFFERENCE = 1e-5
"""Of the logarithms of the distances between nodes."""


def search_schedule(
    term: DiffusionTerm,
    x_T: Any,
    args: Any = None,
    *,
    steps: int,
    grid: Any,
    reference: Any = None,
    evaluations: int = 400,
    descents: int = 3,
    splittings: Sequence[Any] = ("data", "noise", 0.5, 1.0),
    starts: Sequence[Schedule] = (),
    seed: int = 0,
    callback: Callable[[int, float, Schedule], None] | None = None,
) -> Schedule:
    """The solver schedule of least error (1) that a search of a given length finds; one network evaluation a step.

    Args:
        term, x_T, args: as `aj.sample`; x_T is the batch on which schedules are compared: 8 or more, and judge the answer on fresh noise.
        steps: the number of steps, which is that of network evaluations.
        grid: a fine grid, 30 to 100 steps: its ends are the schedule's, its nodes the ones between which the schedule's lie.
        reference: x_0 of the exact solution, like x_T; unless given, Tsitouras's method of order 5 on `grid`.
        evaluations: schedules tried by evolution, each at the cost of one sample of the batch.
        descents: the best distinct schedules whose nodes are improved by gradient; 0 for none.
        splittings: the choices of a step's splitting: "data", "noise", or assumed standard deviations, which also drift.
        starts: schedules of `steps` steps with times, to start from instead of the usual samplers (80 for each splitting): found before, or
            known to be good. Their choices are tried on the nodes of dynamic programming too.
        seed: of the evolution; the same seed gives the same schedule.
        callback: called with (schedules tried, error, schedule) whenever a better one is found.
    Returns:
        A `Schedule` with its `times`; `schedule.save(path)` writes it as json.
    Raises:
        ValueError: as `aj.sample`; where steps exceed those of `grid`; where a start has another number of steps or no times; where no
            schedule gives a finite error.
    Reference:
        Liu et al., A unified sampling framework (2023), S^3; Chen et al. 2024 (GITS).

        schedule = aj.search_schedule(term, x_T, args, steps=8, grid=aj.grids.log_snr(process, 60))
        x_0 = aj.sample(term, x_T, args, grid=schedule.times, solver=schedule)
    """
    fine = np.asarray(grid, np.float64)
    if not 1 <= steps < len(fine):
        raise ValueError(f"{steps} steps do not fit into the fine grid of {len(fine) - 1}: give 1 or more, and a finer grid.")
    teacher = sample(term, x_T, args, grid=fine, solver=ExponentialRK(diffrax.Tsit5(), 1.0), save=True)
    contest = _Contest(term, x_T, args, fine, teacher.xs[-1] if reference is None else jnp.asarray(reference), steps, callback)
    rng = np.random.default_rng(seed)
    cost = _cost(term, args, fine, teacher.xs)
    nodes = [cheapest_nodes(cost, steps, coefficient=coefficient)[1:-1] / (len(fine) - 1) for coefficient in COEFFICIENTS]
    known = from_schedules(starts, fine, steps, nodes)
    for candidate in known or starters([*nodes, *fixed_grids(term.process, fine, steps).values()], splittings):
        contest.enter(candidate)
    contest.evolve(rng, evaluations * 2 // 3, splittings)
    contest.descend(descents)
    contest.evolve(rng, evaluations // 3, splittings)
    return contest.best.schedule(fine)


class _Contest:
    """The candidates tried so far with their errors, best first."""

    def __init__(self, term: Any, x_T: Any, args: Any, fine: np.ndarray, reference: Any, steps: int, callback: Any):
        self.fine, self.reference, self.callback, self.steps = fine, reference, callback, steps
        self.program = Program(term, x_T, args, times_of(fine, np.arange(1, steps) / steps), steps)
        self.ranked: list[tuple[float, Candidate]] = []
        self.seen: set[Any] = set()

    @property
    def best(self) -> Candidate:
        if not self.ranked:
            raise ValueError("No schedule gave a finite error: check the network, the grid's ends and x_T.")
        return self.ranked[0][1]

    def enter(self, candidate: Candidate) -> None:
        """Measures a candidate that is new and possible."""
        if candidate.key() in self.seen:
            return
        self.seen.add(candidate.key())
        try:
            schedule = candidate.schedule(self.fine)
            computation = self.program.along(*self.program.table(schedule))
        except ValueError:  # a splitting that cannot start or end there, or a variable that it does not have
            return
        error = float(_error(computation, self.reference))
        if not np.isfinite(error):
            return
        if self.callback and (not self.ranked or error < self.ranked[0][0]):
            self.callback(len(self.seen), error, schedule)
        self.ranked.append((error, candidate))
        self.ranked.sort(key=lambda pair: pair[0])

    def evolve(self, rng: np.random.Generator, evaluations: int, splittings: Sequence[Any]) -> None:
        """Children of the `KEEP` best, better ranks more often."""
        last = len(self.seen) + evaluations
        for _ in range(20 * evaluations):  # a child may be one that was tried before
            if len(self.seen) >= last or not self.ranked:
                return
            parents = [self.ranked[min(int(rng.exponential(KEEP / 3)), KEEP - 1, len(self.ranked) - 1)][1] for _ in range(2)]
            child = cross(rng, *parents) if rng.random() < 0.25 else parents[0]
            self.enter(mutate(rng, child, splittings))

    def descend(self, descents: int) -> None:
        """Quasi-Newton steps on the nodes of the best candidates with distinct choices."""
        distinct: dict[Any, Candidate] = {}
        for _, candidate in self.ranked:
            distinct.setdefault(candidate.choices, candidate)
        for candidate in list(distinct.values())[:descents] if self.steps > 1 else []:
            self.enter(self._improved(candidate))

    def objective(self, choices: tuple) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """(1) of these choices and its gradient, as a function of the logarithms of the distances between nodes."""

        def of(logits: np.ndarray) -> tuple[float, np.ndarray]:
            ways = DIFFERENCE * np.eye(len(logits))
            nowhere = 1e3, np.zeros(len(logits))
            try:
                tables = [self.program.table(_at(logits + way, choices).schedule(self.fine)) for way in (0 * logits, *ways, *-ways)]
            except ValueError:  # nodes that meet
                return nowhere
            value, in_table = _slope(self.program.along(*tables[0]), self.reference)
            after, before = tables[1 : len(logits) + 1], tables[len(logits) + 1 :]
            slope = np.array([_inner(in_table, high, low) for high, low in zip(after, before, strict=True)]) / (2 * DIFFERENCE)
            return (float(value), slope) if np.isfinite([value, *slope]).all() else nowhere

        return of

    def _improved(self, candidate: Candidate) -> Candidate:
        gaps, objective = np.diff([0.0, *candidate.places, 1.0]), self.objective(candidate.choices)
        answer = minimize(objective, np.log(gaps), jac=True, method="L-BFGS-B", options={"maxiter": 30, "maxfun": 40})
        return _at(answer.x, candidate.choices)


def _at(logits: np.ndarray, choices: tuple) -> Candidate:
    return Candidate(tuple(float(p) for p in np.cumsum(softmax(logits))[:-1]), choices)


def _distance(x: Any, reference: Any) -> Any:
    """(1)."""
    away, size = (jnp.sum(part.reshape(len(part), -1) ** 2, axis=1) for part in (x - reference, reference))
    return jnp.exp(jnp.mean(jnp.log(away / size + TINY)) / 2)


@eqx.filter_jit
def _error(computation: Computation, reference: Any) -> Any:
    x, _ = run_direct(computation)
    return _distance(x, reference)


@eqx.filter_jit
def _slope(computation: Computation, reference: Any) -> tuple[Any, Any]:
    """(1) and its gradient in the times and rows."""
    places = lambda c: (c.ts, c.rows)  # noqa: E731
    differentiated, rest = eqx.partition(places(computation), eqx.is_inexact_array)

    def error(differentiated: Any) -> Any:
        return _distance(DiscreteAdjoint().run(eqx.tree_at(places, computation, eqx.combine(differentiated, rest)))[0], reference)

    return jax.value_and_grad(error)(differentiated)


def _inner(cotangents: Any, high: Any, low: Any) -> float:
    """<cotangents, high - low>; integer entries have none."""
    pairs = zip(*(jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (cotangents, high, low)), strict=True)
    return float(sum(np.vdot(np.asarray(c, np.float64), h - w) for c, h, w in pairs if c is not None))


def _cost(term: DiffusionTerm, args: Any, fine: np.ndarray, states: Any) -> np.ndarray:
    """C of (2)."""
    splitting, at = Splitting(1.0), level(term.process, fine)
    of_x, of_p = output(splitting, term.prediction, at)
    predictions = _predictions(term, jnp.asarray(fine, states.dtype), states, args)
    x, p = (np.asarray(part, np.float64).reshape(len(fine), -1) for part in fetched((states, predictions)))
    z, outputs = x / splitting.scale(at)[:, None], of_x[:, None] * x + of_p[:, None] * p
    angle = np.arctan2(at.sigma, at.alpha)
    return np.array([np.linalg.norm(z[i] + (angle - angle[i])[:, None] * outputs[i] - z, axis=1) for i in range(len(fine))])


@eqx.filter_jit
def _predictions(term: DiffusionTerm, times: Any, states: Any, args: Any) -> Any:
    return jax.lax.map(in_order(lambda at: term.predict(at[0], at[1], args)), (times, states))
