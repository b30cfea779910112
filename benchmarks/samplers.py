"""Error of x_0 at a few network evaluations: every sampler here in every splitting, schedules found by search, and diffusers' own.

    python benchmarks/samplers.py --out runs/samplers

The embedded digits, the flow ViT and the 64x64 UNet of the shared data (`--networks`), float32, against a reference in float64 (`problems`).
An entry is the geometric mean over the images of ||x_0 - reference|| / ||reference|| on the best of the grids, which a letter names. Writes
`results.json` after every entry and resumes from it; `samplers.md` and `samplers.png` in the end.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
import tyro
from peers import peers
from problems import PROBLEMS, Problem, mean_error
from report import write

import adjoint_jax as aj
from adjoint_jax.adjoints._computation import first, value_of
from adjoint_jax.sample import prepare
from adjoint_jax.search._candidates import named
from adjoint_jax.solvers import AbstractPaired, AbstractSampler, ExponentialStages, Schedule


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/samplers")
    shared: Path = Path("../shared/data")
    networks: tuple[str, ...] = ("digits", "flow", "unet64")
    evaluations: tuple[int, ...] = (5, 8, 10, 15, 20)
    searched: tuple[int, ...] = (5, 8, 10)
    images: int = 16
    large_images: int = 1
    """For the 64x64 UNet. One image cannot tell which of two samplers is better: at the counts that are searched the finalists meet on others."""
    finalists: int = 8
    final_images: int = 4
    trained: int = 64
    """Images that schedules are searched on, from another seed."""
    large_trained: int = 4
    tries: int = 600
    large_tries: int = 80
    large_descents: int = 1
    fixed: bool = True
    """Whether fixed samplers are run; without them schedules are searched for alone."""


def solvers(problem: Problem) -> Iterator[tuple[str, str, AbstractSampler]]:
    """(sampler, splitting, solver); for the large network three splittings, polynomials in lam alone, and grids t, l and k."""
    inf = float("inf")
    for c in (0.0, 0.5, inf) if problem.large else (0.0, 0.25, 0.5, 1.0, inf):
        for variable in ("lam",) if problem.large else ("lam", "t", "rho", "theta") if 0 < c < inf else ("lam", "t", "rho"):
            for order in (1, 2, 3, 4) if variable == "lam" else (2, 3, 4):
                yield f"Exponential({order}) in {variable}", f"{c:g}", aj.Exponential(order, c, variable)
        for order in (2, 3) if problem.large else (1, 2, 3):
            yield f"UniPC-{order}", f"{c:g}", aj.UniPC(order, sigma_data=c)
        for order in (2, 3):
            yield f"singlestep {order}S", f"{c:g}", ExponentialStages(order, c)
        yield "Heun", f"{c:g}", aj.ExponentialRK(diffrax.Heun(), c)
        yield "Bogacki-Shampine 3", f"{c:g}", aj.ExponentialRK(diffrax.Bosh3(), c)
        yield "Rex (midpoint)", f"{c:g}", aj.Rex(diffrax.Midpoint(), sigma_data=c)
    yield "DPM-Solver++(2M)", "0", aj.DPMSolverPP(2)
    yield "DPM-Solver++(3M), published", "0", aj.DPMSolverPP(3, published=True)
    yield "DPM-Solver(2M)", "inf", aj.DPMSolver(2)
    yield "SA-Solver, tau = 0", "0", aj.solvers.SASolver(3, 4, 0.0)
    yield "iPNDM", "inf", aj.solvers.IPNDM()
    yield "BDIA", "inf", aj.BDIA()
    yield "BELM", "inf", aj.solvers.BELM()
    yield "EDICT", "inf", aj.solvers.EDICT()
    yield "Euler on dx/dt", "-", aj.solvers.PlainRK(diffrax.Euler())
    yield "Heun on dx/dt", "-", aj.solvers.PlainRK(diffrax.Heun())


def grids(problem: Problem, steps: int) -> Iterator[tuple[str, np.ndarray]]:
    """The letters of the table; where alpha = 0 at the start, those in log(alpha/sigma) make one step off it first."""
    process = problem.term.process
    ends: Any = {"t_start": problem.start, "t_end": problem.end}
    yield "t", aj.grids.uniform(process, steps, **ends)
    if not problem.large:
        yield "q", aj.grids.quadratic(process, steps, **ends)
        yield "a", aj.grids.angle(process, steps, **ends)
    finite = np.isfinite(process.lam(problem.start))
    for letter, rule in (("l", aj.grids.log_snr), ("k", aj.grids.karras)):
        if finite:
            yield letter, rule(process, steps, **ends)
        elif steps > 1:
            yield letter, np.append(problem.start, rule(process, steps - 1, t_start=0.97 * problem.start, t_end=problem.end))


REPRESENTATIVES: dict[Any, AbstractSampler] = {}
"""Solvers by what their compiled step depends on: those with one pattern share one program, for their weights are data."""


@eqx.filter_jit
def _advance(computation: Any, carry: Any, inputs: Any) -> Any:
    return computation.step(computation.shared()[0], carry, inputs)


def run(problem: Problem, solver: Any, ts: np.ndarray, evaluations: int) -> np.ndarray | None:
    """x_0, or None where the solver cannot spend just that many evaluations on this grid."""
    laid_out = prepare(problem.term, problem.x_T, problem.args, ts, solver, None, None, False)
    active = getattr(laid_out.rows, "active", None)
    if (active.sum() if active is not None else np.prod(laid_out.rows.times.shape)) != evaluations:
        return None
    sampler: Any = laid_out.solver
    key = (str(sampler.pattern), sampler.window, isinstance(sampler, AbstractPaired), active is None)
    small = eqx.tree_at(
        lambda c: (c.solver, c.ts, c.rows), laid_out, (REPRESENTATIVES.setdefault(key, sampler), None, None), is_leaf=lambda leaf: leaf is sampler
    )
    carry, inputs = laid_out.carry(), laid_out.inputs()
    for i in range(laid_out.steps):
        carry = _advance(small, carry, first(inputs, i))
    return np.asarray(value_of(carry, False))


def grids_for(problem: Problem, solver: AbstractSampler, evaluations: int) -> Iterator[tuple[str, np.ndarray, Any]]:
    """(letter, grid, solver): with as many steps as spend the evaluations, singlestep methods in blocks."""
    if isinstance(solver, ExponentialStages):
        order = solver.steps_back
        blocks = [order] * (evaluations // order) + ([evaluations % order] if evaluations % order else [])
        solver = ExponentialStages(order, solver.splitting.sigma_data, lower_order_final=tuple(blocks))
        steps = len(blocks)
    else:
        stages = len(getattr(solver, "pattern").reads)  # noqa: B009
        if evaluations % stages:
            return
        steps = evaluations // stages
    for letter, ts in grids(problem, steps):
        yield letter, ts, solver


class Results:
    """Entries [network][evaluations][row] = (error, letter), on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def place(self, *keys: str) -> dict[str, Any]:
        found = self.entries
        for key in keys:
            found = found.setdefault(key, {})
        return found

    def put(self, network: str, evaluations: int, row: str, entry: Any) -> None:
        self.place(network, str(evaluations))[row] = entry
        self.path.write_text(json.dumps(self.entries, indent=1))


