"""ReversibleAdjoint: equal to DiscreteAdjoint in every input, flat in memory, at its cost; the drift is measured, and bounded where asked."""

import warnings
from functools import partial

import counting
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import Mixture, gaussian, relative
from test_memory_and_work import BACKWARD, FORWARD, HIDDEN, INNER, PARAMS, QUICK, ROWS, STATE, WIDTH, compiled
from test_reversible import SOLVERS, STOCHASTIC

import adjoint_jax as aj

A, S = aj.adjoints, aj.solvers
PROCESS = aj.VPLinear()
TERM = Mixture(PROCESS).term()
X, ARGS, IMAGE = Mixture.inputs()
N = 5
TS = aj.grids.log_snr(PROCESS, N)
WEIGHTS = jnp.cos(jnp.arange(X.size * (N + 1.0))).reshape(N + 1, *X.shape)
KEY = jax.random.key(3)
MILD = np.linspace(0.6, 0.3, N + 1)  # the stochastic Rex loses no digits here


def close(found, exact, tolerance=1e-9):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert relative(one, two) < tolerance


def quick(function, *args):
    """`function` compiled without expensive passes, at once."""
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)


def everything(solver, adjoint, run=aj.sample, traced=True):
    """Gradients in both states, args with a per-step leaf, and the grid where it is traced, of a loss on all pairs."""

    def loss(x, aux, args, ts=TS):
        path = run(TERM, aj.Paired(x, aux), args, grid=ts, solver=solver, adjoint=adjoint, save=True).xs
        return jnp.sum(path.x * WEIGHTS) + jnp.sum(path.aux**2 * WEIGHTS[::-1])

    args = {**ARGS, "cond": aj.PerStep(ARGS["cond"][None] * jnp.linspace(0.5, 1.5, N)[:, None, None])}
    inputs = (X, 0.9 * X + 0.1 * IMAGE, args, *[jnp.asarray(TS)] * traced)
    return quick(jax.grad(loss, tuple(range(len(inputs)))), *inputs)


def plain(solver, adjoint, x=X, args=ARGS, ts=TS, **more):
    """Gradients in x_T and args of a loss on the sample, on a concrete grid."""

    def loss(x, args):
        return jnp.sum(jnp.sin(aj.sample(TERM, x, args, grid=ts, solver=solver, adjoint=adjoint, **more)))

    return quick(jax.grad(loss, (0, 1)), x, args)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_the_discrete_adjoint(name):
    """To 1e-9 in float64: for pairs and trajectories in 2 segments, in one of the directions."""
    solver = SOLVERS[name]
    run = aj.invert if name in ("BELM", "EDICT", "Rex") else aj.sample
    traced = name in ("BDIA", "BDIA(Heun)", "BELM(0.7)", "EDICT", "Rex")
    close(*(everything(solver, adjoint, run, traced) for adjoint in (aj.ReversibleAdjoint(2), aj.DiscreteAdjoint())))


@pytest.mark.parametrize("name", ["BDIA", "BELM", "EDICT", "Rex(Heun, channels)"])
def test_any_number_of_segments(name):
    """For states alone: one, some that do not divide the steps, one a step, more than there are steps."""
    exact = plain(SOLVERS[name], aj.DiscreteAdjoint())
    for segments in (1, 3, 5, 9):
        close(plain(SOLVERS[name], aj.ReversibleAdjoint(segments)), exact)


def test_the_noise_of_a_segment_is_drawn_again():
    """Rex with tau, by key; two draws a step by noise, which is differentiated."""
    solver = STOCHASTIC["Euler"]
    close(*(plain(solver, adjoint, ts=MILD, key=KEY) for adjoint in (aj.ReversibleAdjoint(2), aj.DiscreteAdjoint())))
    solver = STOCHASTIC["Midpoint"]

    def of_noise(adjoint):
        loss = lambda noise: jnp.sum(jnp.sin(aj.sample(TERM, X, ARGS, grid=MILD, solver=solver, adjoint=adjoint, noise=noise)))  # noqa: E731
        return quick(jax.grad(loss), jax.random.normal(KEY, (N, 2, *X.shape)))

    assert relative(of_noise(aj.ReversibleAdjoint(2)), of_noise(aj.DiscreteAdjoint())) < 1e-9


