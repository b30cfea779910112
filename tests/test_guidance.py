"""Guidance, edges and times of networks: reference values, closed forms, exact gradients, one trace."""

import json
from itertools import pairwise

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from models import PREDICTIONS, PROCESSES, convert, relative
from shared import shared
from test_export import FLOAT64

import adjoint_jax as aj
from adjoint_jax._reflect import reflect
from adjoint_jax.networks import conversions
from adjoint_jax.splitting import level

LINEAR = aj.VPLinear()
DISCRETE = PROCESSES["vp_discrete"]
GRID = aj.grids.log_snr(LINEAR, 6, t_start=0.8, t_end=0.1)
X = jax.random.normal(jax.random.key(0), (3, 4, 2))


def network(x, t, args):
    """Conditioned on a vector; every sample sees all of its own entries."""
    hidden = jnp.tanh(x @ args["params"] + args["cond"][:, None, :] * jnp.cos(jnp.asarray(t, x.dtype)))
    return 0.5 * hidden + 0.3 * jnp.sin(jnp.mean(x, axis=1, keepdims=True))


def inputs(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(1), 3)
    args = {"params": jax.random.normal(keys[0], (2, 2)), "cond": jax.random.normal(keys[1], (3, 2)), "uncond": jnp.zeros((3, 2))}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), (X, args, jnp.asarray([0.7, 2.0, 4.5])))


def log_prob(x, t, args):
    """A classifier that is not quadratic."""
    return jax.nn.log_sigmoid(jnp.sum(jnp.sin(x), axis=(1, 2)) * (1 + jnp.asarray(t, x.dtype)) + jnp.sum(args["cond"], axis=1))


SHARED_TIMES = np.array([0.0, 0.2, 0.35])
WRAPPED = {  # name: (network of a scale, prediction)
    "cfg": (lambda scale: aj.cfg(network, scale), "eps"),
    "rescale": (lambda scale: aj.cfg(network, scale, rescale=0.7), "eps"),
    "rescale by an array": (lambda scale: aj.cfg(network, 2.0, rescale=0.2 * scale), "eps"),
    "interval": (lambda scale: aj.cfg(network, scale, rescale=0.3, interval=(0.3, 0.6)), "v"),
    "classifier": (lambda scale: aj.networks.classifier_guidance(network, log_prob, LINEAR, "eps", scale), "eps"),
    "clip": (lambda scale: aj.networks.clip(aj.cfg(network, scale), LINEAR, "eps", -2.0, 3.0), "x0"),
    "threshold": (lambda scale: aj.networks.threshold(aj.cfg(network, scale), LINEAR, "eps", ratio=0.8), "x0"),
    "threshold by a table": (lambda scale: aj.networks.threshold(aj.cfg(network, 2.0), DISCRETE, "v", ratio=0.2 * scale[0], low=0.1), "x0"),
    "time sharing": (lambda scale: aj.networks.time_sharing(aj.cfg(network, scale), SHARED_TIMES), "eps"),
    "rounded": (lambda scale: aj.networks.rounded_times(aj.cfg(network, scale), unit=10.0), "eps"),
    "looked up": (lambda scale: aj.networks.rounded_times(aj.cfg(network, scale), (GRID, GRID**2)), "eps"),
}


def loss(name, x, args, scale, adjoint=None):
    make, prediction = WRAPPED[name]
    sample = aj.sample(aj.DiffusionTerm(make(scale), LINEAR, prediction), x, args, grid=GRID, adjoint=adjoint)
    return jnp.sum(jnp.sin(sample) * jnp.arange(1.0, 1 + sample.size, dtype=sample.dtype).reshape(sample.shape))


@pytest.mark.parametrize("name", WRAPPED)
def test_exact_gradients_are_those_of_plain_autodiff(name):
    """In x, in args and in the scale of each sample."""
    gradient = jax.jit(jax.grad(lambda *inputs, adjoint: loss(name, *inputs, adjoint), argnums=(0, 1, 2)), static_argnames="adjoint")
    found, exact = (gradient(*inputs(), adjoint=adjoint) for adjoint in (aj.DiscreteAdjoint(), aj.DirectAdjoint()))
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(exact), strict=True):
        assert jnp.any(other != 0) or (name == "classifier" and "uncond" in jax.tree_util.keystr(path))
        assert relative(one, other) < 1e-12