def measure(config: Config, problem: Problem, trained: Problem, results: Results) -> None:
    reference = problem.reference(config.out)
    for evaluations in config.evaluations:
        done = results.place(problem.name, str(evaluations))
        if config.fixed:
            for row, solver in rows_of(problem).items():
                if row not in done:
                    results.put(problem.name, evaluations, row, best_grid(problem, solver, evaluations, reference))
            for row, call in peers_of(problem, evaluations).items():
                if row not in done:
                    results.put(problem.name, evaluations, row, (mean_error(call(), reference), "own"))
        if evaluations in config.searched and "S^3 | searched" not in done:
            results.put(problem.name, evaluations, "S^3 | searched", (search(config, trained, problem, reference, evaluations, done), "own"))
        shown = sorted((value[0], row) for row, value in results.place(problem.name, str(evaluations)).items() if value)[:6]
        print(f"{problem.name}, {evaluations}: " + "; ".join(f"{error:.2e} {row}" for error, row in shown), flush=True)


def rows_of(problem: Problem) -> dict[str, AbstractSampler]:
    return {f"{sampler} | {splitting}": solver for sampler, splitting, solver in solvers(problem)}


def peers_of(problem: Problem, evaluations: int) -> dict[str, Callable[[], np.ndarray]]:
    if not (find_spec("diffusers") and find_spec("torch")):
        return {}
    return {f"diffusers: {name} | peer": call for name, call in peers(problem, evaluations).items()}