def test_clean_data_and_pure_noise():
    """alpha = 0 at the start and sigma = 0 at the end, where stages are skipped."""
    term, ts = gaussian(aj.FlowMatching(), "v", 0.6), np.linspace(1.0, 0.0, 6)
    for solver in (aj.BDIA(1.0, aj.ExponentialRK(diffrax.Heun(), 0.6)), aj.Rex(diffrax.Heun(), sigma_data=0.6)):
        of_x = lambda x, adjoint: jnp.sum(jnp.sin(aj.sample(term, x, grid=ts, solver=solver, adjoint=adjoint)))  # noqa: B023, E731
        found, exact = (quick(jax.grad(partial(of_x, adjoint=adjoint)), X) for adjoint in (aj.ReversibleAdjoint(2), aj.DiscreteAdjoint()))
        assert relative(found, exact) < 1e-9


FOUR = {"BDIA": aj.BDIA(), "BELM": S.BELM(), "EDICT": S.EDICT(), "Rex": aj.Rex(diffrax.Heun())}


@pytest.mark.parametrize("name", FOUR)
def test_memory_is_flat(name):
    """From 16 to 256 steps in 2 segments; a segment costs one pair."""

    def temporary(steps, segments):
        program = compiled(steps, FOUR[name], aj.ReversibleAdjoint(segments), "both", STATE, HIDDEN)
        return program.memory_analysis().temp_size_in_bytes / (ROWS * STATE * 4)

    few = temporary(16, 2)
    assert (temporary(256, 2) - few) / 240 <= 0.02  # the tables of weights
    assert 1.9 <= (temporary(16, 14) - few) / 12 <= 2.1


@pytest.mark.parametrize("name", FOUR)
def test_work_is_that_of_the_discrete_adjoint(name):
    """N forward, then N (forward + backward): one linearisation serves the inverse and the transpose."""
    evaluations = {"BDIA": 1, "BELM": 1, "EDICT": 2, "Rex": 4}[name]
    for wrt, parameters in (("x", 0), ("both", PARAMS)):
        work = counting.matmul_flops(compiled(8, FOUR[name], aj.ReversibleAdjoint(2), wrt, WIDTH, INNER))
        assert work == 8 * evaluations * (FORWARD + FORWARD + BACKWARD + parameters)


def test_drift_of_a_segment():
    """Rounding in float64; none in one step; what `invert` shows of the whole."""
    drift = partial(A.drift, TERM, X, ARGS, grid=TS, solver=S.EDICT(leapfrog=False))
    whole, parts = drift(), drift(segments=N)
    assert whole.shape == (1,)
    assert parts.shape == (N,)
    assert float(parts.max()) < 1e-10 < 1e-9 > float(whole[0]) > float(parts.max()) / 10
    pair = aj.sample(TERM, aj.Paired(X), ARGS, grid=TS, solver=S.EDICT(leapfrog=False))
    back = aj.invert(TERM, pair, ARGS, grid=TS, solver=S.EDICT(leapfrog=False)).x
    assert 0.1 < float(jnp.abs(back - X).max() / jnp.abs(X).max() / whole[0]) < 10


