"""PNDM, FON, plain Runge-Kutta, DPM-Solver-v3, DC-Solver and schedules: exact gradients, what they reduce to, orders, and their files."""

import json
from itertools import pairwise

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, Mixture, gaussian, relative, span
from test_values import ARGS as VALUE_ARGS, WEIGHTS, N, X as VALUE_X, network, pull

import adjoint_jax as aj
from adjoint_jax.sample import prepare

PROCESS = aj.VPLinear()
X, ARGS, _ = Mixture.inputs()
GRID = aj.grids.log_snr(PROCESS, 9)
V3 = aj.solvers.DPMSolverV3


def statistics(l, s, b=0.0, c=2, range=(-7.0, 8.0)):  # noqa: E741
    lam = np.linspace(*range, 61)
    return aj.solvers.ModelStatistics(lam, *(np.asarray(part(lam) if callable(part) else part + 0 * lam)[:, None] * np.ones(c) for part in (l, s, b)))


BENT = statistics(lambda lam: 1 / (1 + np.exp(lam)), lambda lam: -0.3 * np.cos(lam / 2), lambda lam: 0.1 * np.sin(lam), 3)
MIXED = aj.Schedule((1, 2, 3, 2), ("noise", "data", "data", 0.7), correctors=(0, 2, 3, 2))
SOLVERS = {
    "F-PNDM": (aj.solvers.PNDM(), "vp_discrete"),
    "S-PNDM": (aj.solvers.PNDM(2, "heun"), "edm"),
    "FON": (aj.solvers.FON(), "flow"),
    "PlainRK": (aj.solvers.PlainRK(diffrax.Heun()), "ve"),
    "v3": (V3(BENT), "vp_linear"),
    "v3, pseudo": (V3(BENT, 3, None, pseudo=True), "flow"),
    "v3, published": (V3(BENT, 2, "exact", published=True), "vp_cosine"),
    "DC-Solver": (aj.solvers.DCSolver(np.linspace(0.9, 1.1, N), 3, 2), "vp_linear"),
    "schedule": (MIXED, "vp_linear"),
    "schedule without corrector": (aj.Schedule((1, 2, 3, 2)), "edm"),
}


def sample(solver, grid=GRID):
    return aj.sample(Mixture(PROCESS).term(), X, ARGS, grid=grid, solver=solver)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_are_exact(name):
    """DiscreteAdjoint is plain autodiff to 1e-12 in x_T, args and the weights."""
    solver, process = SOLVERS[name]
    ts = np.linspace(*span(process), N + 1)
    laid_out = prepare(aj.DiffusionTerm(network, PROCESSES[process], "v"), VALUE_X, VALUE_ARGS, ts, solver, None, None, save=True)
    (xs, exact), (same, found) = (pull(laid_out, adjoint, WEIGHTS) for adjoint in (aj.DirectAdjoint(), aj.DiscreteAdjoint()))
    assert relative(same, xs) < 1e-12
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert relative(one, two) < 1e-12


@pytest.mark.parametrize("name", ["S-PNDM", "v3", "schedule without corrector"])
def test_gradient_in_the_grid(name):
    """To 1e-12; a traced grid samples as a concrete one."""
    solver, process = SOLVERS[name]
    term, ts = aj.DiffusionTerm(network, PROCESSES[process], "v"), np.linspace(*span(process), N + 1)

    def slope(adjoint):
        def loss(ts):
            x_0 = aj.sample(term, VALUE_X, VALUE_ARGS, grid=ts, solver=solver, adjoint=adjoint)
            return jnp.sum(jnp.sin(x_0) * WEIGHTS[0]), x_0

        return jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(ts))

    (exact, one), (found, _) = slope(aj.DirectAdjoint()), slope(aj.DiscreteAdjoint())
    assert np.isfinite(exact).all()
    assert relative(found, exact) < 1e-12
    assert relative(one, aj.sample(term, VALUE_X, VALUE_ARGS, grid=ts, solver=solver)) < 1e-12


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "schedule without corrector"])
def test_float32(name):
    """A traced grid in float32 samples as a concrete one in float64 to 1e-4."""
    solver, process = SOLVERS[name]
    term, ts = aj.DiffusionTerm(network, PROCESSES[process], "v"), np.linspace(*span(process), N + 1).astype(np.float32)
    args = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, VALUE_ARGS)
    found = jax.jit(lambda ts: aj.sample(term, VALUE_X.astype(jnp.float32), args, grid=ts, solver=solver))(jnp.asarray(ts))
    assert found.dtype == jnp.float32
    assert relative(found.astype(jnp.float64), aj.sample(term, VALUE_X, VALUE_ARGS, grid=ts.astype(np.float64), solver=solver)) < 1e-4


