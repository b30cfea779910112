"""GMS: three exact moments of the reverse transition of a mixture, better few-step samples than ancestral sampling, exact gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, convert, relative

import adjoint_jax as aj
from adjoint_jax.networks import conversions
from adjoint_jax.solvers import GMS, x0_variance
from adjoint_jax.solvers.gms import mixture
from adjoint_jax.splitting import level

WEIGHT, MEAN, WIDTH = np.array([0.3, 0.7]), np.array([-1.2, 0.6]), np.array([0.25, 0.35])
FIRST, SECOND = -3.0, 3.0  # second draws that choose the component of weight 1/3, 2/3


def posterior(process, x, t):
    """(responsibilities, means, variance) of x_0 | x_t of the one-dimensional mixture, components behind."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    v = alpha**2 * WIDTH**2 + sigma**2
    gap = x[..., None] - jnp.broadcast_to(alpha * MEAN, (*x.shape, 2))
    wide = jnp.broadcast_to(v, gap.shape)
    share = jax.nn.softmax(jnp.log(jnp.broadcast_to(WEIGHT, gap.shape)) - gap**2 / (2 * wide) - jnp.log(wide) / 2, axis=-1)
    return share, MEAN.reshape((1,) * x.ndim + (2,)) + (alpha * WIDTH**2 / v).reshape((1,) * x.ndim + (2,)) * gap, WIDTH**2 * sigma**2 / v


def heads_of(process, prediction, count=3):
    """E p, E p^2, E p^3 of p = (x_0 - A x)/B, in closed form."""

    def heads(x, t, args):
        share, means, variance = posterior(process, x, t)
        x0 = conversions(prediction, level(process, jnp.asarray(t, x.dtype)))[0]
        m, s2 = (means - x0.of_x * x[..., None]) / x0.of_p, jnp.broadcast_to(variance, means.shape) / x0.of_p**2
        return tuple(jnp.sum(share * each, axis=-1) for each in (m, m**2 + s2, m**3 + 3 * m * s2)[:count])

    return heads


def term_of(process, prediction):
    def network(x, t, args):
        share, means, _ = posterior(process, x, t)
        x0, at = jnp.sum(share * means, axis=-1), level(process, jnp.asarray(t, x.dtype))
        return convert(process, prediction, x0, (x - at.alpha * x0) / at.sigma, t)

    return aj.DiffusionTerm(network, process, prediction)


def true_moments(process, x, s, t):
    """Mean and central moments 2, 3 of x_t | x_s, p(x_t | x_s) ~ p(x_t) N(x_s; a x_t, sigma_s^2 - a^2 sigma_t^2), by the trapezoidal rule."""
    y = np.linspace(-6, 6, 20001)
    a = process.alpha(s) / process.alpha(t)
    v = process.alpha(t) ** 2 * WIDTH**2 + process.sigma(t) ** 2
    prior = np.sum(WEIGHT / np.sqrt(v) * np.exp(-((y[:, None] - process.alpha(t) * MEAN) ** 2) / (2 * v)), axis=1)
    weight = prior * np.exp(-((np.asarray(x)[..., None] - a * y) ** 2) / (2 * (process.sigma(s) ** 2 - a**2 * process.sigma(t) ** 2)))
    weight /= weight.sum(-1, keepdims=True)
    mean = (weight * y).sum(-1)
    return mean, *((weight * (y - mean[..., None]) ** n).sum(-1) for n in (2, 3))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", ["vp_linear", "flow"])
