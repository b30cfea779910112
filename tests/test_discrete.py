"""The exact adjoint's options change what is stored and recomputed, never the gradient; what watches it: norms, limits, the first NaN."""

from functools import partial

import counting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj

BATCH, WIDTH, HIDDEN, STEPS = 2, 3, 4, 7
PROCESS = aj.VPLinear()
GRID = aj.grids.log_snr(PROCESS, STEPS, t_start=0.6, t_end=0.1)
Discrete = aj.DiscreteAdjoint
OPTIONS = {
    "keep 3": Discrete(keep=3),
    "all": Discrete(keep="all"),
    "more than there are": Discrete(keep=99),
    "blocks": Discrete(remat="block"),
    "blocks of all": Discrete(keep="all", remat="block"),
    "full": Discrete(remat="full"),
    "host": Discrete(keep=2, states="host"),
    "two levels": Discrete(states="multilevel"),
    "three levels": Discrete(keep=1, states="multilevel", levels=3, remat="block"),
    "no limit": Discrete(keep=2, clip=1e9),
}
SOLVERS = {
    "multistep": aj.DPMSolverPP(3),
    "predictor-corrector": aj.UniPC(2),
    "Runge-Kutta": aj.EDMHeun(),
    "SDE": aj.SDEDPMSolverPP(2),
    "PNDM": aj.solvers.PNDM(4, "heun"),
    "pair": aj.Rex(),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@jax.jit
def dense(x, w):
    return jnp.tanh(x @ w)


def network(x, t, args):
    return dense(dense(x, args["in"]) + args["cond"], args["out"]) + 0.1 * x


TERM = aj.DiffusionTerm(network, PROCESS)


def inputs():
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = ((BATCH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (STEPS, BATCH, HIDDEN))
    x, w_in, w_out, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x, {"in": w_in, "out": w_out, "cond": aj.PerStep(v)}


X, ARGS = inputs()


def sample(x, args, adjoint, solver="multistep", grid=GRID, **more):
    chosen = SOLVERS[solver]
    return aj.sample(TERM, x, args, grid=grid, solver=chosen, adjoint=adjoint, key=jax.random.key(5) if chosen.draws else None, **more)


def relative(found, exact):
    return max(
        float(jnp.linalg.norm(jnp.ravel(f - e)) / jnp.linalg.norm(jnp.ravel(e)))
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    )


def quick(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)


@pytest.mark.parametrize(("solver", "options"), [(s, list(OPTIONS)[i % 2 :: 2]) for i, s in enumerate(SOLVERS)], ids=list(SOLVERS))
def test_every_option_gives_the_gradient_of_autodiff(solver, options):
    """In x_T, parameters and per-step leaves, of a loss on all states."""

    def loss(x, args, adjoint):
        return jnp.sum(jnp.sin(sample(x, args, adjoint, solver, save=True).xs))

    names = [None, *options]
    found = quick(lambda x, a: [jax.grad(loss, (0, 1))(x, a, OPTIONS[name] if name else aj.DirectAdjoint()) for name in names], X, ARGS)
    assert all(relative(one, found[0]) < 1e-12 for one in found[1:])


@pytest.mark.parametrize("names", [("keep 3", "two levels"), ("all", "host")])
def test_options_and_a_gradient_in_the_grid(names):
    loss = lambda g, adjoint: jnp.sum(jnp.sin(sample(X, ARGS, adjoint, "multistep", g)))  # noqa: E731
    found = quick(lambda g: [jax.grad(loss)(g, adjoint) for adjoint in (aj.DirectAdjoint(), *map(OPTIONS.get, names))], jnp.asarray(GRID))
    assert all(relative(one, found[0]) < 1e-11 for one in found[1:])


@pytest.mark.parametrize("name", ["all", "blocks", "host", "three levels"])
def test_options_under_vmap_and_shard_map(name):
    """Per-sample inputs on four devices."""
    x = jax.random.normal(jax.random.key(2), (4, BATCH, WIDTH))

    def gradient(x, adjoint):
        return jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(sample(x, ARGS, adjoint)))))(x)

    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    sharded = jax.shard_map(partial(gradient, adjoint=OPTIONS[name]), mesh=mesh, in_specs=spec, out_specs=spec) if name != "host" else None
    found = quick(lambda x: (gradient(x, OPTIONS[name]), sharded(x) if sharded else None, gradient(x, Discrete())), x)
    assert relative(found[0], found[2]) < 1e-12
    assert sharded is None or relative(found[1], found[2]) < 1e-12