REDUCTIONS = {
    "v3 of data statistics": (V3(statistics(1.0, 0.0), 3, None, lower_order_final=False), aj.Exponential(3, 0.0)),
    "v3 of noise statistics": (V3(statistics(0.0, -1.0), 3, None, lower_order_final=False), aj.Exponential(3, np.inf)),
    "v3 with corrector": (V3(statistics(1.0, 0.0), 1), aj.UniPC(1, "exact")),
    "a schedule is 2M": (aj.Schedule((2,) * 9, rules="midpoint"), aj.DPMSolverPP(2)),
    "a schedule is DEIS": (aj.Schedule((3,) * 9, "noise", "t"), aj.DEIS(3)),
    "a schedule is UniPC": (aj.Schedule((2,) * 9, rules="midpoint", correctors=(2,) + (3,) * 8), aj.UniPC(2, lower_order_final=False)),
    "DC-Solver is UniPC": (aj.solvers.DCSolver(np.ones(9), 3, 2), aj.UniPC(3)),
    "PNDM is DDIM": (aj.solvers.PNDM(1), aj.DDIM()),
    "FON is Euler": (aj.solvers.FON(1), aj.solvers.PlainRK(diffrax.Euler())),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name):
    one, two = REDUCTIONS[name]
    assert relative(sample(one), sample(two)) < 1e-12


def test_first_orders_mix_splittings():
    """A first-order step is DDIM in any of the two limits, whatever was kept before it."""
    assert relative(sample(aj.Schedule((1,) * 9, ("data", "noise", "data") * 3)), sample(aj.DDIM())) < 1e-12


def test_euler_on_a_flow():
    """x + h v, from alpha = 0 to sigma = 0."""
    term, ts = aj.DiffusionTerm(lambda x, t, args: jnp.sin(3 * x + t), aj.FlowMatching(), "flow"), np.linspace(1, 0, 6)
    x = X
    for t0, t1 in pairwise(ts):
        x = x + (t1 - t0) * jnp.sin(3 * x + t0)
    assert relative(aj.sample(term, X, grid=ts, solver=aj.solvers.PlainRK(diffrax.Euler())), x) < 1e-14
    assert np.isfinite(aj.sample(term, X, grid=ts, solver=aj.solvers.PlainRK(diffrax.Heun()))).all()
    eps = aj.DiffusionTerm(lambda x, t, args: jnp.sin(x), aj.EDM())
    ts = np.array([10.0, 3.0, 1.0, 0.0])
    one, two = (aj.sample(eps, X, grid=ts, solver=solver) for solver in (aj.solvers.PlainRK(diffrax.Euler()), aj.DDIM()))
    assert relative(one, two) < 1e-14


def test_statistics_of_a_gaussian():
    """eps = sigma x/v has l = sigma^2/v and f = 0, so that two steps are exact but for the interpolation of l."""
    term, key = gaussian(PROCESS, "eps", 0.5), jax.random.key(0)
    found = aj.solvers.estimate_statistics(term, jax.random.normal(key, (8, 2)), key=key, grid=GRID, nodes=401)
    alpha, sigma = PROCESS.alpha(PROCESS.t_of_lam(found.lam)), PROCESS.sigma(PROCESS.t_of_lam(found.lam))
    np.testing.assert_allclose(found.l, np.repeat((sigma**2 / (0.25 * alpha**2 + sigma**2))[:, None], 2, 1), rtol=1e-10)
    exact = X * np.sqrt((0.25 * alpha[-1] ** 2 + sigma[-1] ** 2) / (0.25 * alpha[0] ** 2 + sigma[0] ** 2))
    assert relative(aj.sample(term, X, grid=GRID[[0, 4, 9]], solver=V3(found, 1, None)), exact) < 1e-3