@pytest.mark.parametrize("name", WRAPPED)
def test_the_gradient_in_the_scale_by_differences(name):
    x, args, scale = inputs()
    value = jax.jit(lambda scale: loss(name, x, args, scale))
    direction, h = jnp.asarray([0.3, -0.5, 0.8]), 1e-4
    near, far = (value(scale + k * h * direction) - value(scale - k * h * direction) for k in (1, 2))
    differences = (8 * near - far) / (12 * h)
    np.testing.assert_allclose(jnp.vdot(jax.grad(value)(scale), direction), differences, rtol=2e-7)


@pytest.mark.parametrize("name", WRAPPED)
def test_vmap_over_scales_and_samples_and_one_trace(name):
    """A batch is a loop over its samples, each with its own scale; other scales do not trace again."""
    x, args, scale = inputs()
    traces = []

    def one(x, cond, scale):
        traces.append(name)
        return jax.grad(lambda scale: loss(name, x[None], {**args, "cond": cond[None], "uncond": args["uncond"][:1]}, scale[None]))(scale)

    mapped, single = jax.jit(jax.vmap(one)), jax.jit(one)
    expected = jnp.stack([single(*sample) for sample in zip(x, args["cond"], scale, strict=True)])
    assert relative(mapped(x, args["cond"], scale), expected) < 1e-12
    before = len(traces)
    assert relative(mapped(x, args["cond"], 2 * scale), expected) > 1e-6
    single(x[0], args["cond"][0], 2 * scale[0])
    assert len(traces) == before


@pytest.mark.parametrize("name", WRAPPED)
def test_export_for_tpu_holds_no_float64(name):
    x, args, scale = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs(jnp.float32))
    gradient = jax.jit(jax.grad(lambda *inputs: loss(name, *inputs), argnums=(0, 1, 2)))
    assert not FLOAT64.findall(jax.export.export(gradient, platforms=["tpu"])(x, args, scale).mlir_module())


def test_equal_wrappers_are_one_trace():
    """Wrappers are pytrees: numbers are leaves, callables are not; made twice they are equal, hash equal and share a trace."""
    process, traces = LINEAR, []

    def make(scale, ratio):
        guided = aj.cfg(network, scale, rescale=0.5, interval=(0.1, 0.6))
        return aj.networks.time_sharing(aj.networks.threshold(guided, process, "eps", ratio=ratio), jnp.asarray(SHARED_TIMES))

    @jax.jit
    def run(wrapped, x, args):
        traces.append(0)
        return aj.sample(aj.DiffusionTerm(wrapped, process, "x0"), x, args, grid=GRID)

    x, args, _ = inputs()
    first, again, other = (run(make(*options), x, args) for options in ((2.0, 0.9), (2.0, 0.9), (3.0, 0.8)))
    np.testing.assert_array_equal(first, again)
    assert relative(first, other) > 1e-3
    assert len(traces) == 1
    for once, twice in (
        (aj.cfg(network, 2.0, 0.5, (0.1, 0.6)), aj.cfg(network, 2.0, 0.5, (0.1, 0.6))),
        (aj.networks.classifier_guidance(network, log_prob, process), aj.networks.classifier_guidance(network, log_prob, process)),
        (aj.networks.clip(network, process, "v"), aj.networks.clip(network, process, "v")),
        (aj.networks.rounded_times(network, "truncate"), aj.networks.rounded_times(network, "truncate")),
        (aj.networks.threshold(network, DISCRETE, "v"), aj.networks.threshold(network, aj.VPDiscrete(DISCRETE.alphas_cumprod.copy()), "v")),
        (aj.networks.time_sharing(network, SHARED_TIMES), aj.networks.time_sharing(network, list(SHARED_TIMES))),
    ):
        assert once == twice
        assert hash(once) == hash(twice)


# --- classifier-free guidance ---


def two(conditional, unconditional):
    """A network that answers with one of two arrays, and its args."""
    return lambda x, t, args: args["cond"], {"cond": jnp.asarray(conditional), "uncond": jnp.asarray(unconditional)}


