"""Data N(0, s^2 I): every solver in the splitting sigma_data = s, and every adjoint of such a sample, is exact in one step."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PREDICTIONS, PROCESSES, flow_map, gaussian, relative, span

import adjoint_jax as aj

S = {"scalar": 0.6, "channels": np.array([0.3, 0.6, 1.7])}
SOLVERS = {
    "Exponential(1)": lambda s: aj.Exponential(1, s),
    "Exponential(3)": lambda s: aj.Exponential(3, s),
    "Exponential(2, t)": lambda s: aj.Exponential(2, s, variable="t"),
    "Euler": lambda s: aj.ExponentialRK(diffrax.Euler(), s),
    "Heun": lambda s: aj.ExponentialRK(diffrax.Heun(), s),
    "Tsit5": lambda s: aj.ExponentialRK(diffrax.Tsit5(), s),
}
ADJOINTS = {
    "Direct": lambda s: aj.DirectAdjoint(),
    "Discrete": lambda s: aj.DiscreteAdjoint(),
    "AB1": lambda s: aj.AdjointDEIS(1, s, mode="AB"),
    "AB4": lambda s: aj.AdjointDEIS(4, s, mode="AB"),
    "PEC2": lambda s: aj.AdjointDEIS(2, s, mode="PEC"),
    "PECE3": lambda s: aj.AdjointDEIS(3, s),
}
TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-4}


def check(solver, adjoint, process, prediction, s, steps, dtype):
    start, end = span(process)
    term, ts = gaussian(PROCESSES[process], prediction, s), np.linspace(start, end, steps + 1)
    x = jax.random.normal(jax.random.key(0), (2, 3), dtype)
    weight = jnp.asarray([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]], dtype)
    run = jax.jit(lambda x: aj.sample(term, x, grid=ts, solver=solver(s), adjoint=adjoint(s)))
    value, pull = jax.vjp(run, x)
    factor = np.broadcast_to(flow_map(PROCESSES[process], s, start, end), (2, 3))
    assert value.dtype == dtype
    assert relative(value, factor * np.asarray(x)) < TOLERANCE[dtype]
    assert relative(pull(weight)[0], factor * np.asarray(weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("s", S.values(), ids=S)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_is_exact(solver, s):
    for dtype in TOLERANCE:
        for steps in (1, 3):
            check(solver, ADJOINTS["Discrete"], "vp_linear", "v", s, steps, dtype)


@pytest.mark.parametrize("s", S.values(), ids=S)
@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
def test_every_adjoint_is_exact(adjoint, s):
    for dtype in TOLERANCE:
        for steps in (1, 4):
            check(SOLVERS["Exponential(1)"], adjoint, "vp_linear", "eps", s, steps, dtype)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", list(PROCESSES))
def test_every_process_and_prediction_is_exact(process, prediction):
    for adjoint in ("Discrete", "PECE3"):
        check(SOLVERS["Exponential(1)"], ADJOINTS[adjoint], process, prediction, S["scalar"], 1, jnp.float64)


def test_from_pure_noise_and_to_clean_data():
    """alpha = 0 at the start and sigma = 0 at the end, with and without intervals between."""
    process = aj.FlowMatching()
    for steps in (1, 3):
        for solver in (aj.Exponential(2, 0.6), aj.ExponentialRK(diffrax.Heun(), 0.6)):
            for adjoint in (aj.DiscreteAdjoint(), aj.AdjointDEIS(2, 0.6), aj.AdjointDEIS(2, 0.6, mode="AB")):
                term, ts = gaussian(process, "flow", 0.6), np.linspace(1, 0, steps + 1)
                value, pull = jax.vjp(lambda x: aj.sample(term, x, grid=ts, solver=solver, adjoint=adjoint), jnp.ones(3))  # noqa: B023
                np.testing.assert_allclose(value, np.full(3, 0.6), rtol=1e-12)
                np.testing.assert_allclose(pull(jnp.ones(3))[0], np.full(3, 0.6), rtol=1e-12)


def test_the_default_solver_takes_both_ends():
    term = gaussian(aj.FlowMatching(), "flow", 0.6)
    value = aj.sample(term, jnp.ones(3), grid=np.linspace(1, 0, 200))
    np.testing.assert_allclose(value, np.full(3, 0.6), rtol=1e-3)


def test_invert_undoes_sample():
    process = aj.VPLinear()
    term, ts = gaussian(process, "eps", 0.6), aj.grids.log_snr(process, 3)
    x = jax.random.normal(jax.random.key(0), (2, 3))
    for solver in (aj.Exponential(2, 0.6), aj.ExponentialRK(diffrax.Heun(), 0.6)):
        there = aj.sample(term, x, grid=ts, solver=solver)
        np.testing.assert_allclose(aj.invert(term, there, grid=ts, solver=solver), x, rtol=1e-11)


def test_invert_converges_with_the_solvers_order():
    process = aj.VPLinear()
    term, x = gaussian(process, "eps", 0.6), jnp.ones((1, 2))
    for solver, order in ((aj.DDIM(), 1), (aj.DPMSolverPP(2), 2), (aj.DEIS(2), 2), (diffrax.Heun(), 2)):
        errors = []
        for steps in (40, 80):
            ts = aj.grids.log_snr(process, steps)
            errors.append(relative(aj.invert(term, flow_map(process, 0.6, ts[0], ts[-1]) * x, grid=ts, solver=solver), x))
        assert np.log2(errors[0] / errors[1]) > order - 0.25
