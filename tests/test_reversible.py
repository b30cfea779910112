"""Exactly invertible samplers: round trips to rounding error in both directions, exact gradients through pairs, and the encoder of noises."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, Mixture, gaussian, relative, span
from test_sde import coarser

import adjoint_jax as aj

S = aj.solvers
PROCESS = aj.VPLinear()
X, ARGS, IMAGE = Mixture.inputs()
TERM = Mixture(PROCESS).term()
N = 50
TS = aj.grids.log_snr(PROCESS, N)
SOLVERS = {
    "BDIA": aj.BDIA(),
    "BDIA(Heun)": aj.BDIA(1.0, diffrax.Heun()),
    "BELM": S.BELM(),
    "BELM(0.7)": S.BELM(0.7),
    "EDICT": S.EDICT(),
    "EDICT, no leapfrog": S.EDICT(leapfrog=False),
    "EDICT(0.7)": S.EDICT(sigma_data=0.7),
    "Rex": aj.Rex(),
    "Rex(Heun, noise)": aj.Rex(diffrax.Heun(), sigma_data=np.inf),
    "Rex(Heun, channels)": aj.Rex(diffrax.Heun(), sigma_data=np.array([0.5, 1.0])),
}
NOISY = {"DDIM(1)": aj.DDIM(1.0), "DDIM(0.3)": aj.DDIM(0.3), "2M": aj.SDEDPMSolverPP(2), "tau 0.5": aj.SDEDPMSolverPP(1, tau=0.5)}


@pytest.fixture(params=list(SOLVERS))
def solver(request):
    return SOLVERS[request.param]


def there_and_back(solver, x, ts=TS, term=TERM, args=ARGS):
    """x_0 -> noise -> x_0."""
    return aj.sample(term, aj.invert(term, x, args, grid=ts, solver=solver), args, grid=ts, solver=solver)


def test_round_trips(solver):
    """From data to noise to data and from noise to data to noise, both states, to 1e-10 in float64."""
    found = there_and_back(solver, IMAGE)
    assert relative(found.x, IMAGE) < 1e-10
    pair = aj.sample(TERM, aj.Paired(X), ARGS, grid=TS, solver=solver)
    back = aj.invert(TERM, pair, ARGS, grid=TS, solver=solver)
    assert relative(back.x, X) < 1e-10
    again = aj.sample(TERM, back, ARGS, grid=TS, solver=solver)
    assert max(relative(again.x, pair.x), relative(again.aux, pair.aux)) < 1e-10


def test_a_pair_is_the_same_sample(solver):
    """`sample` of an array is the x of the pair; a saved trajectory ends in it, and holds BDIA's pair."""
    plain = aj.sample(TERM, X, ARGS, grid=TS, solver=solver, save=True)
    pairs = aj.sample(TERM, aj.Paired(X), ARGS, grid=TS, solver=solver, save=True)
    np.testing.assert_array_equal(plain.xs, pairs.xs.x)
    assert pairs.xs.aux.shape == (N + 1, *X.shape)
    if isinstance(solver, aj.BDIA | S.BELM):
        np.testing.assert_array_equal(pairs.xs.aux[1:], plain.xs[:-1])


@pytest.mark.parametrize(("name", "process"), [(name, list(PROCESSES)[i % len(PROCESSES)]) for i, name in enumerate(SOLVERS)])
def test_every_process_on_a_traced_grid(name, process):
    """Gaussian data, six steps."""
    solver, term, ts = SOLVERS[name], gaussian(PROCESSES[process], "v", 0.6), np.linspace(*span(process), 7)
    traced = jax.jit(lambda ts: there_and_back(solver, IMAGE, ts, term, None).x)(jnp.asarray(ts))
    assert relative(traced, IMAGE) < 1e-9


@pytest.mark.parametrize(
    "solver",
    [aj.BDIA(1.0, aj.ExponentialRK(diffrax.Euler(), 0.6)), S.BELM(0.6), S.EDICT(sigma_data=0.6), aj.Rex(diffrax.Heun(), sigma_data=0.6)],
    ids=lambda solver: type(solver).__name__,
)
def test_from_pure_noise_to_clean_data(solver):
    """alpha = 0 at the start and sigma = 0 at the end, with a finite sigma_data; few steps lose less than 1e-10."""
    term, ts = gaussian(PROCESSES["flow"], "v", 0.6), np.linspace(1.0, 0.0, 7)
    assert relative(there_and_back(solver, IMAGE, ts, term, None).x, IMAGE) < 1e-10