def test_guided_and_rescaled_values_of_diffusers():
    values = np.load(shared("golden/golden_schedules.npz"))
    net, args = two(values["cfg/cond"], values["cfg/uncond"])
    for rescale, name in ((0.0, "guided_7.5"), (0.7, "rescaled_0.7")):
        found = aj.cfg(net, 7.5, rescale=rescale)(args["cond"], 0.0, args)
        np.testing.assert_allclose(found, values[f"cfg/{name}"], rtol=1e-12, atol=1e-13)


def test_rescale_is_per_sample_and_fully_rescaled_samples_have_the_conditional_spread():
    net, args = two(X, jax.random.normal(jax.random.key(5), X.shape))
    plain = aj.cfg(net, 4.0)(X, 0.0, args)
    found = aj.cfg(net, 4.0, rescale=jnp.asarray([0.0, 0.5, 1.0]))(X, 0.0, args)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-14)
    np.testing.assert_allclose(jnp.std(found[2]), jnp.std(X[2]), rtol=1e-14)
    np.testing.assert_allclose(found[1], (plain[1] + plain[1] * jnp.std(X[1]) / jnp.std(plain[1])) / 2, rtol=1e-14)


@pytest.mark.parametrize("flat", ["conditional", "both"])
def test_rescale_of_a_constant_prediction_is_finite_with_finite_gradients(flat):
    """0/0 and the root at zero: black images make them."""

    def value(level, scale):
        net, args = two(level * jnp.ones_like(X), jnp.zeros_like(X) if flat == "both" else X)
        return jnp.sum(aj.cfg(net, scale, rescale=0.7)(X, 0.0, args) ** 2)

    assert all(jnp.isfinite(g) for g in jax.grad(value, argnums=(0, 1))(0.4, 3.0))


@pytest.mark.parametrize(("t", "guided"), [(0.29, False), (0.3, True), (0.5, True), (0.6, True), (0.61, False)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_interval_holds_both_ends(t, guided, dtype):
    x, args, _ = inputs(dtype)
    found = aj.cfg(network, 3.0, interval=(0.3, 0.6))(x, jnp.asarray(t, dtype), args)
    expected = aj.cfg(network, 3.0)(x, jnp.asarray(t, dtype), args) if guided else network(x, t, args)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_outside_the_interval_the_network_runs_once():
    calls = []

    def counting(x, t, args):
        jax.debug.callback(lambda _: calls.append(1), x)
        return network(x, t, args)

    x, args, scale = inputs()
    inside = int(np.sum((GRID[:-1] >= 0.3) & (GRID[:-1] <= 0.6)))
    assert 0 < inside < 6
    term = aj.DiffusionTerm(aj.cfg(counting, scale, interval=(0.3, 0.6)), LINEAR)
    jax.block_until_ready(aj.sample(term, x, args, grid=GRID, solver=aj.DDIM()))
    jax.effects_barrier()
    assert len(calls) == 6 + inside


def test_the_interval_is_an_array_like_any_other():
    """Changed without a trace; under vmap over intervals both branches run and the right one is taken."""
    x, args, scale = inputs()
    run = jax.jit(jax.vmap(lambda low: aj.cfg(network, scale, interval=(low, 0.6))(x, 0.5, args)))
    found = run(jnp.asarray([0.4, 0.55]))
    np.testing.assert_allclose(found[0], aj.cfg(network, scale)(x, 0.5, args), rtol=1e-14)
    np.testing.assert_allclose(found[1], network(x, 0.5, args), rtol=1e-14)
    run(jnp.asarray([0.1, 0.2]))
    assert run._cache_size() == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_interval_in_shard_map(check_vma):
    """Each device has its own samples and scales; both branches of the condition vary alike."""
    keys = jax.random.split(jax.random.key(2), 2)
    x, cond, scale = jax.random.normal(keys[0], (4, 4, 2)), jax.random.normal(keys[1], (4, 2)), jnp.linspace(1.0, 4.0, 4)
    params = inputs()[1]["params"]

    def objective(x, cond, scale):
        args = {"params": params, "cond": cond, "uncond": jnp.zeros_like(cond)}
        term = aj.DiffusionTerm(aj.cfg(network, scale, rescale=0.5, interval=(0.3, 0.6)), LINEAR)
        return jnp.sum(jnp.sin(aj.sample(term, x, args, grid=GRID)))

    gradient, batch = jax.grad(objective, argnums=(0, 1, 2)), jax.sharding.PartitionSpec("batch")
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    found = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=check_vma))(x, cond, scale)
    for one, other in zip(found, jax.jit(gradient)(x, cond, scale), strict=True):
        assert relative(one, other) < 1e-12


