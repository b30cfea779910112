"""What a search over schedules varies: where the nodes lie and what each step does.

A candidate of N steps has N - 1 places in (0, 1), its inner nodes on the fine grid t_0 .. t_M as fractions of M (piecewise linear in between), and
N choices (order, splitting, variable, rule, corrector). A mutation moves a node, or draws one of the five anew for one step or for a run of
steps; two candidates cross by taking the choices and nodes of one before a step and those of the other behind it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import grids
from ..processes import AbstractProcess
from ..solvers import Schedule
from ..solvers.multistep import orders

ORDERS, CORRECTORS, RULES = (1, 2, 3, 4), (0, 2, 3, 4), ("exact", "midpoint", "bh1")
VARIABLES = ("lam", "rho", "t", "theta")
MOVE, STRETCH = 0.4, 0.3
"""Standard deviations of a node's move in its shorter gap, and of the logarithm of an assumed standard deviation."""


class Candidate(NamedTuple):
    """Inner nodes in (0, 1), increasing, and the choices of each step."""

    places: tuple[float, ...]
    choices: tuple[tuple[Any, ...], ...]

    def schedule(self, fine: np.ndarray) -> Schedule:
        """The schedule with its times on the fine grid."""
        return Schedule(*zip(*self.choices, strict=True), times=tuple(times(fine, np.array(self.places))))

    def key(self) -> tuple[Any, ...]:
        return tuple(np.round(self.places, 6)), self.choices