def best_grid(problem: Problem, solver: AbstractSampler, evaluations: int, reference: np.ndarray, only: str = "") -> tuple[float, str] | None:
    """The least error over the grids, or that on one of them, and its letter."""
    best: tuple[float, str] | None = None
    for letter, ts, made in grids_for(problem, solver, evaluations):
        if only and letter != only:
            continue
        try:
            x = run(problem, made, ts, evaluations)
        except ValueError:  # a splitting that cannot start at alpha = 0
            continue
        error = np.inf if x is None else mean_error(x, reference)
        if np.isfinite(error) and (best is None or error < best[0]):
            best = (error, letter)
    return best


def finals(config: Config, problem: Problem, results: Results) -> None:
    """The best fixed rows and peers of the large network and its schedules, on other images, against Heun's method at every training step."""
    fresh = PROBLEMS[problem.name](config.shared, config.final_images, 3)
    for evaluations in config.searched:
        rows, calls, name, target = rows_of(fresh), peers_of(fresh, evaluations), f"{problem.name}, finals", fresh.target(config.out)
        found, done = results.place(problem.name, str(evaluations)), results.place(name, str(evaluations))
        ranked = sorted((row for row in found if found[row]), key=lambda row: found[row][0])
        for row in [row for row in ranked if row in rows][: config.finalists]:
            if row not in done:
                results.put(name, evaluations, row, best_grid(fresh, rows[row], evaluations, target, found[row][1]))
        for row in [row for row in ranked if row in calls][:2]:
            if row not in done:
                results.put(name, evaluations, row, (mean_error(calls[row](), target), "own"))
        path = config.out / f"schedule_{problem.name}_{evaluations}.json"
        if path.exists() and "S^3 | searched" not in done:
            results.put(name, evaluations, "S^3 | searched", (followed(Schedule.load(path), fresh, target), "own"))


def followed(schedule: aj.Schedule, problem: Problem, reference: np.ndarray) -> float:
    """The error of a schedule."""
    times = np.array(schedule.times)
    sample = jax.jit(lambda x, args: aj.sample(problem.term, x, args, grid=times, solver=schedule))
    return mean_error(sample(problem.x_T, problem.args), reference)


WIDTHS = {"0": "data", "0.5": 0.5, "inf": "noise"}


def known(config: Config, problem: Problem, evaluations: int, fixed: dict[str, Any]) -> list[Schedule]:
    """The best fixed rows that searches can start from, as schedules."""
    found = []
    for row, (_, letter) in sorted(fixed.items(), key=lambda pair: pair[1][0]):
        sampler, sigma_data = row.split(" | ")
        choices = named(evaluations, WIDTHS[sigma_data]).get(sampler) if sigma_data in WIDTHS else None
        if choices:
            found.append(Schedule(*zip(*choices, strict=True), times=tuple(dict(grids(problem, evaluations))[letter])))
    return found[: config.finalists]


def search(config: Config, trained: Problem, problem: Problem, reference: np.ndarray, evaluations: int, fixed: dict[str, Any]) -> float:
    """The error on fresh noise of the schedule found on other noise; the schedule is kept. That of the large network starts from its best rows."""
    large = problem.large
    search_options: Any = {"evaluations": config.large_tries if large else config.tries, "descents": config.large_descents if large else 3}
    if large:
        starts = known(config, problem, evaluations, {row: value for row, value in fixed.items() if value})
        search_options |= {"splittings": tuple(WIDTHS.values()), "starts": starts}
    schedule = aj.search_schedule(
        trained.term,
        trained.x_T,
        trained.args,
        steps=evaluations,
        grid=trained.fine(30 if large else 60),
        reference=trained.target(config.out),
        **search_options,
    )
    schedule.save(config.out / f"schedule_{problem.name}_{evaluations}.json")
    return followed(schedule, problem, reference)


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    results = Results(config.out / "results.json")
    for name in config.networks:
        counts = (config.large_images, config.large_trained) if name == "unet64" else (config.images, config.trained)
        problem, trained = (PROBLEMS[name](config.shared, images, seed) for images, seed in zip(counts, (1, 2), strict=True))
        measure(config, problem, trained, results)
        if problem.large and config.fixed:
            finals(config, problem, results)
    write(results.entries, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