def test_a_bfloat16_network_is_guided_in_its_dtype():
    """And the state stays float32."""
    x, args, _ = inputs(jnp.float32)

    def half(x, t, args):
        return network(x, t, args).astype(jnp.bfloat16)

    term = aj.DiffusionTerm(aj.cfg(half, jnp.full(3, 2.0, jnp.float32), rescale=0.7, interval=(0.3, 0.6)), LINEAR)
    found = aj.sample(term, x, args, grid=GRID)
    assert found.dtype == jnp.float32
    exact = aj.sample(aj.DiffusionTerm(aj.cfg(network, 2.0, rescale=0.7, interval=(0.3, 0.6)), LINEAR), x, args, grid=GRID)
    assert 1e-6 < relative(found, exact) < 3e-2


# --- guidance by a classifier ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", ["vp_linear", "edm", "flow"])
def test_a_classifier_moves_eps_in_every_prediction(process, prediction):
    process, t, scale = PROCESSES[process], jnp.asarray(0.4), jnp.asarray([0.5, 1.0, 3.0])
    (x, args, _), at = inputs(), level(process, jnp.asarray(0.4))
    x0, eps = X / 3, (X - at.alpha * X / 3) / at.sigma
    guided = aj.networks.classifier_guidance(lambda x, t, args: convert(process, prediction, x0, eps, t), log_prob, process, prediction, scale)
    of_x0, of_eps = conversions(prediction, at)
    p = guided(x, t, args)
    gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t, args)))(x)
    moved = eps - scale[:, None, None] * at.sigma * gradient
    np.testing.assert_allclose(of_eps.of_x * x + of_eps.of_p * p, moved, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(of_x0.of_x * x + of_x0.of_p * p, (x - at.sigma * moved) / at.alpha, rtol=1e-12, atol=1e-13)


def test_the_gradient_keeps_the_hessian_of_the_classifier():
    """For log p = -x'Ax/2 + b'x the Jacobian of the guided eps is that of eps plus w sigma A; for another, minus w sigma times its Hessian."""
    x, args, _ = inputs()
    x, size, t, w = x[:1], x[0].size, 0.4, 2.5
    one = {"params": args["params"], "cond": args["cond"][:1]}
    root = jax.random.normal(jax.random.key(9), (size, size))
    a = root @ root.T

    def quadratic(x, t, args):
        return -0.5 * jnp.vdot(x, (a @ x.reshape(-1)).reshape(x.shape)) + jnp.sum(x)

    def jacobian(net):
        return jax.jacobian(lambda v: net(v.reshape(x.shape), t, one).reshape(-1))(x.reshape(-1))

    sigma = LINEAR.sigma(t)
    guided = aj.networks.classifier_guidance(network, quadratic, LINEAR, "eps", w)
    np.testing.assert_allclose(jacobian(guided) - jacobian(network), w * sigma * a, rtol=1e-11, atol=1e-11)
    guided = aj.networks.classifier_guidance(network, log_prob, LINEAR, "eps", w)
    hessian = jax.hessian(lambda v: log_prob(v.reshape(x.shape), t, one)[0])(x.reshape(-1))
    np.testing.assert_allclose(jacobian(guided) - jacobian(network), -w * sigma * hessian, rtol=1e-11, atol=1e-12)


def test_a_true_classifier_samples_the_conditional_distribution():
    """Data N(0, 1), y = x0 + c n observed: p(x0 | y) = N(y/(1 + c^2), c^2/(1 + c^2)), p(y | x_t) = N(alpha x, sigma^2 + c^2)."""
    y, c, x_T = 0.7, 0.5, jnp.asarray([[-1.3], [0.2], [1.1]])
    process = aj.VPLinear(beta_max=60.0)  # alpha(1) = 3e-7: the start is N(0, 1) whatever y

    def eps(x, t, args):
        return process.sigma(jnp.asarray(t, x.dtype)) * x

    def observed(x, t, args):
        at = level(process, jnp.asarray(t, x.dtype))
        return -0.5 * jnp.sum((y - at.alpha * x) ** 2, axis=1) / (at.sigma**2 + c**2)

    guided = aj.networks.classifier_guidance(eps, observed, process)
    grid = aj.grids.log_snr(process, 400, t_start=1.0, t_end=1e-5)
    found = aj.sample(aj.DiffusionTerm(guided, process), x_T, grid=grid, solver=aj.DEIS(order=4))
    np.testing.assert_allclose(found, y / (1 + c**2) + x_T * np.sqrt(c**2 / (1 + c**2)), rtol=0, atol=2e-3)


# --- edges ---


def x0_of(make, values):
    """`make` of a network whose x0 is `values`."""
    return make(lambda x, t, args: values, LINEAR, "x0")(values, 0.5, None)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 0.995, 1.0])