@pytest.mark.parametrize(("name", "cost"), [("keep 0", 3), ("all", 2), ("half", 2.5), ("two levels", 4), ("three levels", 5)])
def test_work(name, cost):
    """N F + N B and F for each recomputed step and each further level; a backward evaluation in x takes as many products as a forward one."""
    adjoint = {"keep 0": Discrete(), "half": Discrete(keep=8), **OPTIONS}[name]
    adjoint = Discrete(states="multilevel", levels=3) if name == "three levels" else adjoint
    grid = aj.grids.log_snr(PROCESS, 16, t_start=0.6, t_end=0.1)
    args = {**ARGS, "cond": ARGS["cond"].value[0]}
    program = jax.jit(jax.grad(lambda x: jnp.sum(sample(x, args, adjoint, grid=grid)))).lower(X).compile(compiler_options=QUICK)
    assert counting.matmul_flops(program) <= 1.01 * 16 * cost * 4 * BATCH * WIDTH * HIDDEN


LAYERS, WIDE = 8, 1024


def temporary(adjoint, steps):
    """Bytes of temporaries of a network of eight layers, in states."""

    def deep(x, t, args):
        for i in range(LAYERS):
            x = jnp.sin(x * args[i])
        return x

    term, grid = aj.DiffusionTerm(deep, PROCESS), aj.grids.log_snr(PROCESS, steps, t_start=0.6, t_end=0.1)
    program = jax.jit(jax.grad(lambda x, a: jnp.sum(aj.sample(term, x, a, grid=grid, adjoint=adjoint))))
    shapes = jax.ShapeDtypeStruct((BATCH, WIDE), jnp.float32), jax.ShapeDtypeStruct((LAYERS,), jnp.float32)
    return program.lower(*shapes).compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes / (4 * BATCH * WIDE)


def test_memory():
    """A linearisation for each kept step, one state for the others; blocks of a linearisation; 2 sqrt(N) carries (x and one past output)."""
    few, many = (temporary(Discrete(), n) for n in (16, 64))
    assert 0.95 <= (many - few) / 48 <= 1.05
    kept = temporary(Discrete(keep=8), 64), temporary(Discrete(keep=16), 64)
    linearisation = (kept[1] - kept[0]) / 8 + 1
    assert LAYERS <= linearisation <= LAYERS + 1
    assert temporary(Discrete(keep="all"), 64) <= 64 * linearisation + few
    assert temporary(Discrete(keep="all", remat="block"), 64) <= 0.7 * temporary(Discrete(keep="all"), 64)
    assert temporary(Discrete(states="multilevel"), 256) - (few - 16) <= 16 * 3 + 4
    assert temporary(Discrete(states="multilevel", levels=4), 256) - (few - 16) <= 4 * 2 * 4 + 4


def test_norms_of_the_adjoint():
    """|dL/dx_i| of the rest of the sampler, by a multistep method's first order."""
    args = {**ARGS, "cond": ARGS["cond"].value[0]}
    one_step = lambda x, grid, adjoint: aj.sample(TERM, x, args, grid=grid, solver=aj.DDIM(), adjoint=adjoint)  # noqa: E731
    for adjoint in (Discrete(), Discrete(keep=3, remat="block"), Discrete(states="multilevel")):
        norms = aj.adjoints.adjoint_norms(lambda adjoint: jnp.sum(jnp.sin(one_step(X, GRID, adjoint))), STEPS, adjoint)
        for i in (0, 4, STEPS):
            x = one_step(X, GRID[: i + 1], None) if i else X
            rest = lambda x, i=i: one_step(x, GRID[i:], aj.DirectAdjoint()) if i < STEPS else x  # noqa: E731
            expected = jnp.linalg.norm(jax.grad(lambda x, rest=rest: jnp.sum(jnp.sin(rest(x))))(x))
            np.testing.assert_allclose(norms[i], expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"probe is zeros of shape \(8,\) for 7 steps; got \(7,\)"):
        aj.adjoints.adjoint_norms(lambda adjoint: jnp.sum(sample(X, ARGS, adjoint)), STEPS - 1)


@pytest.mark.parametrize("keep", [0, 3, "all"])
def test_clipping_limits_every_entry_at_every_step(keep):
    adjoint = Discrete(keep=keep, clip=0.5)
    loss = lambda x, adjoint: jnp.vdot(jnp.array([[9.0], [1e-3]]), jnp.sum(sample(x, ARGS, adjoint), axis=1, keepdims=True))  # noqa: E731
    norms = aj.adjoints.adjoint_norms(lambda adjoint: loss(X, adjoint), STEPS, adjoint)
    clipped, exact = jax.grad(loss)(X, adjoint), jax.grad(loss)(X, Discrete())
    assert norms[-1] > 9
    assert jnp.all(jnp.linalg.norm(clipped, axis=1) <= 0.5 * (1 + 1e-12))
    np.testing.assert_allclose(clipped[1], exact[1], rtol=1e-12)
    assert relative(clipped, jax.grad(loss)(X, Discrete(clip=0.5))) < 1e-12


def broken(x, t, args):
    """Finite everywhere; its derivative in x is not where 0.2 < t < 0.3, and that in args["w"] not where t > 0.5."""
    zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
    of_x = jnp.sqrt(jnp.where((t > 0.2) & (t < 0.3), zero * jnp.sum(x), one))
    of_w = jnp.sqrt(jnp.where(t > 0.5, zero * args["w"], one))
    return 0.1 * x + of_x + of_w