def test_three_moments_of_the_transition(name, prediction):
    """To 1e-12 where a mixture of that skewness exists; to two moments elsewhere, which the points cover too."""
    process, (s, t) = PROCESSES[name], (0.5, 0.05)
    x = jnp.linspace(-2.0, 2.0, 41)
    step = lambda z, choice: aj.sample(  # noqa: E731
        term_of(process, prediction), x, grid=[s, t], solver=GMS(heads_of(process, prediction)), noise=jnp.full((1, 2, 41), z).at[0, 1].set(choice)
    )
    one, two = step(0.0, FIRST), step(0.0, SECOND)
    width = step(1.0, FIRST) - one
    assert relative(step(1.0, SECOND) - two, width) < 1e-12
    mean = one / 3 + 2 * two / 3
    spread = (one - mean) ** 2 / 3 + 2 * (two - mean) ** 2 / 3 + width**2
    skew = (one - mean) ** 3 / 3 + 2 * (two - mean) ** 3 / 3
    exact = true_moments(process, x, s, t)
    bound = np.abs(exact[2]) > exact[1] ** 1.5 / np.sqrt(2)
    assert 0 < bound.sum() < 35
    np.testing.assert_allclose(mean, exact[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(spread, exact[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(skew[~bound], exact[2][~bound], rtol=0, atol=1e-12)
    assert np.all(np.abs(skew[bound]) < np.abs(exact[2][bound]))
    assert np.all(np.sign(skew[bound]) == np.sign(exact[2][bound]))


def test_few_steps_beat_ancestral_sampling():
    """Wasserstein-1 distance of 40000 samples of 10 steps to the data, by sorted samples and quantiles: three moments, two, none."""
    process, count = PROCESSES["vp_linear"], 40_000
    ts = aj.grids.uniform(process, 10, t_end=1e-3)
    x, key = jax.random.normal(jax.random.key(0), (count,)), jax.random.key(1)
    term = term_of(process, "eps")
    data = np.random.default_rng(2)
    chosen = data.choice(2, size=count, p=WEIGHT)
    exact = np.sort(MEAN[chosen] + WIDTH[chosen] * data.standard_normal(count))
    variance = x0_variance(term, jnp.asarray(exact), grid=ts, key=jax.random.key(3))
    solvers = {
        "three": GMS(heads_of(process, "eps")),
        "two": GMS(heads_of(process, "eps", 2)),
        "analytic": GMS(variance=variance),
        "ancestral": aj.DDIM(1.0),
    }
    run = lambda solver: jax.jit(lambda key: aj.sample(term, x, grid=ts, solver=solver, key=key))(key)  # noqa: E731
    found = {name: np.asarray(run(solver)) for name, solver in solvers.items()}
    distance = {name: float(np.abs(np.sort(samples) - exact).mean()) for name, samples in found.items()}
    third = {name: abs(float(np.mean(samples**3) - np.mean(exact**3))) for name, samples in found.items()}
    print(distance, third)
    assert distance["three"] < 0.5 * distance["ancestral"]
    assert distance["two"] < distance["ancestral"]
    assert distance["analytic"] < distance["ancestral"]
    assert third["three"] < 0.5 * third["ancestral"]


def test_without_moments_it_is_ancestral_sampling():
    """V = 0 is DDIM(1) in its first draw; a variance by step is that of the pair of heads where the data are one Gaussian."""
    process = PROCESSES["vp_linear"]
    ts, term = aj.grids.log_snr(process, 5), term_of(process, "v")
    noise = jax.random.normal(jax.random.key(0), (5, 2, 7))
    x = jax.random.normal(jax.random.key(1), (7,))
    ancestral = aj.sample(term, x, grid=ts, solver=aj.DDIM(1.0), noise=noise[:, 0])
    assert relative(aj.sample(term, x, grid=ts, solver=GMS(), noise=noise), ancestral) < 1e-12
    c2, at = 0.49, level(process, ts[:-1])
    by_step = c2 * at.sigma**2 / (at.alpha**2 * c2 + at.sigma**2)

    def heads(x, t, args):
        at = level(process, t)
        v = at.alpha**2 * c2 + at.sigma**2
        mean = at.alpha * c2 / v * x
        return mean, mean**2 + c2 * at.sigma**2 / v

    gaussian = aj.DiffusionTerm(lambda x, t, args: heads(x, t, args)[0], process, "x0")
    pair, number = (aj.sample(gaussian, x, grid=ts, solver=solver, noise=noise) for solver in (GMS(heads), GMS(variance=by_step)))
    assert relative(pair, number) < 1e-12
    estimate = x0_variance(gaussian, 0.7 * jax.random.normal(jax.random.key(2), (20_000,)), grid=ts, key=jax.random.key(3))
    assert relative(estimate, by_step) < 0.03


@pytest.mark.parametrize("name", ["vp_discrete", "flow"])
def test_exact_gradients_keys_and_one_trace(name):
    """DiscreteAdjoint is autodiff to 1e-12 in x_T, args and noise on processes of three kinds; a key means its normal draws; vmap is a loop."""
    process = PROCESSES[name]
    start, end = {"edm": (5.0, 0.1), "ve": (0.9, 0.3), "vp_discrete": (900.0, 50.0)}.get(name, (0.9, 0.1))
    ts, moments = np.linspace(start, end, 5), heads_of(process, "v")

    def heads(x, t, args):
        first, second, third = moments(x, t, args)
        return first + args * x, second + 2 * args * x * first + args**2 * x**2, third * (1 + args)

    solver, term = GMS(heads), term_of(process, "v")
    x, noise = jax.random.normal(jax.random.key(0), (3, 4)), jax.random.normal(jax.random.key(1), (4, 2, 3, 4))
    traces = []

    @partial(jax.jit, static_argnums=0)
    def gradients(adjoint, x, args, noise):
        traces.append(1)
        run = lambda x, args, noise: jnp.sum(jnp.sin(aj.sample(term, x, args, grid=ts, solver=solver, noise=noise, adjoint=adjoint)))  # noqa: E731
        return jax.value_and_grad(run, (0, 1, 2))(x, args, noise)

    inputs = x, jnp.asarray(0.02), noise
    for one, two in zip(
        jax.tree.leaves(gradients(aj.DiscreteAdjoint(), *inputs)), jax.tree.leaves(gradients(aj.DirectAdjoint(), *inputs)), strict=True
    ):
        assert np.all(np.isfinite(two))
        assert relative(one, two) < 1e-12
    gradients(aj.DiscreteAdjoint(), 2 * x, inputs[1], noise)
    assert len(traces) == 2
    run = lambda x, key: aj.sample(term, x, inputs[1], grid=ts, solver=solver, key=key)  # noqa: E731
    key = jax.random.key(4)
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (2, *x.shape)) for i in range(4)])
    assert relative(run(x, key), aj.sample(term, x, inputs[1], grid=ts, solver=solver, noise=drawn)) < 1e-12
    both = jnp.stack([x, 2 * x])
    assert relative(jax.vmap(run, (0, None))(both, key), jnp.stack([run(each, key) for each in both])) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_slopes_at_the_edges_are_finite(dtype):
    """No third moment, or what rounding makes of none; too much of it; no variance at all."""
    m2, m3 = jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0], dtype), jnp.asarray([0.0, 1e-16, 0.5, 3.0, 0.0], dtype)
    slopes = jax.jacrev(lambda m2, m3: mixture(m2, m3), (0, 1))(m2, m3)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
    k, width = mixture(m2, m3)
    np.testing.assert_allclose(width**2 + 2 * k**2, m2, rtol=1e-6)