def test_gradients_through_pairs_are_exact(solver):
    """DiscreteAdjoint is autodiff to 1e-12 in x, aux, args and the grid, for a loss on both states of the trajectory, in one of the directions."""
    ts = jnp.asarray(aj.grids.log_snr(PROCESS, 5))
    weights = jnp.cos(jnp.arange(6.0 * X.size)).reshape(6, *X.shape)

    def gradient(run, adjoint):
        def loss(x, aux, args, ts):
            path = run(TERM, aj.Paired(x, aux), args, grid=ts, solver=solver, adjoint=adjoint, save=True).xs
            return jnp.sum(path.x * weights) + jnp.sum(path.aux**2 * weights[::-1])

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(X, 0.9 * X + 0.1 * IMAGE, ARGS, ts)

    run = aj.sample if "leapfrog" in str(solver) or isinstance(solver, aj.BDIA) else aj.invert
    found, exact = gradient(run, aj.DiscreteAdjoint()), gradient(run, aj.DirectAdjoint())
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert relative(one, two) < 1e-12


def test_bdia_below_one_warns_and_loses_digits():
    with pytest.warns(UserWarning, match=r"multiplies errors by 1/gamma = 2 a step"):
        back = aj.invert(TERM, aj.sample(TERM, aj.Paired(X), ARGS, grid=TS, solver=aj.BDIA(0.5)), ARGS, grid=TS, solver=aj.BDIA(0.5))
    assert relative(back.x, X) > 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aj.sample(TERM, X, ARGS, grid=TS, solver=aj.BDIA(0.5))


@pytest.mark.parametrize("noisy", NOISY.values(), ids=NOISY)
@pytest.mark.parametrize("t_end", [1e-3, None])
def test_recovered_noises_make_the_image(noisy, t_end):
    """In float32 to 1e-5: the sampler with the encoder's noises ends at the image; one that carries history too."""
    x_0, args = IMAGE.astype(jnp.float32), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ARGS)
    ts = aj.grids.uniform(PROCESS, 20, t_end=1e-2 if t_end is None else t_end)
    x_T, z = S.encode_noise(TERM, x_0, args, grid=ts, solver=noisy, key=jax.random.key(5))
    assert z.shape == (20, *x_0.shape)
    assert z.dtype == jnp.float32
    found = aj.sample(TERM, x_T, args, grid=ts, solver=noisy, noise=z)
    assert relative(found, x_0) < 1e-5
    other = aj.sample(TERM, x_T, {**args, "cond": -args["cond"]}, grid=ts, solver=noisy, noise=z)
    assert relative(other, x_0) > 1e-3


def test_recovered_noises_are_gaussian():
    """Mean 0, variance 1 up to the share 1 - e^(-2h) that DDPM's small variance leaves out, uncorrelated in time."""
    process, count = aj.VPLinear(), 4000
    term, ts = gaussian(process, "eps", 0.6), aj.grids.log_snr(process, 150, t_end=1e-3)
    x_0 = np.sqrt(process.alpha(1e-3) ** 2 * 0.36 + process.sigma(1e-3) ** 2) * jax.random.normal(jax.random.key(0), (count,))
    _, z = S.encode_noise(term, x_0, None, grid=ts, solver=aj.DDIM(1.0), key=jax.random.key(1))
    z = np.asarray(z)[5:-5]
    assert abs(z.mean()) < 0.02
    share = -np.expm1(-2 * np.diff(process.lam(ts)).max())
    assert np.abs((z**2).mean(axis=1) - 1).max() < share + 0.1
    assert np.abs((z[1:] * z[:-1]).mean(axis=1)).max() < share + 0.1


def test_a_reflected_sampler_stays_in_its_box():
    """Every state; a box that no state reaches changes nothing; the gradient is autodiff's, history included."""
    reflected = [S.Reflected(solver, -0.5, 0.7) for solver in (aj.DPMSolverPP(2), diffrax.Heun())]
    ts = aj.grids.log_snr(PROCESS, 6)
    for solver in reflected:
        xs = aj.sample(TERM, X, ARGS, grid=ts, solver=solver, save=True).xs[1:]
        assert float(xs.max()) <= 0.7
        assert float(xs.min()) >= -0.5
        loss = lambda x, low, adjoint: jnp.sum(  # noqa: E731
            jnp.sin(aj.sample(TERM, x, ARGS, grid=ts, solver=eqx.tree_at(lambda s: s.low, solver, low), adjoint=adjoint))  # noqa: B023
        )
        found, exact = (jax.grad(loss, (0, 1))(X, jnp.asarray(-0.5), adjoint) for adjoint in (aj.DiscreteAdjoint(), aj.DirectAdjoint()))
        assert relative(found[0], exact[0]) < 1e-12
        assert relative(found[1], exact[1]) < 1e-12
        assert float(jnp.abs(exact[1])) > 0
    wide = aj.sample(TERM, X, ARGS, grid=ts, solver=S.Reflected(aj.DDIM(), -100.0, 100.0))
    np.testing.assert_array_equal(wide, aj.sample(TERM, X, ARGS, grid=ts, solver=aj.DDIM()))


