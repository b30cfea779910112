"""Schedules found by search: better than what the search starts from, on fresh noise too, the same for a seed, and read back from a file."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import Mixture, relative

import adjoint_jax as aj
from adjoint_jax.sample import prepare
from adjoint_jax.search._candidates import Candidate, cross, fixed_grids, mutate, places, starters, times
from adjoint_jax.search._search import _Contest
from adjoint_jax.solvers import Scheduled

PROCESS = aj.VPLinear()
FINE = aj.grids.log_snr(PROCESS, 40)
TERM = Mixture(PROCESS).term()
MIXED = aj.Schedule((1, 2, 3, 2), ("noise", "data", "data", 0.7), ("lam", "t", "rho", "theta"), correctors=(0, 2, 3, 2))


def inputs(seed, batch=24):
    keys = jax.random.split(jax.random.key(seed), 2)
    x_T, cond = (jax.random.normal(key, (batch, 2), jnp.float64) for key in keys)
    return x_T, {"params": Mixture.inputs()[1]["params"], "cond": cond}


def error(schedule, x_T, args, exact, grid=None):
    """The geometric mean of the relative errors."""
    found = aj.sample(TERM, x_T, args, grid=np.array(schedule.times) if grid is None else grid, solver=schedule)
    return float(np.exp(np.mean(np.log(np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)))))


def test_a_searched_schedule_beats_the_fixed_ones(tmp_path):
    """On noise that the search has not seen, by a third; reported as it improves, and the same after a file."""
    x_T, args = inputs(0)
    heard = []
    found = aj.search_schedule(
        TERM,
        x_T,
        args,
        steps=5,
        grid=FINE,
        evaluations=30,
        descents=1,
        splittings=(1.0,),
        callback=lambda *found: heard.append(found),
    )
    errors = [each for _, each, _ in heard]
    assert errors == sorted(errors, reverse=True)
    assert heard[-1][2] == found
    fresh = inputs(1, 60)
    fresh += (aj.sample(TERM, *fresh, grid=aj.grids.log_snr(PROCESS, 400), solver=aj.UniPC(3)),)
    fixed = [aj.UniPC(3), aj.DPMSolverPP(2), aj.Exponential(3, 1.0)]
    grids = [rule(PROCESS, 5) for rule in (aj.grids.log_snr, aj.grids.uniform)]
    assert error(found, *fresh) < min(error(solver, *fresh, grid) for solver in fixed for grid in grids) / 1.5
    found.save(tmp_path / "schedule.json")
    assert aj.Schedule.load(tmp_path / "schedule.json") == found


def test_a_seed_gives_one_schedule():
    x_T, args = inputs(0, 4)
    one, other = (aj.search_schedule(TERM, x_T, args, steps=3, grid=FINE, evaluations=15, descents=0, splittings=("data",), seed=3) for _ in range(2))
    assert one == other


@pytest.mark.slow
def test_a_search_starts_from_what_it_is_given():
    """No tries: the better of two starts, or one's choices on nodes found by dynamic programming; a further search is no worse than its start."""
    x_T, args = inputs(0, 4)
    times = tuple(aj.grids.log_snr(PROCESS, 4))
    starts = [aj.Schedule((1,) * 4, times=times), aj.Schedule((2,) * 4, rules="midpoint", correctors=3, times=times)]
    options = {"steps": 4, "grid": FINE, "descents": 0, "splittings": ("data",)}
    found = aj.search_schedule(TERM, x_T, args, evaluations=0, starts=starts, **options)
    assert found.correctors == (3,) * 4
    exact = aj.sample(TERM, x_T, args, grid=FINE, solver=aj.ExponentialRK(diffrax.Tsit5(), 1.0))
    further = aj.search_schedule(TERM, x_T, args, evaluations=6, starts=[found], **options | {"descents": 1})
    assert error(further, x_T, args, exact) < error(found, x_T, args, exact) <= error(starts[1], x_T, args, exact)
    for wrong in (aj.Schedule((1,) * 4), aj.Schedule((1,) * 2, times=times[::2])):
        with pytest.raises(ValueError, match="starts: a schedule of"):
            aj.search_schedule(TERM, x_T, args, starts=[wrong], **options)


@pytest.mark.slow
def test_descent_improves_the_nodes():
    """Descent by the gradient alone lowers the error of the best starter."""
    x_T, args = inputs(0)
    heard = []
    for descents in (0, 1):
        heard.append([])
        note = lambda *found: heard[-1].append(found[1])  # noqa: E731
        aj.search_schedule(TERM, x_T, args, steps=3, grid=FINE, evaluations=0, descents=descents, splittings=(1.0,), callback=note)
    assert heard[1][-1] < 0.9 * heard[0][-1]


def test_the_slope_of_the_descent_and_nodes_that_meet():
    """Central differences of the error, for mixed choices; one trace for two schedules; a step of no length is no error."""
    x_T, args = inputs(0, 4)
    traces = []

    def network(x, t, args):
        traces.append(1)
        return TERM.network(x, t, args)

    term = aj.DiffusionTerm(network, PROCESS, TERM.prediction)
    contest = _Contest(term, x_T, args, FINE, aj.sample(TERM, x_T, args, grid=FINE), 4, None)
    uniform = tuple(zip((2, 3, 3, 3), ("data",) * 4, ("lam",) * 4, ("exact",) * 4, (3, 3, 0, 0), strict=True))
    mixed = tuple(zip(MIXED.orders, MIXED.splittings, MIXED.variables, MIXED.rules, MIXED.correctors, strict=True))
    counts = []
    for choices in (uniform, mixed):
        objective, logits = contest.objective(choices), np.array([0.1, -0.2, 0.3, 0.0])
        _, slope = objective(logits)
        counts.append(len(traces))
        ways = 1e-5 * np.eye(4)
        differences = [(objective(logits + way)[0] - objective(logits - way)[0]) / 2e-5 for way in ways]
        np.testing.assert_allclose(slope, differences, rtol=1e-4, atol=1e-6 * np.abs(slope).max())
    assert counts[0] == counts[1]
    value, slope = objective(np.array([0.0, -200.0, 0.0, 0.0]))
    assert value == 1e3
    assert not slope.any()


