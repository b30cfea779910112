"""AdjointDEIS on SDEs and schedules: its factor kappa on one Brownian path, its orders in every input and mode, exactness on Gaussians, its sums."""

from functools import cache, partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PREDICTIONS, PROCESSES, Mixture, gaussian, relative, span
from test_sde import coarser

import adjoint_jax as aj
from adjoint_jax.solvers import Ancestral, DPMSolverPPSDE, ExponentialStages, Prescribed, SASolver
from adjoint_jax.splitting import Splitting, level

PROCESS, INF = PROCESSES["vp_linear"], np.inf
DEIS = aj.AdjointDEIS
pytestmark = pytest.mark.filterwarnings("ignore:The published AdjointDEIS")


def guided(scale, prediction="eps"):
    """The mixture with its condition amplified."""
    return aj.DiffusionTerm(aj.cfg(Mixture(PROCESS, prediction), scale), PROCESS, prediction)


def slopes(coarse, fine, octaves=1.0):
    """Of two lists of (found, exact)."""
    errors = [{name: relative(found[name], exact[name]) for name in exact} for found, exact in (coarse, fine)]
    return {name: np.log2(errors[0][name] / errors[1][name]) / octaves for name in errors[0]}, errors[1]


PATHS, FINE = 96, 16384  # with 24 paths the slopes of the exact gradient itself vary by 0.25
SPLITTINGS = ((0.0, 1.0), (0.5, 0.6), (1.0, 1.0), (INF, 1.0))


@cache
def path():
    """The grid of the fine steps and their draws."""
    return aj.grids.log_snr(PROCESS, FINE, t_end=0.02), np.asarray(jax.random.normal(jax.random.key(2), (FINE, PATHS, 2)))