def test_a_nan_in_the_backward_pass_names_its_step_and_input():
    term = aj.DiffusionTerm(broken, PROCESS)
    loss = lambda args, x, adjoint: jnp.sum(aj.sample(term, x, args, grid=GRID, adjoint=adjoint))  # noqa: E731
    args = {"w": jnp.ones(())}
    last = int(np.flatnonzero((GRID[:-1] > 0.2) & (GRID[:-1] < 0.3))[-1])
    for keep in (0, 2):
        with pytest.raises(FloatingPointError, match=rf"gradient in x.* is not finite at step {last} of 7 \(t = "):
            jax.grad(loss, 1)(args, X, Discrete(keep=keep))
    assert np.isnan(jax.jit(jax.grad(loss, 1), static_argnums=2)(args, X, Discrete())).any()
    found = aj.adjoints.find_nonfinite(lambda adjoint: loss(args, X, adjoint))
    assert f"not finite at step {last} of 7" in found
    of_w = aj.adjoints.find_nonfinite(lambda adjoint: jnp.sum(aj.sample(term, X, args, grid=GRID[:3], adjoint=adjoint)))
    assert "The gradient in args['w'] is not finite at step 1 of 2" in of_w
    assert aj.adjoints.find_nonfinite(lambda adjoint: jnp.sum(sample(X, ARGS, adjoint, "SDE"))) is None
    bad_loss = aj.adjoints.find_nonfinite(lambda adjoint: jnp.sum(jnp.sqrt(0 * sample(X, ARGS, adjoint))))
    assert "check the loss" in bad_loss
    with pytest.raises(ValueError, match="call it outside of jit"):
        aj.adjoints.find_nonfinite(lambda adjoint: jax.jit(lambda x: jnp.sum(sample(x, ARGS, adjoint)))(X))


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["keep 0", "keep 3", "all"])
def test_half_precision_parameters_are_accumulated_in_float32(half, name):
    """A thousand shares of 1/1024 each, which a running sum in half precision loses above 1/4; the state and its adjoint are float32."""
    steps = 1000
    grid = np.linspace(0.9, 0.4, steps + 1)

    def flat(x, t, args):
        return jnp.broadcast_to(args.astype(jnp.float32), x.shape)

    term, adjoint = aj.DiffusionTerm(flat, aj.FlowMatching(), "flow"), {"keep 0": Discrete(), **OPTIONS}[name]
    loss = lambda x, w: jnp.sum(aj.sample(term, x, w, grid=grid, solver=aj.DDIM(), adjoint=adjoint))  # noqa: E731
    of_x, of_w = jax.jit(jax.grad(loss, (0, 1)))(jnp.ones((1,), jnp.float32), jnp.asarray(0.5, half))
    assert (of_x.dtype, of_w.dtype) == (jnp.float32, half)
    np.testing.assert_allclose(np.float64(of_w), -0.5, rtol=float(jnp.finfo(half).eps))


@pytest.mark.parametrize("name", ["keep 0", "keep 3", "all", "blocks", "two levels"])
def test_hessian_vector_products(name):
    """jvp(grad) and grad(grad) are those of autodiff, in x_T and the parameters."""
    adjoint = {"keep 0": Discrete(), **OPTIONS}[name]
    args = {**ARGS, "cond": ARGS["cond"].value[0]}
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), (X, args))

    def products(adjoint, *inputs):
        gradient = jax.grad(lambda *inputs: jnp.sum(jnp.sin(sample(*inputs, adjoint))), (0, 1))
        dot = lambda *inputs: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient(*inputs), v)))  # noqa: E731
        return jax.jvp(gradient, inputs, v)[1], jax.grad(dot, (0, 1))(*inputs)

    found, expected = quick(lambda *inputs: [products(a, *inputs) for a in (adjoint, aj.DirectAdjoint())], X, args)
    assert relative(found, expected) < 1e-11


@pytest.mark.parametrize("adjoint", [Discrete(), Discrete(keep="all"), aj.AdjointDEIS()], ids=["discrete", "all", "deis"])
def test_forward_mode_names_the_adjoint_that_has_it(adjoint):
    args = {**ARGS, "cond": ARGS["cond"].value[0]}
    value = lambda x: jnp.sum(sample(x, args, adjoint))  # noqa: E731
    for derivative in (lambda: jax.jvp(value, (X,), (X,)), lambda: jax.jacfwd(value)(X)):
        with pytest.raises(TypeError, match=r"has no forward mode.*use adjoint=aj.DirectAdjoint\(\)"):
            derivative()
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's own words
        jax.jvp(jax.jit(value), (X,), (X,))
    assert jnp.isfinite(jax.jvp(lambda x: jnp.sum(sample(x, args, aj.DirectAdjoint())), (X,), (X,))[1])