@pytest.mark.parametrize(("low", "high"), [(1.0, np.inf), (1.0, 1.5), (1.0, 1.0), (0.3, np.inf)])
def test_threshold_is_its_definition(ratio, low, high):
    """numpy's quantile is torch's: linear between order statistics."""
    x0 = 2 * X
    s = np.clip(np.quantile(np.abs(np.asarray(x0)).reshape(3, -1), ratio, axis=1), low, high)[:, None, None]
    found = x0_of(lambda *net: aj.networks.threshold(*net, ratio=ratio, low=low, high=high), x0)
    np.testing.assert_allclose(found, np.clip(x0, -s, s) / s, rtol=1e-14)
    if high == 1:
        np.testing.assert_allclose(found, x0_of(aj.networks.clip, x0), rtol=1e-14)


def test_threshold_is_differentiated_through_its_quantile():
    """Where the quantile lies between two entries, x0 / s depends on both."""
    x0, direction, h = 2 * X, jax.random.normal(jax.random.key(3), X.shape), 1e-6
    value = lambda x0: jnp.sum(jnp.cos(x0_of(lambda *net: aj.networks.threshold(*net, ratio=0.7), x0)))  # noqa: E731
    gradient = jax.grad(value)(x0)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), (value(x0 + h * direction) - value(x0 - h * direction)) / (2 * h), rtol=1e-7)
    assert jnp.all(jnp.any(gradient != 0, axis=(1, 2)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_edges_take_every_prediction(prediction):
    at, x0, eps = level(LINEAR, jnp.asarray(0.4)), 2 * X, X[::-1]
    for make in (aj.networks.clip, aj.networks.threshold):
        wrapped = make(lambda x, t, args: convert(LINEAR, prediction, x0, eps, t), LINEAR, prediction)
        np.testing.assert_allclose(wrapped(at.alpha * x0 + at.sigma * eps, 0.4, None), x0_of(make, x0), rtol=1e-12, atol=1e-14)


def test_reflection_folds_at_any_distance():
    x = np.linspace(-13, 17, 4001)
    low, high = -1.0, 2.0
    expected = x.copy()
    while np.any((expected < low) | (expected > high)):
        expected = np.where(expected < low, 2 * low - expected, np.where(expected > high, 2 * high - expected, expected))
    found = reflect(jnp.asarray(x), low, high)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    assert jnp.all((found >= low) & (found <= high))
    inside = (x >= low) & (x <= high)
    np.testing.assert_array_equal(found[inside], x[inside])


def test_reflection_has_slope_one():
    x = jnp.asarray(np.random.default_rng(0).uniform(-20, 20, 500))
    slope = jax.vmap(jax.grad(lambda x: reflect(x, -1.0, 2.0)))(x)
    np.testing.assert_array_equal(jnp.abs(slope), 1)
    bounces = jnp.floor((x + 1) / 3)
    np.testing.assert_array_equal(slope, jnp.where(bounces % 2 == 0, 1, -1))
    low, high = jax.grad(lambda low, high: reflect(jnp.asarray(5.5), low, high), argnums=(0, 1))(
        -1.0, 2.0
    )  # 5.5 -> 2 high - 5.5 -> 2 low + 5.5 - 2 high
    assert (low, high) == (2, -2)
    assert reflect(jnp.asarray([1.2, -3.0], jnp.float32)).dtype == jnp.float32
    assert reflect(jnp.asarray([[1.5]]), jnp.asarray([[0.0]]), jnp.asarray([[1.0]])) == 0.5


# --- times ---


def time_given(wrap, t, dtype=jnp.float64):
    """The time that the wrapped network is given at t."""
    wrapped = wrap(lambda x, t, args: jnp.broadcast_to(t, x.shape))
    return jax.vmap(lambda t: wrapped(jnp.zeros((), dtype), t, None))(jnp.asarray(t, dtype))


def test_time_sharing_gives_the_left_ends():
    t = np.array([-0.5, 0.0, 19.9, 20.0, 39.0, 79.9, 80.0, 99.9, 100.0, 250.5])
    expected = [0, 0, 0, 20, 20, 60, 80, 80, 100, 250.5]
    for wrap in (
        lambda net: aj.networks.time_sharing(net, 100.0, intervals=5),
        lambda net: aj.networks.time_sharing(net, [0, 20, 40, 60, 80, 100]),
        lambda net: aj.networks.time_sharing(net, jnp.linspace(0, 100.0, 6)),
    ):
        np.testing.assert_allclose(time_given(wrap, t), expected, rtol=1e-15)
    exact = time_given(lambda net: aj.networks.time_sharing(net, 100.0, intervals=5), np.arange(0.0, 101.0, 20.0))
    np.testing.assert_array_equal(exact, np.arange(0.0, 101.0, 20.0))
    uneven = time_given(lambda net: aj.networks.time_sharing(net, [0.1, 0.4, 2.0]), [0.0, 0.3, 0.4, 1.9, 2.0])
    np.testing.assert_allclose(uneven, [0.1, 0.1, 0.4, 0.4, 2.0])


def test_rounded_times():
    t = np.array([0.5, 1.5, 2.5, 783.99, 784.817, 998.5000001])
    np.testing.assert_array_equal(time_given(aj.networks.rounded_times, t), [0, 2, 2, 784, 785, 999])
    truncated = lambda net: aj.networks.rounded_times(net, "truncate")  # noqa: E731
    np.testing.assert_array_equal(time_given(truncated, t), [0, 1, 2, 783, 784, 998])
    np.testing.assert_array_equal(time_given(truncated, np.nextafter([784.0, 3.0], 0)), [784, 3])
    np.testing.assert_array_equal(time_given(truncated, [784.0, 783.999], jnp.float32), [784, 783])
    thousand = time_given(lambda net: aj.networks.rounded_times(net, "truncate", unit=1000), [0.922722, 0.8178])
    np.testing.assert_allclose(thousand, [0.922, 0.817], rtol=1e-15)
    shifted = time_given(lambda net: aj.networks.rounded_times(net, lambda t: jnp.maximum(t - 1, 0)), [0.5, 3.0])
    np.testing.assert_array_equal(shifted, [0, 2])
    table = time_given(lambda net: aj.networks.rounded_times(net, ([799, 599, -1], [749, 500, 0])), [799.0, 600.0, 0.0])
    np.testing.assert_array_equal(table, [749, 500, 0])


def test_the_state_keeps_its_noise_level_and_the_gradient_in_the_grid_exists():
    """Only the network's time is rounded: the weights move with the grid, the network's answer does not move with t."""
    x, args, _ = inputs()
    grid = jnp.asarray([800.3, 500.2, 200.4, 10.1])

    def value(grid, wrap):
        return jnp.sum(aj.sample(aj.DiffusionTerm(wrap(network), DISCRETE), x, args, grid=grid, solver=aj.DDIM()))

    def looked_up(net):
        return aj.networks.rounded_times(net, (np.asarray(grid), np.round(np.asarray(grid))))

    plain, rounded, table = (jax.value_and_grad(value)(grid, wrap) for wrap in (lambda net: net, aj.networks.rounded_times, looked_up))
    assert relative(rounded[0], plain[0]) > 1e-6
    np.testing.assert_allclose(rounded[0], table[0], rtol=1e-14)
    np.testing.assert_allclose(rounded[1], table[1], rtol=1e-12)
    h, direction = 1e-4, jnp.asarray([1.0, -2.0, 0.5, 1.5])
    differences = (value(grid + h * direction, aj.networks.rounded_times) - value(grid - h * direction, aj.networks.rounded_times)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(rounded[1], direction), differences, rtol=1e-7)


# --- whole samples of other libraries, on their mixture of four Gaussians ---


def golden(case):
    """(arrays of the case, network of (x, t, args), x_T); args = {"cond": which components take part `[4]`}."""
    folder = "golden/"
    values, params = np.load(shared(folder + "golden_main.npz")), np.load(shared(folder + "golden_params.npz"))
    cases = json.loads(shared(folder + "index.json").read_text())["cases"]
    arrays = {name: values[f"{case}/{name}"] for name in cases[case]["arrays"]}
    logw, mu, s = (jnp.asarray(params[f"gmm192/{name}"]) for name in ("logw", "mu", "s"))

    def eps(x, t, args):
        at, flat = level(DISCRETE, jnp.asarray(t, x.dtype)), x.reshape(len(x), 1, -1)
        v, d = (at.alpha**2 * s**2 + at.sigma**2)[None], flat - at.alpha * mu[None]
        weights = jnp.where(args["cond"][None], logw[None] - 0.5 * jnp.sum(d**2 / v + jnp.log(v), axis=-1), -jnp.inf)
        return at.sigma * jnp.sum(jax.nn.softmax(weights, axis=-1)[..., None] * d / v, axis=1).reshape(x.shape)

    return arrays, eps


EVERY, FIRST = np.ones(4, bool), np.arange(4) < 2


def reproduces(case, wrap, prediction, grid, rtol=1e-11, **args):
    """The sample and its gradient in x_T are those of the case."""
    arrays, eps = golden(case)
    term = aj.DiffusionTerm(wrap(eps), DISCRETE, prediction)

    def objective(x):
        sample = aj.sample(term, x, {"cond": jnp.asarray(EVERY), **args}, grid=grid(arrays), solver=aj.DPMSolverPP(order=2))
        return 0.5 * jnp.sum((sample - arrays["target"]) ** 2), sample

    gradient, sample = jax.grad(objective, has_aux=True)(jnp.asarray(arrays["xT"]))
    assert relative(sample, arrays["x0"]) < rtol
    assert relative(gradient, arrays["grad_xT"]) < 100 * rtol


def lu_grid(arrays):
    """t = 1 .. 1/1000 evenly, in training steps t 1000 - 1."""
    return np.linspace(1, 1e-3, len(arrays["traj"])) * 1000 - 1


def sigma_grid(arrays):
    """The scheduler's noise levels as times, the last one clean."""
    return np.append(DISCRETE.t_of_lam(-np.log(arrays["sigmas"][:-1])), -1.0)


def test_guidance_of_dpm_solver():
    args = {"cond": jnp.asarray(FIRST), "uncond": jnp.asarray(EVERY)}
    reproduces("dpm-solver/lu_multi_dpmsolver++_o2_cfg2.5_n10", lambda net: aj.cfg(net, 2.5), "eps", lu_grid, **args)


def test_thresholding_of_dpm_solver():
    case = "dpm-solver/lu_multi_dpmsolver++_o2_thr_n10"
    reproduces(case, lambda net: aj.networks.threshold(net, DISCRETE, "eps", ratio=0.9), "x0", lu_grid)


@pytest.mark.parametrize(
    ("case", "rule"),
    [("dpmm_dpmsolver++_o2_n9_karras_t", "nearest"), ("dpmm_++_o2_exp_t_n10", "truncate")],
)
def test_rounded_times_of_diffusers(case, rule):
    """Karras and exponential noise levels, integer times for the network."""
    reproduces(f"diffusers/{case}", lambda net: aj.networks.rounded_times(net, rule), "eps", sigma_grid)


def test_thresholding_of_diffusers():
    """DPM-Solver++ 3M as published, whose second difference lacks a factor 2: written out here, since `DPMSolverPP(order=3)` has it."""
    arrays, eps = golden("diffusers/dpmm_++_o3_thr_n10")
    net = aj.networks.threshold(eps, DISCRETE, "eps", ratio=0.9, high=1.5)
    sigmas, x, past = arrays["sigmas"], jnp.asarray(arrays["xT"]), []
    lam = -np.log(np.append(sigmas[:-1], np.nan))
    for i, t in enumerate(arrays["timesteps"]):
        x0 = net(x, float(t), {"cond": jnp.asarray(EVERY)})
        past = [(lam[i], x0), *past][:3]
        if i == len(sigmas) - 2:
            x = x0
            break
        h, order = lam[i + 1] - lam[i], min(len(past), len(sigmas) - 1 - i)
        slopes = [(a[1] - b[1]) * (h / (a[0] - b[0])) for a, b in pairwise(past)]
        alpha, base = np.sqrt(1 / (1 + sigmas[i + 1] ** 2)), -np.expm1(-h)
        answer = sigmas[i + 1] / sigmas[i] * alpha * np.sqrt(1 + sigmas[i] ** 2) * x + alpha * base * x0
        if order == 2:
            answer = answer + 0.5 * alpha * base * slopes[0]
        if order == 3:
            r0, r1 = ((past[j][0] - past[j + 1][0]) / h for j in (0, 1))
            first, second = slopes[0] + r0 / (r0 + r1) * (slopes[0] - slopes[1]), (slopes[0] - slopes[1]) / (r0 + r1)
            phi2 = (np.expm1(-h) / -h - 1) / -h
            answer = answer + alpha * h * (phi2 * first + (phi2 - 0.5) / -h * second)
        x = answer
    assert relative(x, arrays["x0"]) < 1e-11


def test_clipping_of_diffusers_ddim_is_another_method():
    """Its eps is that of the x0 before the clip: no network answers for both. With the eps of the clipped x0 the samples differ."""
    arrays, eps = golden("diffusers/ddim_clip_n10")
    cond = {"cond": jnp.asarray(EVERY)}
    net = aj.networks.clip(eps, DISCRETE, "eps")
    x = jnp.asarray(arrays["xT"])
    for t in arrays["timesteps"]:
        end = level(DISCRETE, np.float64(max(t - 100, -1)))
        x = end.alpha * net(x, float(t), cond) + end.sigma * eps(x, float(t), cond)
    assert relative(x, arrays["x0"]) < 1e-11
    grid = np.append(arrays["timesteps"], -1.0)
    ours = aj.sample(aj.DiffusionTerm(net, DISCRETE, "x0"), jnp.asarray(arrays["xT"]), cond, grid=grid, solver=aj.DDIM())
    assert relative(ours, arrays["x0"]) > 1e-7


ERRORS = {
    "interval of one": (lambda: aj.cfg(network, 2.0, interval=(0.3,)), r"interval must be two times .*got \(0.3,\)"),
    "interval turned round": (lambda: aj.cfg(network, 2.0, interval=(0.6, 0.3)), r"t_low < t_high; got \(0.6, 0.3\)"),
    "rescale without a batch": (
        lambda: aj.cfg(*two(X[0, 0], X[0, 1])[:1], 2.0, 0.7)(X[0, 0], 0.0, two(X[0, 0], X[0, 1])[1]),
        r"give x a leading axis",
    ),
    "threshold without a batch": (
        lambda: x0_of(aj.networks.threshold, X[0, 0]),
        r"networks.threshold measures each sample of a batch.*got shape \(2,\)",
    ),
    "threshold of an unknown prediction": (
        lambda: aj.networks.threshold(network, LINEAR, "noise"),
        r"prediction='noise' is not known: use one of eps",
    ),
    "threshold ratio": (lambda: aj.networks.threshold(network, LINEAR, "eps", ratio=99.5), r"between 0 and 1; got 99.5"),
    "clip range": (lambda: aj.networks.clip(network, LINEAR, "eps", 1.0, -1.0), r"needs low < high; got low=1.0, high=-1.0"),
    "classifier of an unknown prediction": (
        lambda: aj.networks.classifier_guidance(network, log_prob, LINEAR, "noise"),
        r"prediction='noise' is not known",
    ),
    "boundaries": (lambda: aj.networks.time_sharing(network, [0.0, 0.2, 0.2]), r"at least two increasing times; got"),
    "one boundary": (lambda: aj.networks.time_sharing(network, [0.0]), r"at least two increasing times; got"),
    "no intervals": (lambda: aj.networks.time_sharing(network, 1.0, intervals=0), r"at least one sub-interval; got intervals=0"),
    "rule": (lambda: aj.networks.rounded_times(network, "floor"), r"rule='floor' is not known: use one of nearest, truncate"),
    "table": (lambda: aj.networks.rounded_times(network, ([1, 2], [1])), r"two vectors of equal length.*\(2,\) and \(1,\)"),
    "box": (lambda: reflect(X, 1.0, 1.0), r"A box needs low < high; got low=1.0, high=1.0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    act, sentence = ERRORS[case]
    with pytest.raises(ValueError, match=sentence):
        act()