def test_wide_registers_change_nothing():
    """One program for every schedule of a length gives what each schedule's own gives."""
    x_T, args = inputs(0, 4)
    grid = aj.grids.log_snr(PROCESS, 4)
    for schedule in (MIXED, aj.Schedule((1, 2, 3, 4)), aj.Schedule((1, 1, 2, 2), "noise")):
        own, wide = (aj.sample(TERM, x_T, args, grid=grid, solver=solver) for solver in (schedule, Scheduled(schedule, wide=True)))
        assert relative(wide, own) < 1e-12
    shapes = [
        jax.tree.structure(prepare(TERM, x_T, args, grid, Scheduled(s, wide=True), None, None, False).rows) for s in (MIXED, aj.Schedule((4,) * 4))
    ]
    assert shapes[0] == shapes[1]


def test_candidates_stay_possible():
    """Mutations and crossings keep nodes increasing within (0, 1) and every choice known; places and times are inverse."""
    rng = np.random.default_rng(0)
    pool = starters(list(fixed_grids(PROCESS, FINE, 6).values()), ("data", "noise", 0.5))
    for _ in range(300):
        child = mutate(rng, cross(rng, *(pool[i] for i in rng.integers(len(pool), size=2))), ("data", "noise", 0.5))
        assert np.all(np.diff([0.0, *child.places, 1.0]) > 0)
        assert len(child.choices) == 6
        pool.append(child)
    grid = aj.grids.uniform(PROCESS, 6)
    np.testing.assert_allclose(times(FINE, places(FINE, grid)), grid, rtol=1e-12)
    assert isinstance(pool[-1], Candidate)


@pytest.mark.parametrize(("steps", "message"), [(0, "0 steps do not fit into the fine grid of 40"), (41, "41 steps do not fit")])
def test_errors(steps, message):
    with pytest.raises(ValueError, match=message):
        aj.search_schedule(TERM, *inputs(0, 2), steps=steps, grid=FINE)


def test_no_finite_schedule_is_said():
    broken = aj.DiffusionTerm(lambda x, t, args: x * jnp.nan, PROCESS)
    with pytest.raises((ValueError, FloatingPointError), match="not finite"):
        aj.search_schedule(broken, inputs(0, 2)[0], steps=2, grid=FINE)


USUAL = {
    ("Exponential(1) in lam", "noise"): aj.DDIM(),
    ("Exponential(2) in t", "noise"): aj.DEIS(2),
    ("Exponential(3) in t", "noise"): aj.DEIS(3),
    ("Exponential(3) in lam", "data"): aj.DPMSolverPP(3, "heun"),
    ("DPM-Solver++(2M)", "data"): aj.DPMSolverPP(2),
    ("DPM-Solver(2M)", "noise"): aj.DPMSolver(2),
    ("UniPC-2", "data"): aj.UniPC(2),
    ("UniPC-3", "data"): aj.UniPC(3),
}


def test_usual_samplers_as_schedules_are_the_samplers_of_these_names():
    """On two grids; followed by one program, traced once; a schedule that the process does not allow is None."""
    x_T, args = inputs(0, 3)
    traces = []

    def network(x, t, args):
        traces.append(1)
        return TERM.network(x, t, args)

    usual = aj.search.usual(PROCESS, FINE, 5, ("data", "noise"))
    chosen = {key: usual[*key[:2], grid] for key in USUAL for grid in ("uniform", "karras")}
    followed = list(aj.search.follow(aj.DiffusionTerm(network, PROCESS, TERM.prediction), x_T, args, usual.values()))
    assert len(traces) <= 2
    found = dict(zip(usual, followed, strict=True))
    for key, solver in USUAL.items():
        for rule in (aj.grids.uniform, aj.grids.karras):
            own = aj.sample(TERM, x_T, args, grid=rule(PROCESS, 5), solver=solver)
            assert relative(found[*key, rule.__name__], own) < 1e-4, (key, rule)  # the grid's nodes are found again between those of the fine one
            again = usual[*key, rule.__name__]
            assert relative(found[*key, rule.__name__], aj.sample(TERM, x_T, args, grid=np.array(again.times), solver=again)) < 1e-12
    assert len(chosen) == len(USUAL)
    flow = aj.DiffusionTerm(TERM.network, aj.FlowMatching(), TERM.prediction)
    grid = aj.search.fine_grid(aj.FlowMatching(), 10, t_end=0.1)
    assert grid[0] == 1
    assert (grid[-1], len(grid)) == (pytest.approx(0.1), 11)
    (nothing,) = aj.search.follow(flow, x_T, args, [aj.Schedule((1,) * 10, "noise", times=tuple(grid))])
    assert nothing is None
    for wrong in (aj.Schedule((1,) * 5), aj.Schedule((1,) * 4, times=tuple(FINE[:5]))):
        with pytest.raises(ValueError, match=r"follow: a schedule of [45] steps, times .* give schedules of 5 steps with their times"):
            list(aj.search.follow(TERM, x_T, args, [next(iter(usual.values())), wrong]))
