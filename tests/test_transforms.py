"""A gradient is the same under every transformation of JAX: eager, jit, vmap, grad of vmap, pmap, shard_map, diffeqsolve; and traces once."""

from functools import cache, partial

import counting
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import adjoint_jax as aj

BATCH, WIDTH, HIDDEN, COND, LABELS, STEPS = 4, 3, 5, 2, 3, 4
PROCESS = aj.VPLinear()
GRID = aj.grids.log_snr(PROCESS, STEPS, t_start=0.5, t_end=0.2)  # steps of 0.39 in lam: the published rules are stable
SOLVERS = {"DPMSolverPP2": aj.DPMSolverPP(order=2), "DEIS3": aj.DEIS(order=3), "RK_Heun": aj.ExponentialRK(diffrax.Heun())}
ADJOINTS = {
    "direct": aj.DirectAdjoint(),
    "discrete": aj.DiscreteAdjoint(),
    "PECE": aj.AdjointDEIS(order=3),
    "AB": aj.AdjointDEIS(order=2, steps=2, nodes="index", mode="AB", keep=True),
    "DPM": aj.AdjointDPM(),
    "kept": aj.adjoints.InterpolatedAdjoint(steps=3, mode="PEC", keep=True),
}
CONTINUOUS = ("PECE", "AB", "DPM")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # each program runs once
TRACES = []


def network(x, t, args):
    """Two dense layers, conditioned on a vector, a label and a dropout key, and a convolution, channels first; one sample or a batch."""
    TRACES.append(t)
    p, key = args["params"], args["key"]
    label = p["label"][args["label"]]
    hidden = x @ p["in"] + args["cond"] @ p["cond"] + label * jnp.cos(jnp.asarray(t, x.dtype))
    draw = partial(jax.random.bernoulli, p=0.8, shape=(HIDDEN,))
    kept = jax.vmap(draw)(key) if key.ndim else draw(key)
    near = jax.lax.conv_general_dilated(x.reshape(-1, 1, WIDTH), p["kernel"], (1,), "SAME")
    return jnp.where(kept, jnp.tanh(hidden), 0) @ p["out"] + 0.3 * near.reshape(x.shape)


def weights():
    shapes = {"in": (WIDTH, HIDDEN), "cond": (COND, HIDDEN), "label": (LABELS, HIDDEN), "out": (HIDDEN, WIDTH), "kernel": (1, 1, 3)}
    return {name: jax.random.normal(jax.random.key(i), shape) / 2 for i, (name, shape) in enumerate(shapes.items())}


def inputs():
    """(x_T, cond, scale, params), which are differentiated, and (label, key), which are not; all but params have a batch axis."""
    keys = jax.random.split(jax.random.key(7), 4)
    x, cond = jax.random.normal(keys[0], (BATCH, WIDTH)), jax.random.normal(keys[1], (BATCH, COND))
    return (x, cond, jnp.linspace(0.5, 2.0, BATCH), weights()), (jnp.arange(BATCH) % LABELS, jax.random.split(keys[2], BATCH))


BATCHED, SHARED = (0, 0, 0, None, 0, 0), (3,)
SPECS = tuple(P() if axis is None else P("batch") for axis in BATCHED)


def guided(scale):
    return aj.DiffusionTerm(aj.cfg(network, scale), PROCESS)


def arguments(cond, params, label, key):
    return {"params": params, "cond": cond, "uncond": jnp.zeros_like(cond), "label": label, "key": key}


def loss(x, cond, scale, params, label, key, *, adjoint, solver, grid=GRID):
    sample = aj.sample(guided(scale), x, arguments(cond, params, label, key), grid=grid, solver=SOLVERS[solver], adjoint=ADJOINTS[adjoint])
    return jnp.sum(jnp.sin(sample))


def gradient(function):
    return jax.value_and_grad(function, argnums=(0, 1, 2, 3))


def quick(function, *args):
    """`function` compiled without expensive passes, at once."""
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)