def test_segments_hold_the_drift_in_float32():
    """BDIA at g = 0.5 on 50 steps: useless in one segment, exact to 1e-5 in as many as are needed."""
    x, args = X.astype(jnp.float32), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ARGS)
    solver, ts = aj.BDIA(0.5), aj.grids.log_snr(PROCESS, 50)
    drifts = [float(A.drift(TERM, x, args, grid=ts, solver=solver, segments=k).max()) for k in (1, 4, 16)]
    assert drifts[0] > 1
    assert 1e-2 > drifts[1] > 1e-5 > drifts[2]
    needed = A.segments_needed(TERM, x, args, grid=ts, solver=solver, tol=1e-4)
    assert needed == 8
    exact = plain(solver, aj.DiscreteAdjoint(), x, args, ts)
    close(plain(solver, aj.ReversibleAdjoint(needed, tol=1e-4), x, args, ts), exact, 1e-5)
    assert relative(plain(solver, aj.ReversibleAdjoint(1), x, args, ts)[0], exact[0]) > 1e-3
    with pytest.raises(ValueError, match=r"Every step alone drifts by more than tol=1e-12: use DiscreteAdjoint"):
        A.segments_needed(TERM, x, args, grid=TS, solver=S.EDICT(), tol=1e-12)


STRICT, KEPT = aj.ReversibleAdjoint(tol=1e-30), aj.ReversibleAdjoint(2, tol=1e-6)


def of_batch(adjoint, x, params):
    """A loss on one or more samples, with parameters that all share."""
    args = {"params": params, "cond": jnp.zeros_like(x)}
    return jnp.sum(jnp.sin(aj.sample(TERM, x, args, grid=TS, solver=S.EDICT(), adjoint=adjoint)))


def transformed(adjoint):
    """Gradients in x and the shared parameters under each transformation, on four devices."""
    x, params = X[:4, None], ARGS["params"]
    one = jax.grad(partial(of_batch, adjoint), (0, 1))
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = partial(jax.shard_map, mesh=mesh, in_specs=(P("batch"), P()))
    summed = lambda x, params: (one(x, params)[0], jax.lax.psum(one(x, params)[1], "batch"))  # noqa: E731
    yield "jit", lambda: jax.jit(one)(x[:, 0], params)
    yield "vmap", lambda: jax.jit(jax.vmap(one, (0, None)))(x, params)
    yield "grad of vmap", lambda: jax.jit(jax.grad(lambda x, p: jnp.sum(jax.vmap(partial(of_batch, adjoint), (0, None))(x, p)), (0, 1)))(x, params)
    yield "pmap", lambda: jax.pmap(one, in_axes=(0, None))(x, params)
    yield "shard_map", lambda: jax.jit(split(summed, out_specs=(P("batch"), P()), check_vma=False))(x[:, 0], params)
    yield "shard_map, vma", lambda: jax.jit(split(one, out_specs=(P("batch"), P()), check_vma=True))(x[:, 0], params)


def finished(run):
    """The answer, after all callbacks."""
    answer = jax.block_until_ready(run())
    jax.effects_barrier()
    return answer


@pytest.mark.parametrize("name", [name for name, _ in transformed(KEPT)])
def test_under_transformations(name):
    """The discrete adjoint's gradient within tol; NaN in every input and a warning beyond it."""
    found, exact = (dict(transformed(adjoint))[name]() for adjoint in (KEPT, aj.DiscreteAdjoint()))
    close(found, exact)
    with pytest.warns(UserWarning, match=r"undoing 1 segment\(s\) drifts by .*use more segments, ReversibleAdjoint\(segments=2\)"):
        lost = finished(dict(transformed(STRICT))[name])
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(lost))


def test_second_derivatives():
    """A Hessian-vector product by jvp of grad and by grad of grad."""
    v = IMAGE / 3

    def products(adjoint):
        of_x = lambda x: jnp.sum(jnp.sin(aj.sample(TERM, x, ARGS, grid=TS, solver=aj.BDIA(), adjoint=adjoint)))  # noqa: E731
        return jax.jvp(jax.grad(of_x), (X,), (v,))[1], jax.grad(lambda x: jnp.vdot(jax.grad(of_x)(x), v))(X)

    forward, backward = products(aj.ReversibleAdjoint(2))
    exact, _ = products(aj.DirectAdjoint())
    assert relative(forward, exact) < 1e-9
    assert relative(backward, exact) < 1e-9


def test_quiet_within_tol():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished(lambda: plain(aj.BDIA(), KEPT))