def on_a_path(c, tau, steps, adjoint):
    """Gradients in all inputs, one of each for every path, on `steps` steps of paths of FINE ones; the noise's as dL/dx at 32 times."""
    splitting, (ts, draws), ratio = Splitting(c, tau), path(), FINE // steps
    x, args, target = Mixture.inputs(PATHS)
    noise = jnp.asarray(coarser(splitting, PROCESS, ts, ratio, draws) if ratio > 1 else draws)

    def loss(x, cond, params, scale, noise, target):
        args = {"params": params, "cond": cond[None], "uncond": 0 * cond[None]}
        out = aj.sample(guided(scale), x[None], args, grid=ts[::ratio], solver=aj.Exponential(1, c, tau=tau), adjoint=adjoint, noise=noise[:, None])
        return jnp.sum(jnp.sin(out) * target[None])

    each = jax.vmap(jax.grad(loss, (0, 1, 2, 3, 4)), (0, 0, None, None, 1, 0), (0, 0, 0, 0, 1))
    *found, noise = jax.jit(each)(x, args["cond"], args["params"], jnp.asarray(1.4), noise, target)
    start, end = level(PROCESS, ts[::ratio][:-1]), level(PROCESS, ts[::ratio][1:])
    states = (noise / splitting.noise(start, end)[:, None, None])[steps // 32 - 1 :: steps // 32]
    return dict(zip(("x_T", "cond", "params", "scale", "noise"), (*found, states), strict=True))


@cache
def fine_path(c, tau):
    """Autodiff through 16384 steps."""
    return on_a_path(c, tau, FINE, aj.DiscreteAdjoint())


ON_PATHS = [
    *((c, tau, DEIS(2, c, mode=mode)) for (c, tau), mode in zip(SPLITTINGS, ("PECE", "AB", "PEC", "Heun"), strict=True)),
    *((INF, 1.0, DEIS(2, INF, published=published)) for published in (True, "exact")),
]


@pytest.mark.parametrize(
    ("c", "tau", "adjoint"), ON_PATHS, ids=lambda value: f"{value.mode}{value.published}" if isinstance(value, DEIS) else str(value)
)
def test_the_factor_of_the_sde(c, tau, adjoint):
    """Order 1 in every input on nested paths, from 64 to 512 steps, towards autodiff through 16384: with another kappa nothing would converge."""
    exact = fine_path(c, tau)
    found, errors = slopes(*((on_a_path(c, tau, steps, adjoint), exact) for steps in (64, 512)), octaves=3)
    assert min(found.values()) > 0.9, (found, errors)


SDES = {
    "DDIM(0.5)": aj.DDIM(0.5),
    "SA-Solver": SASolver(3, 4),
    "SEEDS-3": ExponentialStages(3, tau=0.7),
    "ancestral 2S": Ancestral(ExponentialStages(2, 0.0), 0.8),
    "DPM-Solver++ (stochastic)": DPMSolverPPSDE(),
    "prescribed": Prescribed(aj.DDIM(1.0)),
}
NODES = (lambda n: DEIS(2), lambda n: DEIS(2, steps=n // 2), lambda n: DEIS(2, steps=n // 2, mode="AB"))


@pytest.mark.parametrize("name", SDES)
def test_every_stochastic_solver(name):
    """Order 1 in x_T and the noise towards the sampler's own gradient, on 64 paths, for several draws a step and inner noise too."""
    solver, which = SDES[name], list(SDES).index(name)
    x, args, target = Mixture.inputs(64)
    term = Mixture(PROCESS, "x0" if which % 2 else "eps").term()

    def gradients(steps, adjoint):
        ts, draws = aj.grids.log_snr(PROCESS, steps, t_end=0.02), () if solver.draws == 1 else (solver.draws,)
        noise = jax.random.normal(jax.random.key(5), (steps, *draws, *x.shape))
        loss = lambda x, noise: jnp.sum(jnp.sin(aj.sample(term, x, args, grid=ts, solver=solver, noise=noise, adjoint=adjoint)) * target)  # noqa: E731
        return dict(zip(("x_T", "noise"), jax.jit(jax.grad(loss, (0, 1)))(x, noise), strict=True))

    found, errors = slopes(*((gradients(n, NODES[which % 3](n)), gradients(n, aj.DiscreteAdjoint())) for n in (64, 512)), octaves=3)
    assert min(found.values()) > 0.85, (found, errors)


FRAMES = (0.0, 0.5, 1.0, INF)
SMOOTH = [
    *((DEIS(2, c, mode="Heun"), 2, 2) for c in FRAMES),
    *((DEIS(order, INF, published="exact"), order, order) for order in (1, 2)),
    (DEIS(2, INF, published=True), 2, 2),
    (DEIS(3, 0.5), 3, 3),
    (DEIS(2, INF, mode="PEC"), 2, 2),
    (DEIS(3, integral_order=1), 3, 1),
    (DEIS(2, INF, published=True, integral_order=1), 2, 1),
    ("half", 3, 3),
]
BOSH = aj.ExponentialRK(diffrax.Bosh3(), 1.0)


@cache
def of_schedule(steps, adjoint, solver):
    """Gradients in x_T, params, guidance scale and a condition of each interval, as a function of these."""
    ts, (_, _, target) = aj.grids.log_snr(PROCESS, steps, t_start=0.8, t_end=0.02), Mixture.inputs()
    adjoint = DEIS(3, steps=steps // 2) if adjoint == "half" else adjoint

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradients(x, params, scale, cond):
        args = {"params": params, "cond": aj.PerStep(cond), "uncond": jnp.zeros_like(x)}
        return jnp.sum(jnp.sin(aj.sample(guided(scale), x, args, grid=ts, solver=solver, adjoint=adjoint)) * target)

    return gradients


def scheduled(steps, kind, adjoint, solver):
    (x, args, _), s = Mixture.inputs(), np.arange(steps) / steps
    shape = {"constant": 0 * s, "smooth": np.sin(3 * s), "jump": 1.0 * (s >= 0.5)}[kind]
    found = of_schedule(steps, adjoint, solver)(x, args["params"], jnp.full((len(x), 1), 1.4), args["cond"][None] + jnp.asarray(shape)[:, None, None])
    return dict(zip(("x_T", "params", "scale", "per step"), found, strict=True))


def pairs(kind, adjoint, solver=BOSH, counts=(128, 256)):
    return [(scheduled(steps, kind, adjoint, solver), scheduled(steps, kind, aj.DiscreteAdjoint(), solver)) for steps in counts]


@pytest.mark.parametrize(("adjoint", "of_state", "of_integrals"), SMOOTH, ids=lambda value: getattr(value, "mode", value))
def test_orders(adjoint, of_state, of_integrals):
    """A constant schedule of a one-step sampler: the order of the state, and that of the integrals, of the whole and by interval, and no more."""
    found, errors = slopes(*pairs("constant", adjoint))
    assert found.pop("x_T") > of_state - 0.25, (found, errors)
    assert min(found.values()) > of_integrals - 0.25, (found, errors)
    assert of_integrals == of_state or found["per step"] < of_integrals + 0.25, (found, errors)


def test_schedules():
    """Order 1 on a smooth schedule, and by interval for a multistep sampler; a jump is off by a constant in its own interval, and only there."""
    for kind, solver in (("smooth", BOSH), ("constant", aj.DPMSolverPP(2))):
        found, errors = slopes(*pairs(kind, DEIS(), solver))
        assert min(found.values()) > 0.85, (found, errors)
        assert max(errors.values()) < 0.03
    rest = []
    for found, exact in pairs("jump", DEIS()):
        found, exact = (np.asarray(part["per step"]).reshape(len(part["per step"]), -1) for part in (found, exact))
        distance, half = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1), len(found) // 2
        assert distance[half - 1] > 10 * np.median(distance), distance
        rest.append(np.delete(distance, np.arange(half - 2, half + 2)).max())
    assert np.log2(rest[0] / rest[1]) > 0.85, rest


SUMS = {
    "PECE": DEIS(),
    "half": DEIS(4, 0.5, 5, "index", "AB"),
    "exact": DEIS(2, INF, 4, published="exact"),
    "published": DEIS(2, INF, 5, published=True),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_intervals_sum_to_the_whole(name):
    """Equal leaves of all intervals have gradients that add up to that of one leaf; the first and the last interval go by the solver's own step."""
    process, (x, args, _) = PROCESSES["flow"], Mixture.inputs()
    ts, adjoint, cond = np.linspace(1.0, 0.0, 11), SUMS[name], args["cond"]
    noise = jax.random.normal(jax.random.key(1), (10, *x.shape))

    @jax.jit
    def gradients(cond):
        """Of an SDE, in the noise too, whose last draw has no weight."""
        run = lambda cond, noise: aj.sample(  # noqa: E731
            Mixture(process, "v").term(), x, {**args, "cond": cond}, grid=ts, solver=aj.SDEDPMSolverPP(2), noise=noise, adjoint=adjoint
        )
        return jax.grad(lambda *given: jnp.sum(jnp.sin(run(*given))), (0, 1))(cond, noise)

    whole, of_noise = gradients(cond)
    parts, same = gradients(aj.PerStep(jnp.stack([cond] * 10)))
    assert relative(parts.value.sum(0), whole) < 1e-12
    assert relative(same, of_noise) < 1e-12
    assert np.all(np.linalg.norm(of_noise, axis=(1, 2))[:-1] > 0)
    assert np.all(of_noise[-1] == 0)


@pytest.mark.parametrize(("prediction", "process"), list(zip(PREDICTIONS, ("vp_linear", "edm", "flow", "ve", "vp_cosine"), strict=True)))
def test_gaussians_are_exact(prediction, process):
    """Data N(0, c^2) in the frame of c: x_T and every draw, in one step and in three, at all nodes and at both ends alone, in closed form.

    dx_j/dx_i is the ratio of m_kappa; the solver's own transposed step has it as a difference, and loses up to eight digits of small ones.
    """
    for steps, c, tau in ((1, 0.6, 1.7), (3, np.array([0.3, 1.7]), 0.5)):
        term, ts = gaussian(PROCESSES[process], prediction, c), np.linspace(*span(process), steps + 1)
        at, splitting = level(PROCESSES[process], ts), Splitting(c, tau)
        start, end = at.at(slice(0, -1)), at.at(slice(1, None))
        scale, weight = (
            np.broadcast_to(np.reshape(part, (len(part), -1)), (len(part), 2)) for part in (splitting.scale(at), splitting.noise(start, end))
        )
        x, noise = jnp.ones((4, 2)), jax.random.normal(jax.random.key(1), (steps, 4, 2))
        for adjoint in (DEIS(1, c, mode="AB"), DEIS(3, c, steps=1), DEIS(2, c, mode="Heun")):
            solver = aj.Exponential(1, c, tau=tau)
            run = lambda x, noise: jnp.sum(aj.sample(term, x, grid=ts, solver=solver, noise=noise, adjoint=adjoint))  # noqa: B023, E731
            of_x, of_noise = jax.jit(jax.grad(run, (0, 1)))(x, noise)
            assert relative(of_x, np.broadcast_to(scale[-1] / scale[0], x.shape)) < 1e-13
            assert relative(of_noise, np.broadcast_to((scale[-1] / scale[1:] * weight)[:, None], noise.shape)) < 1e-13


KEPT = {
    "2M to clean data": (aj.DPMSolverPP(2), {"steps": 4}, {}),
    "SDE, AB": (aj.SDEDPMSolverPP(2), {"mode": "AB"}, {"key": jax.random.key(3)}),
    "DDIM(1), Heun": (aj.DDIM(1.0), {"mode": "Heun"}, {"noise": jax.random.normal(jax.random.key(3), (8, 6, 2))}),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_linearisations_change_nothing(name):
    """In x_T, the parameters, each interval's condition and the draws."""
    solver, options, more = KEPT[name]
    (x, args, target), ts = Mixture.inputs(), aj.grids.uniform(PROCESS, 8, t_end=0.0 if "clean" in name else None)

    def gradients(adjoint):
        def loss(x, params, cond, noise):
            given = {**more, **({} if noise is None else {"noise": noise})}
            args = {"params": params, "cond": aj.PerStep(cond)}
            return jnp.sum(aj.sample(Mixture(PROCESS).term(), x, args, grid=ts, solver=solver, adjoint=adjoint, **given) * target)

        cond, noise = jnp.stack([args["cond"]] * 8), more.get("noise")
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2) if noise is None else (0, 1, 2, 3)))(x, args["params"], cond, noise))

    one, two = (gradients(DEIS(2, 0.5, keep=keep, **options)) for keep in (False, True))
    assert all(relative(found, same) < 1e-13 for found, same in zip(two, one, strict=True))


@pytest.mark.parametrize("adjoint", [DEIS(3, 0.5, 3, "index"), DEIS(2, INF, published="exact")], ids=["frame", "exact"])
def test_a_traced_grid_and_a_key(adjoint):
    """The weights of the graph are those of the host, and a key is its draws, in x_T, the noise and the leaves of each interval."""
    (x, args, target), ts = Mixture.inputs(), jnp.asarray(aj.grids.log_snr(PROCESS, 6, t_start=0.8, t_end=0.05))
    key, cond = jax.random.key(4), jnp.stack([args["cond"]] * 6)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in range(6)])

    def loss(x, cond, noise, ts):
        given = {"key": key} if noise is None else {"noise": noise}
        args = {"params": jnp.zeros((3, 2)), "cond": aj.PerStep(cond)}
        return jnp.sum(aj.sample(Mixture(PROCESS).term(), x, args, grid=ts, solver=aj.DDIM(1.0), adjoint=adjoint, **given) * target)

    host = jax.grad(loss, (0, 1, 2))(x, cond, noise, np.asarray(ts))
    for found in (jax.jit(jax.grad(loss, (0, 1, 2)))(x, cond, noise, ts), jax.grad(loss, (0, 1))(x, cond, None, np.asarray(ts))):
        for one, two in zip(found, host, strict=False):
            assert relative(one, two) < 1e-11