def close(found, expected, rtol=1e-11, atol=1e-12):
    """Equal trees of arrays of equal shapes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=rtol, atol=atol)
        assert one.shape == other.shape


@cache
def reference(adjoint, solver):
    """(values `[B]`, gradients with a batch axis each) by a Python loop over the samples, compiled by jit."""
    differentiated, rest = inputs()
    everything = (*differentiated, *rest)
    samples = [tuple(leaf if axis is None else leaf[i] for leaf, axis in zip(everything, BATCHED, strict=True)) for i in range(BATCH)]
    program = quick(gradient(partial(loss, adjoint=adjoint, solver=solver)), *samples[0])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(program(*sample) for sample in samples))


def summed(adjoint, solver):
    """The gradients of the batch's total: those of the parameters added up."""
    _, gradients = reference(adjoint, solver)
    return tuple(jax.tree.map(lambda leaf: leaf.sum(axis=0), g) if i in SHARED else g for i, g in enumerate(gradients))


def sharded(function, out_specs, check_vma):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=SPECS, out_specs=out_specs, check_vma=check_vma)


def gradient_inside(function, check_vma, *args):
    """Each device differentiates its own samples; replicated parameters' gradients are added up by JAX where it knows that they are replicated."""
    value, (*rest, params) = gradient(function)(*args)
    return value[None], (*rest, params if check_vma else jax.lax.psum(params, "batch"))


def by_jit_of_batch(f):
    return gradient(f)


def by_grad_of_vmap(f):
    return gradient(lambda *args: jnp.sum(jax.vmap(f, in_axes=BATCHED)(*args)))


def by_vmap_of_grad(f):
    return jax.vmap(gradient(f), in_axes=BATCHED)


def by_shard_map(f, check_vma, outside):
    if outside:
        return gradient(lambda *args: jnp.sum(sharded(lambda *local: f(*local)[None], P("batch"), check_vma)(*args)))
    return sharded(partial(gradient_inside, f, check_vma), (P("batch"), SPECS[:4]), check_vma)


TRANSFORMS = {
    "batch": by_jit_of_batch,
    "grad_of_vmap": by_grad_of_vmap,
    "vmap_of_grad": by_vmap_of_grad,
    "shard_map": partial(by_shard_map, check_vma=True, outside=False),
    "shard_map_unchecked": partial(by_shard_map, check_vma=False, outside=False),
    "grad_of_shard_map": partial(by_shard_map, check_vma=True, outside=True),
}


def covering(names):
    """Every name with every adjoint, the solvers taken in turn: every pair of the three axes that there is at least once."""
    solvers = list(SOLVERS)
    return [
        (name, adjoint, solvers[(i + j) % (2 if adjoint in ("AB", "kept") else 3)])
        for i, name in enumerate(names)
        for j, adjoint in enumerate(ADJOINTS)
    ]


@pytest.mark.parametrize(("transform", "adjoint", "solver"), covering(TRANSFORMS))
def test_transforms_agree_with_a_loop_over_samples(transform, adjoint, solver):
    """Per-sample x_T, conditioning, guidance scale, label and key."""
    differentiated, rest = inputs()
    args = (*differentiated, *rest)
    program = quick(TRANSFORMS[transform](partial(loss, adjoint=adjoint, solver=solver)), *args)
    value, gradients = program(*args)
    values, stacked = reference(adjoint, solver)
    np.testing.assert_allclose(jnp.sum(value), jnp.sum(values), rtol=1e-12)
    close(gradients, stacked if transform == "vmap_of_grad" else summed(adjoint, solver))
    if transform == "shard_map":
        inside, outside = counting.all_reduces(program)
        assert inside == 0
        assert 1 <= outside <= len(jax.tree.leaves(differentiated[3]))


