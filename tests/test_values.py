"""Exactness: DiscreteAdjoint is plain autodiff, and no adjoint changes the sample, for every solver, process and prediction."""

import os
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PREDICTIONS, PROCESSES, relative, span

import adjoint_jax as aj
from adjoint_jax.adjoints._computation import run_direct
from adjoint_jax.sample import prepare

SOLVERS = {
    "DDIM": aj.DDIM(),
    "DEIS(4, t)": aj.DEIS(4, "t"),
    "DEIS(3, rho)": aj.DEIS(3, "rho"),
    "DEIS(2, lam)": aj.DEIS(2, "lam"),
    "DPMSolverPP(2)": aj.DPMSolverPP(2),
    "DPMSolverPP(3)": aj.DPMSolverPP(3),
    "Exponential(3, 0.5)": aj.Exponential(3, 0.5),
    "Exponential(2, channels)": aj.Exponential(2, np.array([0.3, 1.0, 2.0])),
    "Heun": diffrax.Heun(),
    "Bosh3(0.5)": aj.ExponentialRK(diffrax.Bosh3(), 0.5),
    "BDIA": aj.BDIA(),
    "BELM(0.5)": aj.solvers.BELM(0.5),
    "EDICT": aj.solvers.EDICT(),
    "Rex": aj.Rex(diffrax.Heun(), sigma_data=0.5),
    "Euler(channels)": aj.ExponentialRK(diffrax.Euler(), np.array([0.3, 1.0, 2.0])),
    "DDIM(1)": aj.DDIM(1.0),
    "DEIS(3, t, published)": aj.DEIS(3, "t", published=True),
    "DEIS(3, rho, ipndm_v)": aj.DEIS(3, "rho", published="ipndm_v"),
    "SDEDPMSolverPP(3, diffusers)": aj.SDEDPMSolverPP(3, published="diffusers"),
    "UniPC(3)": aj.UniPC(3),
    "UniPC(3, vary_coeff)": aj.UniPC(3, "vary_coeff", np.inf),
    "SASolver(1, 1)": aj.solvers.SASolver(1, 1, 0.0),
    "SASolver(3, 4)": aj.solvers.SASolver(3, 4, (1.0, 0.5, 0.5, 0.0)),
    "SASolver(3, 4, denoise)": aj.solvers.SASolver(3, 4, denoise=True),
    "ExponentialStages(3)": aj.solvers.ExponentialStages(3, tau=1.0, lower_order_final=(3, 2, 3, 1)),
    "ExponentialStages(2)": aj.solvers.ExponentialStages(2),
    "Churn(Heun)": aj.solvers.Churn(diffrax.Heun(), 0.2),
    "Ancestral(2S)": aj.solvers.Ancestral(aj.solvers.ExponentialStages(2, 0.0)),
    "DPMSolverPPSDE": aj.solvers.DPMSolverPPSDE(),
    "GDDIM(2, 0.5)": aj.solvers.GDDIM(2, 0.5),
    "GMS(0.1)": aj.solvers.GMS(variance=0.1),
    "Rex(SDE)": aj.Rex(diffrax.Heun(), sigma_data=np.inf, tau=0.5),
}
BOUND = ("SASolver(3, 4)", "ExponentialStages(3)")  # to N steps, by a number for each
ADJOINTS = {
    "Discrete": aj.DiscreteAdjoint(),
    "PECE3": aj.AdjointDEIS(3, 0.7),
    "AB2": aj.AdjointDEIS(2, 0.7, steps=2, mode="AB"),
    "published": aj.AdjointDEIS(2, np.inf, published=True),
}
N, D = 4, 3
X = jax.random.normal(jax.random.key(0), (2, D))
ARGS = {"params": 0.3 * jax.random.normal(jax.random.key(1), (D, D)), "cond": jax.random.normal(jax.random.key(2), (2, D)), "label": jnp.arange(2)}
WEIGHTS = jax.random.normal(jax.random.key(3), (N, 2, D))


def noise(solver):
    """The draws of a solver on N steps, or None."""
    draws = getattr(solver, "draws", 0)
    return jax.random.normal(jax.random.key(4), (N, *((draws,) if draws > 1 else ()), 2, D)) if draws else None


def network(x, t, args):
    return jnp.tanh(x @ args["params"] + args["cond"] * jnp.cos(t)) + 0.1 * args["label"][:, None].astype(x.dtype)


TERM = aj.DiffusionTerm(network, PROCESSES["vp_linear"], "eps")


# conftest's faster emitters round tanh and exp as the surrounding code suggests, so that two programs differ by up to 1e-11 here.
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"] else None


@partial(eqx.filter_jit, compiler_options=EMITTERS)
def pull(computation, adjoint, weights):
    """The trajectory and the gradient in x_T, args and every row of weights of a loss on all its states."""
    floats, rest = eqx.partition(computation, lambda leaf: eqx.is_inexact_array(leaf))

    def states(floats):
        c = eqx.combine(floats, rest)
        return run_direct(c)[1] if isinstance(adjoint, aj.DirectAdjoint) else adjoint.run(c)[1]

    values, transpose = jax.vjp(states, floats)
    return values, transpose(jnp.cos(values) * weights)[0]


def some_pairs(name):
    """Each process with a prediction, five predictions in all, another choice for another solver: over the solvers, all pairs."""
    return [(process, PREDICTIONS[(i + list(SOLVERS).index(name)) % len(PREDICTIONS)]) for i, process in enumerate(PROCESSES)]


