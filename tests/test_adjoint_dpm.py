"""AdjointDPM: its orders against the closed form and a fine exact gradient, its identity with AdjointDEIS-1, its ends, its memory."""

import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import Mixture, flow_map, gaussian, relative
from test_memory_and_work import HIDDEN, ROWS, STATE, compiled

import adjoint_jax as aj

PROCESS = aj.VPLinear()
SPAN = {"t_start": 0.5, "t_end": 0.05}
X, ARGS, TARGET = Mixture.inputs()
TSIT5 = aj.ExponentialRK(diffrax.Tsit5(), 1.0)
ORDERS = {"Euler": (diffrax.Euler(), 1), "Heun": (diffrax.Heun(), 2), "Bosh3": (diffrax.Bosh3(), 3)}
STATES = ("stored", "resolved")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def gradients(adjoint, ts, term=None, args=ARGS, solver=TSIT5):
    """In x_T and args."""
    term = Mixture(PROCESS).term() if term is None else term

    def loss(x, args):
        return jnp.sum(jnp.sin(aj.sample(term, x, args, grid=ts, solver=solver, adjoint=adjoint)) * TARGET)

    return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1))).lower(X, args).compile(compiler_options=QUICK)(X, args))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_a_gaussian(name, prediction):
    """dL/dx_T of the flow map, from 20 to 40 steps, along an exact trajectory."""
    solver, order = ORDERS[name]
    term, errors = gaussian(PROCESS, prediction, 0.6), []
    for steps in (20, 40):
        ts = aj.grids.log_snr(PROCESS, steps, **SPAN)
        x, factor = aj.sample(term, X, grid=ts, solver=aj.ExponentialRK(diffrax.Euler(), 0.6)), flow_map(PROCESS, 0.6, ts[0], ts[-1])
        found = gradients(aj.AdjointDPM(solver), ts, term, None, aj.ExponentialRK(diffrax.Euler(), 0.6))
        errors.append(relative(found[0], factor * jnp.cos(x) * TARGET))
    assert errors[1] < 0.5**order
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.25, errors


@pytest.fixture(scope="module")
def exact():
    """Of a fifth-order sampler on 80 steps."""
    return gradients(aj.DiscreteAdjoint(), aj.grids.log_snr(PROCESS, 80, **SPAN))


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_in_every_input(name, states, exact):
    """x_T, conditioning and parameters, from 16 to 32 steps on a mixture."""
    solver, order = ORDERS[name]
    found = [gradients(aj.AdjointDPM(solver, states=states), aj.grids.log_snr(PROCESS, steps, **SPAN)) for steps in (16, 32)]
    errors = [[relative(one, two) for one, two in zip(leaves, exact, strict=True)] for leaves in found]
    slopes = np.log2(np.array(errors[0]) / np.array(errors[1]))
    assert np.all(slopes > order - 0.25), (errors, slopes)


def test_stages_between_the_stored_states():
    """Bosh3's are: cubics in lam through the neighbours, on every other state of the sampler too."""
    ts = aj.grids.log_snr(PROCESS, 32, **SPAN)
    stored, coarse = (gradients(aj.AdjointDPM(diffrax.Bosh3(), steps=steps), ts) for steps in (None, 16))
    exact = gradients(aj.DiscreteAdjoint(), ts)
    for one, two, three in zip(stored, coarse, exact, strict=True):
        assert 2 < relative(two, three) / relative(one, three) < 16
        assert relative(two, three) < 1e-2


@pytest.mark.filterwarnings("ignore:The published AdjointDEIS")
def test_euler_is_adjoint_deis_1():
    """To rounding, in every input, at chosen nodes, under another sampler."""
    ts = aj.grids.log_snr(PROCESS, 12, **SPAN)
    published = aj.AdjointDEIS(1, np.inf, steps=6, published=True)
    for one, two in zip(gradients(aj.AdjointDPM(diffrax.Euler(), 6), ts, solver=None), gradients(published, ts, solver=None), strict=True):
        assert relative(one, two) < 1e-12


@pytest.mark.parametrize("states", STATES)
def test_from_pure_noise_to_clean_data(states):
    """The first and the last interval, of infinite length, are differentiated by the solver's own step; the value is no other."""
    process = aj.FlowMatching()
    term, ts = gaussian(process, "flow", 0.6), np.linspace(1, 0, 41)
    run = lambda x, adjoint: aj.sample(term, x, grid=ts, solver=aj.ExponentialRK(diffrax.Heun(), 0.6), adjoint=adjoint)  # noqa: E731
    value, pull = jax.vjp(lambda x: run(x, aj.AdjointDPM(diffrax.Tsit5(), states=states)), X)
    np.testing.assert_array_equal(value, run(X, aj.DiscreteAdjoint()))
    assert relative(pull(TARGET)[0], 0.6 * TARGET) < 1e-3


def test_per_step_leaves_are_those_of_their_interval():
    """Resolved or not, a leaf that is the same everywhere gives the constant's gradient in x_T."""
    ts = aj.grids.log_snr(PROCESS, 6, **SPAN)
    args = {**ARGS, "cond": jnp.stack([ARGS["cond"]] * 6)}
    term = Mixture(PROCESS).term()
    for states in STATES:
        adjoint = aj.AdjointDPM(states=states)
        per_step = lambda x: jnp.sum(jnp.sin(aj.sample(term, x, {**args, "cond": aj.PerStep(args["cond"])}, grid=ts, adjoint=adjoint)))  # noqa: B023, E731
        constant = lambda x: jnp.sum(jnp.sin(aj.sample(term, x, ARGS, grid=ts, adjoint=adjoint)))  # noqa: B023, E731
        assert relative(jax.grad(per_step)(X), jax.grad(constant)(X)) < 1e-12


def test_long_steps_are_named():
    """Euler from 0.69 in lam on, the limit of AdjointDEIS-1, where its factor for pure noise is off by itself; Heun's is exact there."""
    ts = aj.grids.log_snr(PROCESS, 4, **SPAN)
    assert np.abs(np.diff(PROCESS.lam(ts))).max() < 0.8
    for steps, long in ((4, True), (5, False)):
        ts = aj.grids.log_snr(PROCESS, steps, **SPAN)
        assert (np.abs(np.diff(PROCESS.lam(ts))).max() > np.log(2)) == long
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for solver in (diffrax.Euler(), diffrax.Heun()):
                aj.sample(Mixture(PROCESS).term(), X, ARGS, grid=ts, adjoint=aj.AdjointDPM(solver))
        assert [str(w.message)[:23] for w in caught if "AdjointDPM" in str(w.message)] == ["AdjointDPM with Euler t"] * long


def test_memory_of_resolved_states_is_flat():
    """And that of stored ones is one state a node."""

    def temporary(steps, adjoint):
        return compiled(steps, aj.DDIM(), adjoint, "both", STATE, HIDDEN).memory_analysis().temp_size_in_bytes / (ROWS * STATE * 4)

    for adjoint, growth in ((aj.AdjointDPM(states="resolved"), 0), (aj.AdjointDPM(), 1)):
        assert abs((temporary(256, adjoint) - temporary(16, adjoint)) / 240 - growth) < 0.1