@pytest.mark.parametrize(("adjoint", "solver"), [row[1:] for row in covering(["pmap"])])
def test_pmap(adjoint, solver):
    differentiated, rest = inputs()
    args = tuple(leaf if axis is None else leaf[:, None] for leaf, axis in zip((*differentiated, *rest), BATCHED, strict=True))
    program = jax.pmap(partial(gradient_inside, partial(loss, adjoint=adjoint, solver=solver), False), axis_name="batch", in_axes=BATCHED)
    _, (x, cond, scale, params) = program(*args)
    close((x[:, 0], cond[:, 0], scale[:, 0], jax.tree.map(lambda leaf: leaf[-1], params)), summed(adjoint, solver))


@pytest.mark.parametrize(("adjoint", "solver"), [("direct", "DEIS3"), ("discrete", "RK_Heun"), ("PECE", "DPMSolverPP2")])
def test_eager(adjoint, solver):
    differentiated, rest = inputs()
    _, gradients = gradient(partial(loss, adjoint=adjoint, solver=solver))(*differentiated, *rest)
    close(gradients, summed(adjoint, solver))


def test_the_reference_tells_samples_scales_and_keys_apart():
    """The comparisons above compare something: every input matters, and matters differently to every sample."""
    _, (x, cond, scale, params) = reference("discrete", "DPMSolverPP2")
    for leaf in (x, cond, scale, *jax.tree.leaves(params)):
        assert jnp.all(jnp.any(leaf.reshape(BATCH, -1) != 0, axis=1))
    (start, c, s, p), (label, key) = inputs()
    value = jax.jit(partial(loss, adjoint="discrete", solver="DPMSolverPP2"))
    assert len({float(value(start[0], c[0], s[0], p, label[0], k)) for k in key}) > 1


@pytest.mark.parametrize(("adjoint", "solver"), [row[1:] for row in covering(["grid"]) if row[1] != "kept"])
def test_one_trace_for_all_values_and_grids(adjoint, solver):
    """x_T, conditioning, scale and grid are arguments: other values neither trace nor compile again, and give what a concrete grid gives."""

    def objective(x, cond, scale, grid, params, label, key):
        return loss(x, cond, scale, params, label, key, adjoint=adjoint, solver=solver, grid=grid)

    program = jax.jit(jax.grad(objective, argnums=(0, 1, 2)), compiler_options=QUICK)
    (x, cond, scale, params), rest = inputs()
    other = aj.grids.uniform(PROCESS, STEPS, t_start=0.6, t_end=0.1)
    before = len(TRACES)
    program(2 * x, cond + 1, 3 * scale, jnp.asarray(other), params, *rest)
    traced = len(TRACES)
    assert traced > before
    found = program(x, cond, scale, jnp.asarray(GRID), params, *rest)
    assert len(TRACES) == traced
    assert program._cache_size() == 1
    close(found, summed(adjoint, solver)[:3], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("adjoint", "solver"), [row[1:] for row in covering(["", "", "closed"])[10:]])
def test_a_network_may_close_over_what_is_differentiated(adjoint, solver):
    (x, cond, _, params), (label, key) = inputs()

    def passed(params, x):
        return run(network, x, {"params": params})

    def captured(params, x):
        return run(lambda x, t, args: network(x, t, {**args, "params": params}), x, {})

    def run(net, x, more):
        args = {"cond": cond, "label": label, "key": key, **more}
        return jnp.sum(jnp.sin(aj.sample(aj.DiffusionTerm(net, PROCESS), x, args, grid=GRID, solver=SOLVERS[solver], adjoint=ADJOINTS[adjoint])))

    found, expected = quick(lambda p, x: [jax.grad(f, argnums=(0, 1))(p, x) for f in (captured, passed)], params, x)(params, x)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(expected))
    close(found, expected)