def test_all_pairs_are_among_them():
    assert len({pair for name in SOLVERS for pair in some_pairs(name)}) == len(PROCESSES) * len(PREDICTIONS)


def check_autodiff(name, pairs):
    solver = SOLVERS[name]
    for process, prediction in pairs:
        ts = np.linspace(*span(process), N + 1)
        laid_out = prepare(aj.DiffusionTerm(network, PROCESSES[process], prediction), X, ARGS, ts, solver, None, noise(solver), save=True)
        laid_out = eqx.tree_at(lambda c: (c.term, c.ts), laid_out, (TERM, jnp.asarray(ts)))
        xs, exact = pull(laid_out, aj.DirectAdjoint(), WEIGHTS)
        same, found = pull(laid_out, aj.DiscreteAdjoint(), WEIGHTS)
        assert relative(same, xs) < 1e-12
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            assert relative(one, two) < 1e-12, (process, prediction)


@pytest.mark.parametrize("name", SOLVERS)
def test_discrete_adjoint_is_autodiff(name):
    """To 1e-12, in x_T, args and the weights, for every process: they are data of one compiled program a solver."""
    check_autodiff(name, some_pairs(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_discrete_adjoint_is_autodiff_for_every_pair(name):
    check_autodiff(name, [(process, prediction) for process in PROCESSES for prediction in PREDICTIONS])


@pytest.mark.parametrize(("solver", "process"), [(name, list(PROCESSES)[i // 2 % len(PROCESSES)]) for i, name in enumerate(SOLVERS)][::2])
def test_gradient_in_the_grid(solver, process):
    """To 1e-12 through the public face: every other solver (that in the weights is tested for all, above), every process."""
    term = aj.DiffusionTerm(network, PROCESSES[process], "v")

    def run(x, ts, adjoint):
        return aj.sample(term, x, ARGS, grid=ts, solver=SOLVERS[solver], noise=noise(SOLVERS[solver]), adjoint=adjoint)

    def gradient(adjoint):
        loss = lambda x, ts: jnp.sum(jnp.sin(run(x, ts, adjoint)) * WEIGHTS[0])  # noqa: E731
        # Without jit: the weights' own graph is long, and each of its operations is compiled once for all solvers.
        return jax.grad(loss, (0, 1))(X, jnp.asarray(np.linspace(*span(process), N + 1)))

    for one, two in zip(gradient(aj.DiscreteAdjoint()), gradient(aj.DirectAdjoint()), strict=True):
        assert np.all(np.isfinite(two))
        assert relative(one, two) < 1e-12


@pytest.mark.filterwarnings("ignore:The published AdjointDEIS")
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_no_adjoint_changes_the_sample(solver):
    """Values to 1e-12, differentiated or not; a concrete grid and a traced one to 1e-12."""
    ts = aj.grids.log_snr(PROCESSES["vp_linear"], N)
    term = aj.DiffusionTerm(network, PROCESSES["vp_linear"], "v")
    plain = aj.sample(term, X, ARGS, grid=ts, solver=solver, noise=noise(solver), adjoint=aj.DirectAdjoint())
    traced = jax.jit(lambda ts: aj.sample(term, X, ARGS, grid=ts, solver=solver, noise=noise(solver)))(jnp.asarray(ts))
    assert relative(traced, plain) < 1e-12
    sampler = solver if isinstance(solver, aj.solvers.AbstractSampler) else aj.ExponentialRK(solver)
    continuous = sampler.follows_ode and not sampler.draws
    for adjoint in ADJOINTS.values() if continuous else [aj.DiscreteAdjoint()]:
        run = lambda x: aj.sample(term, x, ARGS, grid=ts, solver=solver, adjoint=adjoint, noise=noise(solver))  # noqa: B023, E731
        assert relative(run(X), plain) < 1e-12
        assert relative(jax.vjp(run, X)[0], plain) < 1e-12


@pytest.mark.parametrize(("name", "process"), [(name, list(PROCESSES)[(i + k) % 6]) for i, name in enumerate(SOLVERS) for k in (0, 2, 3)])
def test_rows_of_a_traced_grid_in_float32(name, process):
    """The weights that the graph computes in float32 differ from the host's by 1e-5 of the largest of their kind, steps in lam being even."""
    solver, steps = SOLVERS[name], N if name in BOUND else 8
    sampler = solver if isinstance(solver, aj.solvers.AbstractSampler) else aj.ExponentialRK(solver)
    start, end = span(process)
    ts = aj.grids.log_snr(PROCESSES[process], steps, t_start=start, t_end=end).astype(np.float32)
    host = sampler.table(PROCESSES[process], "v", ts.astype(np.float64))
    graph = sampler.table(PROCESSES[process], "v", jnp.asarray(ts))
    graph = graph._replace(active=host.active)  # whether a stage is skipped is not known of a traced grid
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(graph), jax.tree.leaves(host), strict=True):
        where = jax.tree_util.keystr(path)
        kinds = [slice(0, 1), slice(1, None)] if where == ".x" else [slice(None)]  # the weight of x is of another kind than those behind it
        for kind in kinds:
            scale = np.abs(two[:, kind]).max(initial=0)
            np.testing.assert_allclose(one[:, kind], two[:, kind], rtol=1e-5, atol=1e-5 * scale, err_msg=where)
