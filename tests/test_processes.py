"""Processes: the inverse of lam, rates, limits; conversions between predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PREDICTIONS, PROCESSES, check_conversion, span

import adjoint_jax as aj


@pytest.fixture(params=list(PROCESSES))
def name(request):
    return request.param


def inner(name, count=41):
    start, end = span(name)
    return np.geomspace(start, end, count) if name == "edm" else np.linspace(start, end, count)


def test_t_of_lam_is_the_inverse_of_lam(name):
    process, ts = PROCESSES[name], inner(name)
    np.testing.assert_allclose(process.t_of_lam(process.lam(ts)), ts, rtol=1e-11, atol=1e-11)


def test_variance_and_definition_of_lam(name):
    process, ts = PROCESSES[name], inner(name)
    alpha, sigma = process.alpha(ts), process.sigma(ts)
    np.testing.assert_allclose(process.lam(ts), np.log(alpha / sigma), rtol=1e-12, atol=1e-12)
    if name.startswith("vp"):
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


def test_rates_are_derivatives(name):
    process = PROCESSES[name]
    ts = inner(name) if name != "vp_discrete" else inner(name)[1:-1] + 0.3
    for kind, rate in zip(("alpha", "sigma"), process.rates(ts), strict=True):
        _, expected = jax.jvp(getattr(process, kind), (jnp.asarray(ts),), (jnp.ones(len(ts)),))
        np.testing.assert_allclose(rate, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_numpy_and_jax_agree_and_keep_dtype(name, dtype):
    process, ts = PROCESSES[name], inner(name)
    for kind in ("alpha", "sigma", "lam"):
        host, graph = getattr(process, kind)(ts), getattr(process, kind)(jnp.asarray(ts, dtype))
        assert host.dtype == np.float64
        assert graph.dtype == dtype
        np.testing.assert_allclose(graph, host, rtol=2e-5 if dtype == jnp.float32 else 1e-13, atol=2e-5 if dtype == jnp.float32 else 1e-13)


def test_lam_falls_with_t(name):
    assert np.all(np.diff(PROCESSES[name].lam(inner(name))) > 0)


def test_ends():
    linear, cosine, flow = aj.VPLinear(), aj.VPCosine(), aj.FlowMatching()
    assert (linear.alpha(0.0), linear.sigma(0.0), linear.lam(0.0)) == (1, 0, np.inf)
    assert (cosine.alpha(0.0), cosine.sigma(0.0)) == (1, 0)
    assert (flow.alpha(1.0), flow.sigma(1.0), flow.lam(1.0), flow.lam(0.0)) == (0, 1, -np.inf, np.inf)
    assert aj.EDM().sigma(0.0) == 0


def test_discrete_table():
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    process = aj.VPDiscrete(abar)
    np.testing.assert_allclose(process.alpha(np.arange(1000.0)), np.sqrt(abar), rtol=1e-14)
    assert process.alpha(-1.0) == 1
    assert process.sigma(-1.0) == 0
    np.testing.assert_allclose(process.log_alpha(499.5), 0.25 * np.log(abar[499] * abar[500]), rtol=1e-14)
    with pytest.raises(ValueError, match="strictly decreasing"):
        aj.VPDiscrete(abar[::-1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_recover_x0_and_eps(name, prediction):
    for t in inner(name, 7):
        x0, eps = check_conversion(PROCESSES[name], prediction, float(t))
        level_error = 1e-9 if name in ("ve", "edm") else 1e-11
        np.testing.assert_allclose([x0, eps], [0.3, -1.2], rtol=level_error, atol=level_error)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="eps, x0, v, score, flow"):
        aj.DiffusionTerm(lambda x, t, args: x, aj.VPLinear(), prediction="noise")


def test_edm_precondition_is_the_published_one():
    network = aj.networks.edm_precondition(lambda x, t, args: jnp.tanh(x) + t, sigma_data=0.5)
    x, sigma = jnp.asarray([0.4, -2.0]), jnp.asarray(3.0)
    raw = jnp.tanh(x / jnp.sqrt(9.25)) + jnp.log(3.0) / 4
    np.testing.assert_allclose(network(x, sigma, None), 0.25 / 9.25 * x + 3 * 0.5 / jnp.sqrt(9.25) * raw, rtol=1e-12)


def test_cfg_interpolates():
    network = lambda x, t, args: x * args["cond"]  # noqa: E731
    x = jnp.ones((2, 3))
    args = {"cond": jnp.asarray(5.0), "uncond": jnp.asarray(2.0)}
    np.testing.assert_allclose(aj.cfg(network, 1.5)(x, 0.0, args), np.full((2, 3), 6.5))
    np.testing.assert_allclose(aj.cfg(network, jnp.asarray([0.0, 1.0]))(x, 0.0, args), [[2] * 3, [5] * 3])