STOCHASTIC = {
    "Euler": aj.Rex(diffrax.Euler(), tau=1.0),
    "Midpoint": aj.Rex(tau=0.6),
    "Heun, noise": aj.Rex(diffrax.Heun(), sigma_data=np.inf, tau=1.0),
    "Bosh3": aj.Rex(diffrax.Bosh3(), tau=1.0),
}


def draws_for(solver, steps, seed=7):
    return jax.random.normal(jax.random.key(seed), (steps, *((solver.draws,) if solver.draws > 1 else ()), *X.shape))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_stochastic_rex_is_undone_along_its_path(name):
    """Both ways to 1e-10 in float64 over a part of the range, by noise and by key; Midpoint draws twice, Bosh3 four times a step."""
    solver, ts, key = STOCHASTIC[name], np.linspace(0.6, 0.3, 21), jax.random.key(3)
    assert solver.draws == {"Euler": 1, "Midpoint": 2, "Heun, noise": 1, "Bosh3": 4}[name]
    noise = draws_for(solver, 20)
    pair = aj.sample(TERM, aj.Paired(X), ARGS, grid=ts, solver=solver, noise=noise)
    assert relative(pair.x, pair.aux) < 0.1
    back = aj.invert(TERM, pair, ARGS, grid=ts, solver=solver, noise=noise)
    assert max(relative(back.x, X), relative(back.aux, X)) < 1e-10
    there = aj.invert(TERM, IMAGE, ARGS, grid=ts, solver=solver, key=key)
    assert relative(aj.sample(TERM, there, ARGS, grid=ts, solver=solver, key=key).x, IMAGE) < 1e-10
    again = aj.sample(TERM, there, ARGS, grid=ts, solver=solver, key=jax.random.key(4))
    assert relative(again.x, IMAGE) > 0.1


@pytest.mark.parametrize("name", ["Midpoint", "Heun, noise"])
def test_the_stochastic_rex_has_exact_gradients(name):
    """DiscreteAdjoint is autodiff to 1e-12 in x, aux and the noise, on six steps, in both directions."""
    solver, ts = STOCHASTIC[name], np.linspace(0.6, 0.3, 7)

    def gradient(run, adjoint):
        def loss(x, aux, noise):
            end = run(TERM, aj.Paired(x, aux), ARGS, grid=ts, solver=solver, adjoint=adjoint, noise=noise)
            return jnp.sum(jnp.sin(end.x)) + jnp.sum(end.aux**2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(X, 0.9 * X + 0.1 * IMAGE, draws_for(solver, 6))

    run = aj.invert if name == "Midpoint" else aj.sample
    for one, two in zip(gradient(run, aj.DiscreteAdjoint()), gradient(run, aj.DirectAdjoint()), strict=True):
        assert relative(one, two) < 1e-12


@pytest.mark.parametrize(
    "solver", [aj.Rex(diffrax.Euler(), tau=1.0), aj.Rex(diffrax.Heun(), tau=0.6), aj.Rex(diffrax.Heun(), sigma_data=np.inf, tau=1.0)], ids=str
)
def test_the_stochastic_rex_follows_one_path(solver):
    """Of one draw a step: against SDE-DPM-Solver(++) on 2048 steps of one Brownian path, strong order above 0.8 from 32 to 128 steps."""
    splitting, fine = solver.splitting, aj.grids.log_snr(PROCESS, 2048, t_start=0.9, t_end=0.02)
    noise = np.asarray(draws_for(solver, 2048))
    exact = aj.sample(TERM, X, ARGS, grid=fine, solver=aj.Exponential(1, splitting.sigma_data, tau=splitting.tau), noise=noise)
    errors = []
    for steps in (32, 128):
        drawn = coarser(splitting, PROCESS, fine, 2048 // steps, noise)
        errors.append(relative(aj.sample(TERM, X, ARGS, grid=fine[:: 2048 // steps], solver=solver, noise=drawn), exact))
    assert np.log2(errors[0] / errors[1]) / 2 > 0.8, errors