def test_statistics_help():
    """On the mixture's own statistics a first-order step errs less than on either limit's."""
    key = jax.random.key(1)
    data = sample(diffrax.Heun(), aj.grids.log_snr(PROCESS, 60))
    term = Mixture(PROCESS).term()
    found = aj.solvers.estimate_statistics(term, data, ARGS, key=key, grid=GRID, nodes=61)
    exact = sample(diffrax.Bosh3(), aj.grids.log_snr(PROCESS, 300))
    errors = [relative(sample(V3(kind, 1, None)), exact) for kind in (found, statistics(1.0, 0.0), statistics(0.0, -1.0))]
    assert errors[0] < min(errors[1:])


def test_files(tmp_path):
    BENT.save(tmp_path / "statistics.npz")
    again = aj.solvers.ModelStatistics.load(tmp_path / "statistics.npz")
    assert all(np.array_equal(getattr(again, name), getattr(BENT, name)) for name in ("lam", "l", "s", "b"))
    schedule = aj.Schedule((1, 2), ("noise", 0.5), times=(1.0, 0.5, 0.1))
    schedule.save(tmp_path / "schedule.json")
    assert aj.Schedule.load(tmp_path / "schedule.json") == schedule
    (tmp_path / "other.json").write_text(json.dumps({"steps": 3}))
    np.savez(tmp_path / "other.npz", l=np.ones(3))
    with pytest.raises(ValueError, match="holds no schedule"):
        aj.Schedule.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="holds no statistics: b, lam, s missing"):
        aj.solvers.ModelStatistics.load(tmp_path / "other.npz")


def test_ratios_can_be_fitted():
    def loss(ratios):
        return jnp.sum(aj.sample(Mixture(PROCESS).term(), X, ARGS, grid=GRID, solver=aj.solvers.DCSolver(ratios)) ** 2)

    slope, h = jax.jit(jax.grad(loss))(jnp.ones(9)), 1e-5
    up, down = (loss(jnp.ones(9).at[3].add(sign * h)) for sign in (1, -1))
    assert abs((up - down) / (2 * h) - slope[3]) < 1e-7 * abs(slope).max()
    assert slope[0] == 0  # nothing to extrapolate from


WRONG = {
    "warmup": (lambda: aj.solvers.PNDM(warmup="euler"), r"warmup='euler' is not known"),
    "difference": (lambda: aj.solvers.FON(difference=0.0), r"difference is a positive length of time"),
    "corrector": (lambda: V3(BENT, corrector="bh2"), r"corrector='bh2' is not known"),
    "uneven statistics": (lambda: aj.solvers.ModelStatistics([0, 1, 3], *np.ones((3, 3))), r"increase evenly in lam"),
    "shape of statistics": (lambda: aj.solvers.ModelStatistics([0, 1], *np.ones((3, 3))), r"l, s, b of one shape"),
    "NaN statistics": (lambda: aj.solvers.ModelStatistics([0, 1], *np.full((3, 2), np.nan)), r"finite numbers"),
    "beyond statistics": (lambda: sample(V3(statistics(1.0, 0.0, range=(-1.0, 1.0)))), r"statistics go from lam = -1 to 1, the grid from"),
    "ratios": (lambda: sample(aj.solvers.DCSolver(np.ones(3))), r"One ratio a step: got shape \(3,\) for 9 steps"),
    "compensation": (lambda: aj.solvers.DCSolver(np.ones(3), 2, 3), r"degree from 1 to the order, here 2; got 3"),
    "length of a schedule": (lambda: aj.Schedule((1, 2), ("data",)), r"one choice a step: got 1 splittings for 2 orders"),
    "times of a schedule": (lambda: aj.Schedule((1, 2), times=(1.0, 0.0)), r"2 steps has 3 times; got 2"),
    "order of a schedule": (lambda: aj.Schedule((1, 5)), r"Step 1: orders are 1 to 4"),
    "rule of a schedule": (lambda: aj.Schedule((1,), rules="bh3"), r"Step 0: rules are"),
    "splitting of a schedule": (lambda: aj.Schedule((1,), -1.0), r"Step 0: a splitting is 'data', 'noise' or"),
    "steps of a schedule": (lambda: sample(aj.Schedule((1, 2))), r"The schedule has 2 steps, the grid 9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_sentence(name):
    act, says = WRONG[name]
    with pytest.raises(ValueError, match=says):
        act()