def times(fine: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The grid whose inner nodes lie at `places`."""
    inner = np.interp(places * (len(fine) - 1), np.arange(len(fine), dtype=fine.dtype), fine)
    return np.concatenate([fine[:1], inner, fine[-1:]])


def places(fine: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The inverse of `times`."""
    return np.interp(grid[1:-1], fine[::-1], np.linspace(1, 0, len(fine)))


def named(steps: int, splitting: Any) -> dict[str, tuple[tuple[Any, ...], ...]]:
    """The choices of fixed samplers by the names that they have here."""
    found = {f"Exponential({order}) in lam": ((order, splitting, "lam", "exact", 0),) * steps for order in ORDERS}  # DEIS in log(rho)
    found |= {f"Exponential({order}) in t": ((order, splitting, "t", "exact", 0),) * steps for order in (2, 3, 4)}  # tAB-DEIS
    found["DPM-Solver++(2M)" if splitting == "data" else "DPM-Solver(2M)"] = ((2, splitting, "lam", "midpoint", 0),) * steps
    for most in (2, 3):
        found[f"UniPC-{most}"] = tuple((order, splitting, "lam", "midpoint", order + 1) for order in orders(steps, most, True).tolist())
    return found


def starters(grids: Sequence[np.ndarray], splittings: Sequence[Any]) -> list[Candidate]:
    """The fixed samplers that the search starts from."""
    pairs = [(tuple(float(p) for p in grid), splitting) for grid in grids for splitting in splittings]
    return [Candidate(places, choices) for places, splitting in pairs for choices in named(len(places) + 1, splitting).values()]


def from_schedules(schedules: Sequence[Schedule], fine: np.ndarray, steps: int, grids: Sequence[np.ndarray]) -> list[Candidate]:
    """Schedules as they are, and their choices on other nodes; their ends become those of the fine grid."""
    found = []
    for schedule in schedules:
        if schedule.times is None or len(schedule.orders) != steps:
            raise ValueError(f"starts: a schedule of {len(schedule.orders)} steps, times {schedule.times}; give {steps} steps with their times.")
        choices = tuple(zip(schedule.orders, schedule.splittings, schedule.variables, schedule.rules, schedule.correctors, strict=True))
        own = places(fine, np.array(schedule.times))
        found += [Candidate(tuple(float(p) for p in place), choices) for place in (own, *grids)]
    return found


def mutate(rng: np.random.Generator, parent: Candidate, splittings: Sequence[Any]) -> Candidate:
    """One change, or a few."""
    nodes, choices = np.array(parent.places), [list(choice) for choice in parent.choices]
    for _ in range(1 + rng.poisson(0.7)):
        if len(nodes) and rng.random() < 0.5:
            nodes = _moved(rng, nodes)
        else:
            gene, first = int(rng.integers(5)), int(rng.integers(len(choices)))
            last = first + 1 if rng.random() < 0.6 else rng.integers(first, len(choices)) + 1
            new = _drawn(rng, gene, choices[first][gene], splittings)
            for choice in choices[first:last]:
                choice[gene] = new
    return Candidate(tuple(float(p) for p in nodes), tuple(tuple(choice) for choice in choices))


def _moved(rng: np.random.Generator, nodes: np.ndarray) -> np.ndarray:
    k, edges = rng.integers(len(nodes)), np.concatenate([[0.0], nodes, [1.0]])
    gap = min(edges[k + 1] - edges[k], edges[k + 2] - edges[k + 1])
    nodes = nodes.copy()
    nodes[k] = np.clip(nodes[k] + MOVE * gap * rng.standard_normal(), edges[k] + 0.05 * gap, edges[k + 2] - 0.05 * gap)
    return nodes


def _drawn(rng: np.random.Generator, gene: int, old: Any, splittings: Sequence[Any]) -> Any:
    if gene == 1:
        if isinstance(old, float) and rng.random() < 0.5:
            return float(np.clip(old * np.exp(STRETCH * rng.standard_normal()), 0.02, 50.0))
        return splittings[int(rng.integers(len(splittings)))]
    table: tuple[Any, ...] = {0: ORDERS, 2: VARIABLES, 3: RULES, 4: CORRECTORS}[gene]
    return table[int(rng.integers(len(table)))]


def cross(rng: np.random.Generator, one: Candidate, other: Candidate) -> Candidate:
    """The first steps of one and the last of the other; the nodes too, where they still increase."""
    at = rng.integers(1, len(one.choices)) if len(one.choices) > 1 else 0
    joined = one.places[:at] + other.places[at:]
    nodes = joined if all(np.diff([0.0, *joined, 1.0]) > 1e-4) else one.places
    return Candidate(nodes, one.choices[:at] + other.choices[at:])


def fixed_grids(process: AbstractProcess, fine: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    """Places of the usual grids between the fine grid's ends: even in t, sqrt(t), the angle, log(alpha/sigma), Karras's, and even in its index."""
    rules: list[Any] = [grids.uniform, grids.quadratic, grids.angle]
    if np.isfinite(process.lam(fine[[0, -1]])).all():
        rules += [grids.log_snr, grids.karras]
    found = {rule.__name__: places(fine, rule(process, steps, t_start=float(fine[0]), t_end=float(fine[-1]))) for rule in rules}
    even = np.arange(1, steps) / steps
    if not any(np.allclose(place, even) for place in found.values()):
        found["even"] = even
    return {name: place for name, place in found.items() if all(np.diff([0.0, *place, 1.0]) > 0)}


def usual(process: AbstractProcess, grid: Any, steps: int, splittings: Sequence[Any] = ("data", "noise", 0.5, 1.0)) -> dict[tuple, Schedule]:
    """The multistep samplers in use, on the grids in use between the ends of a fine one, as schedules of `steps` steps.

    The keys are (sampler, splitting, grid): `Exponential(k)` of order k with polynomials in lam or t, which for k = 1 is DDIM, in the noise
    splitting DPM-Solver and DEIS, in the data splitting DPM-Solver++(3M); the midpoint forms DPM-Solver(2M) and DPM-Solver++(2M); and UniPC.

        schedules = aj.search.usual(process, aj.search.fine_grid(process, 60), steps=8)
    """
    fine = np.asarray(grid, np.float64)
    return {
        (sampler, splitting, rule): Candidate(tuple(float(p) for p in place), choices).schedule(fine)
        for rule, place in fixed_grids(process, fine, steps).items()
        for splitting in splittings
        for sampler, choices in named(steps, splitting).items()
    }