@pytest.mark.parametrize(
    ("adjoint", "check_vma"), [("discrete", True), ("discrete", False), ("PECE", True), ("AB", True), ("direct", True), ("DPM", True)]
)
def test_a_network_may_close_over_parameters_in_shard_map(adjoint, check_vma):
    differentiated, rest = inputs()

    def captured(x, cond, scale, params, label, key):
        net = aj.cfg(lambda x, t, args: network(x, t, {**args, "params": params}), scale)
        args = {"cond": cond, "uncond": jnp.zeros_like(cond), "label": label, "key": key}
        sample = aj.sample(aj.DiffusionTerm(net, PROCESS), x, args, grid=GRID, solver=SOLVERS["DEIS3"], adjoint=ADJOINTS[adjoint])
        return jnp.sum(jnp.sin(sample))

    args = (*differentiated, *rest)
    _, gradients = quick(by_shard_map(captured, check_vma, outside=False), *args)(*args)
    close(gradients, summed(adjoint, "DEIS3"))


@pytest.mark.parametrize(("adjoint", "solver"), [("discrete", "DPMSolverPP2"), ("PECE", "RK_Heun")])
def test_jit_of_a_sharded_batch(adjoint, solver):
    """The recommended way: place the batch on the devices and let jit partition."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    differentiated, rest = inputs()
    args = tuple(jax.device_put(leaf, jax.NamedSharding(mesh, spec)) for leaf, spec in zip((*differentiated, *rest), SPECS, strict=True))
    _, gradients = quick(gradient(partial(loss, adjoint=adjoint, solver=solver)), *args)(*args)
    assert len(gradients[0].sharding.device_set) == 4
    close(gradients, summed(adjoint, solver))


def plain(adjoint, solver, x, args, *, term=None, grid=GRID, save=False):
    """A sample without guidance."""
    term = aj.DiffusionTerm(network, PROCESS) if term is None else term
    return aj.sample(term, x, args, grid=grid, solver=SOLVERS[solver], adjoint=ADJOINTS[adjoint], save=save)


def one_sample(**more):
    (x, cond, _, params), (label, key) = inputs()
    return x[0], {"params": params, "cond": cond[0], "label": label[0], "key": key[0], **more}


def exactness(function, *args):
    """The gradients of function(adjoint name, *args) by plain autodiff and by the exact adjoint, in one program."""
    wanted = tuple(range(len(args)))
    return quick(lambda *a: [jax.grad(partial(function, name), argnums=wanted)(*a) for name in ("discrete", "direct")], *args)(*args)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_in_per_step_leaves(solver):
    x, args = one_sample()
    v = jax.random.normal(jax.random.key(5), (STEPS, COND))

    def objective(adjoint, v, x, params):
        return jnp.sum(jnp.sin(plain(adjoint, solver, x, {**args, "params": params, "cond": aj.PerStep(v)})))

    found, expected = exactness(objective, v, x, args["params"])
    assert jnp.all(jnp.any(expected[0] != 0, axis=1))
    close(found, expected)


@pytest.mark.parametrize("adjoint", ["direct", "discrete", "PECE"])
def test_every_evaluation_of_an_interval_sees_its_own_leaf(adjoint):
    """A one-step method with per-step leaves is the composition of samples of one step each."""
    x, args = one_sample()
    v = jax.random.normal(jax.random.key(5), (STEPS, COND))

    def composed(x):
        for i in range(STEPS):
            x = plain("direct", "RK_Heun", x, {**args, "cond": v[i]}, grid=GRID[i : i + 2])
        return x

    found, expected = quick(lambda x: (plain(adjoint, "RK_Heun", x, {**args, "cond": aj.PerStep(v)}), composed(x)), x)(x)
    close(found, expected)


@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_a_continuous_adjoint_refuses_the_grid(adjoint):
    x, args = one_sample()
    with pytest.raises(ValueError, match=r"gives no gradient in the grid.*: use DiscreteAdjoint"):
        jax.eval_shape(jax.grad(lambda grid: jnp.sum(plain(adjoint, "DEIS3", x, args, grid=grid))), jnp.asarray(GRID))


@pytest.mark.parametrize("adjoint", ["discrete", "PECE", "AB"])
def test_equal_per_step_leaves_give_what_a_constant_gives(adjoint):
    x, args = one_sample()
    per_step = aj.PerStep(jnp.broadcast_to(args["cond"], (STEPS, COND)))
    both = quick(
        lambda x: [jax.grad(lambda x, c=c: jnp.sum(plain(adjoint, "DEIS3", x, {**args, "cond": c})))(x) for c in (per_step, args["cond"])], x
    )
    close(*both(x))


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_in_grid_and_process(solver):
    x, args = one_sample()

    def objective(adjoint, grid, beta_max, x):
        term = aj.DiffusionTerm(network, aj.VPLinear(beta_max=beta_max))
        return jnp.sum(jnp.sin(plain(adjoint, solver, x, args, term=term, grid=grid)))

    values = (jnp.asarray(GRID), jnp.asarray(20.0), x)
    found, expected = exactness(objective, *values)
    assert jnp.all(expected[0] != 0)
    assert expected[1] != 0
    close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_of_a_loss_on_all_states(solver):
    x, args = one_sample()
    weight = jax.random.normal(jax.random.key(3), (STEPS + 1, WIDTH))

    def objective(adjoint, x, params, cond):
        trajectory = plain(adjoint, solver, x, {**args, "params": params, "cond": cond}, save=True)
        return jnp.sum(weight * jnp.sin(trajectory.xs))

    found, expected = exactness(objective, x, args["params"], args["cond"])
    close(found, expected)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_trajectories_under_every_adjoint(adjoint):
    x, args = one_sample()
    trajectory = plain(adjoint, "DEIS3", x, args, save=True)
    assert trajectory.xs.shape == (STEPS + 1, WIDTH)
    np.testing.assert_array_equal(trajectory.xs[0], x)
    np.testing.assert_allclose(trajectory.xs[-1], plain("direct", "DEIS3", x, args), rtol=1e-13)
    if adjoint in CONTINUOUS:
        with pytest.raises(ValueError, match="final state only: use DiscreteAdjoint"):
            jax.eval_shape(jax.grad(lambda x: jnp.sum(plain(adjoint, "DEIS3", x, args, save=True).xs)), x)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def half(x, t, args):
    """A network that computes and answers in bfloat16."""
    return network(x.astype(jnp.bfloat16), t, args)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_bfloat16_network_under_a_float32_state(adjoint):
    x, args = one_sample()
    term, args16 = aj.DiffusionTerm(half, PROCESS), cast(args, jnp.bfloat16)

    def objective(x, params, term, args):
        return jnp.sum(jnp.sin(plain(adjoint, "DEIS3", x, {**args, "params": params}, term=term)))

    grad = jax.grad(objective, argnums=(0, 1))
    x16 = x.astype(jnp.bfloat16)
    program = quick(lambda x, p: (plain(adjoint, "DEIS3", x, {**args16, "params": p}, term=term), grad(x, p, term, args16)), x16, args16["params"])
    value, found = program(x16, args16["params"])
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    single = cast(args16, jnp.float32)
    expected = quick(partial(grad, term=None, args=single), x16.astype(jnp.float32), single["params"])(x16.astype(jnp.float32), single["params"])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one.astype(jnp.float32) - other) <= 0.03 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("given", "state"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)]
)
def test_dtype_of_the_state(given, state):
    x, args = one_sample()
    xs = plain("discrete", "DEIS3", x.astype(given), cast(args, state), save=True).xs
    assert xs.dtype == state
    np.testing.assert_array_equal(xs[0], x.astype(given).astype(state))
    grad = jax.grad(lambda x: jnp.sum(plain("discrete", "DEIS3", x, cast(args, state))))(x.astype(given))
    assert grad.dtype == given


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_integers_and_keys_get_no_gradient(adjoint):
    x, args = one_sample()
    floats = eqx.filter_grad(lambda args: jnp.sum(jnp.sin(plain(adjoint, "DEIS3", x, args))))(args)
    assert floats["label"] is None
    assert floats["key"] is None
    assert jnp.any(floats["cond"] != 0)
    allowed = jax.grad(lambda args: jnp.sum(jnp.sin(plain(adjoint, "DEIS3", x, args))), allow_int=True)({name: args[name] for name in args})
    assert allowed["label"].dtype == jax.dtypes.float0
    close(allowed["cond"], floats["cond"])


def solve(adjoint, solver, x, args, **more):
    term = aj.DiffusionTerm(network, PROCESS)
    controller = {"stepsize_controller": diffrax.StepTo(jnp.asarray(GRID)), "dt0": None, **more}
    return diffrax.diffeqsolve(term, solver, GRID[0], GRID[-1], y0=x, args=args, adjoint=adjoint, **controller).ys[-1]


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [*(row[1:] for row in covering(["", "", "diffeqsolve"])[10:] if row[1] != "kept"), *(("checkpoint", solver) for solver in SOLVERS)],
)
def test_the_same_objects_in_diffeqsolve(adjoint, solver):
    x, args = one_sample()
    chosen = ADJOINTS.get(adjoint, diffrax.RecursiveCheckpointAdjoint())
    mine = ADJOINTS.get(adjoint, aj.DiscreteAdjoint())

    def here(x, params):
        y = aj.sample(aj.DiffusionTerm(network, PROCESS), x, {**args, "params": params}, grid=GRID, solver=SOLVERS[solver], adjoint=mine)
        return jnp.sum(jnp.sin(y)), y

    def there(x, params):
        y = solve(chosen, SOLVERS[solver], x, {**args, "params": params})
        return jnp.sum(jnp.sin(y)), y

    program = quick(lambda *a: [jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(*a) for f in (here, there)], x, args["params"])
    expected, found = program(x, args["params"])
    close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", [name for name in ADJOINTS if name != "direct"])
def test_diffeqsolve_refuses_what_our_adjoints_do_not_do(adjoint):
    x, args = one_sample()
    unsupported = [
        {"saveat": diffrax.SaveAt(ts=jnp.asarray(GRID))},
        {"saveat": diffrax.SaveAt(steps=True)},
        {"saveat": diffrax.SaveAt(t1=True, dense=True)},
        {"event": diffrax.Event(lambda t, y, args, **_: jnp.sum(y) > 100)},
        {"stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-3), "dt0": -0.01},
        {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": -0.01},
    ]
    for more in unsupported:
        with pytest.raises(ValueError, match=r"needs stepsize_controller=diffrax.StepTo\(ts\).*use an adjoint of diffrax"):
            solve(ADJOINTS[adjoint], aj.ExponentialRK(diffrax.Tsit5()), x, args, **more)
    with pytest.raises(ValueError, match=r"wrap Heun as aj.ExponentialRK"):
        solve(ADJOINTS[adjoint], diffrax.Heun(), x, args)


def test_adaptive_steps_with_diffrax_own_adjoint():
    """ExponentialRK(Tsit5) under PIDController: value and gradient converge to those of a fine fixed grid."""
    x, args = one_sample()
    solver, fine = aj.ExponentialRK(diffrax.Tsit5()), aj.grids.log_snr(PROCESS, 64, t_start=0.5, t_end=0.2)
    more = {"stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-9), "dt0": -0.01}

    def adaptive(x):
        return jnp.sum(jnp.sin(solve(diffrax.RecursiveCheckpointAdjoint(), solver, x, args, **more)))

    def fixed(x):
        return jnp.sum(jnp.sin(aj.sample(aj.DiffusionTerm(network, PROCESS), x, args, grid=fine, solver=solver)))

    found, expected = (quick(jax.value_and_grad(f), x)(x) for f in (adaptive, fixed))
    close(found, expected, rtol=1e-7, atol=1e-8)
