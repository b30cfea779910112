"""The reverse SDE for stock solvers: the ODE at tau = 0, exact variances, one sample of one Brownian path, whichever solver follows it."""

from functools import cache

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, Mixture, gaussian, relative, span

import adjoint_jax as aj
from adjoint_jax.splitting import level

PROCESS = aj.VPLinear()
TERM = Mixture(PROCESS).term()
X, ARGS, TARGET = Mixture.inputs()
FINEST = 1024
TS = np.linspace(0.9, 0.05, FINEST + 1)
PATH = diffrax.VirtualBrownianTree(TS[-1], TS[0], 1e-4, X.shape, jax.random.key(5), diffrax.SpaceTimeLevyArea)


@cache
def finest():
    """SRA1's solution on the finest grid."""
    return solve(diffrax.SRA1(), 1.0, TS)


@cache
def increments():
    """W(t_{i+1}) - W(t_i) on the finest grid."""
    values = jax.lax.map(PATH.evaluate, jnp.asarray(TS))
    return values[1:] - values[:-1]


def solve(solver, tau, ts, x=X, args=ARGS, term=TERM, path=PATH, adjoint=None):
    controller = diffrax.StepTo(jnp.asarray(ts))
    return diffrax.diffeqsolve(
        aj.sde_terms(term, tau, path), solver, ts[0], ts[-1], None, x, args,
        stepsize_controller=controller, max_steps=len(ts), adjoint=adjoint or diffrax.RecursiveCheckpointAdjoint(),
    ).ys[-1]  # fmt: skip


def test_without_noise_it_is_the_ode():
    """The same steps of the same solver, to rounding error."""
    ts = TS[::64]
    ode = diffrax.diffeqsolve(TERM, diffrax.Heun(), ts[0], ts[-1], None, X, ARGS, stepsize_controller=diffrax.StepTo(jnp.asarray(ts))).ys[-1]
    assert relative(solve(diffrax.Heun(), 0.0, ts), ode) < 1e-13


@pytest.mark.parametrize("name", PROCESSES)
def test_marginal_variance_of_a_gaussian(name):
    """For the linear drift a x, d var/dt = 2 a var - (tau g)^2 holds of var = alpha^2 c^2 + sigma^2 at every time, to 1e-12."""
    process, c, one = PROCESSES[name], 0.6, jnp.ones(1)
    start, end = span(name)
    for t in jnp.linspace(start, end, 7):
        at = level(process, t)
        parts = jnp.stack([2 * at.alpha * at.alpha_rate * c**2, 2 * at.sigma * at.sigma_rate])
        for tau in (0.0, 0.5, 1.0):
            drift, diffusion = aj.sde_terms(gaussian(process, "v", c), tau, PATH).terms
            lost = diffusion.vf(t, one, None).diagonal[0] ** 2
            found = 2 * drift.vf(t, one, None)[0] * (at.alpha**2 * c**2 + at.sigma**2) - lost
            assert float(abs(found - parts.sum())) < 1e-12 * float(abs(parts).sum() + lost)


def test_drawn_variance_of_a_gaussian():
    """4000 paths of 200 steps of Euler-Maruyama, to four standard deviations of the estimate and Euler's error."""
    c, ts = 0.6, np.linspace(0.9, 0.05, 201)
    first, last = (PROCESS.alpha(t) ** 2 * c**2 + PROCESS.sigma(t) ** 2 for t in (ts[0], ts[-1]))
    x = np.sqrt(first) * jax.random.normal(jax.random.key(1), (4000,))
    path = diffrax.VirtualBrownianTree(ts[-1], ts[0], 1e-3, x.shape, jax.random.key(2))
    found = solve(diffrax.Euler(), 1.0, ts, x, None, gaussian(PROCESS, "eps", c), path)
    assert abs(float(jnp.var(found)) / last - 1) < 4 * np.sqrt(2 / 4000) + 0.02


@pytest.mark.parametrize(("solver", "order"), [(diffrax.Euler(), 1), (diffrax.SRA1(), 1.5)], ids=lambda v: str(v)[:8])
def test_strong_order_on_one_path(solver, order):
    """Additive noise gives Euler-Maruyama order 1; SRA1 has its 1.5 only where H has the sign of a path that runs from noise to data."""
    errors = [relative(solve(solver, 1.0, TS[::stride]), finest()) for stride in (32, 8)]
    slope = np.log2(errors[0] / errors[-1]) / 2
    assert slope > order - 0.25, (slope, errors)


@pytest.mark.parametrize(
    "solver", [aj.SDEDPMSolverPP(1), aj.SDEDPMSolverPP(2), aj.solvers.SDEDPMSolver(1), aj.Exponential(2, 0.7, tau=1.0)], ids=lambda v: str(v)[:16]
)
def test_our_solvers_follow_the_same_path(solver):
    """z_i = (W(t_{i+1}) - W(t_i)) / sqrt(t_i - t_{i+1}) drives ours; the distance to the stock solution falls with order 1."""
    exact, w = finest(), increments()
    errors = []
    for stride in (16, 1):
        ts = TS[::stride]
        steps = w.reshape(len(ts) - 1, stride, *X.shape).sum(1) / np.sqrt(TS[0] - TS[stride])
        errors.append(relative(aj.sample(TERM, X, ARGS, grid=ts, solver=solver, noise=steps), exact))
    assert np.log2(errors[0] / errors[1]) / 4 > 0.9, errors
    assert errors[1] < 5e-3


def test_gradients_by_diffrax():
    """In x_T and args, by its default adjoint, under jit, against finite differences along one direction."""
    ts = TS[::64]
    run = jax.jit(jax.value_and_grad(lambda x, args: jnp.sum(solve(diffrax.EulerHeun(), 1.0, ts, x, args) * TARGET), (0, 1)))
    (_, slope), shift = run(X, ARGS), jax.tree.map(jnp.cos, (X, ARGS))
    moved = [run(*jax.tree.map(lambda leaf, by: leaf + step * by, (X, ARGS), shift))[0] for step in (1e-5, -1e-5)]  # noqa: B023
    exact = sum(jax.tree.leaves(jax.tree.map(lambda one, two: jnp.sum(one * two), slope, shift)))
    assert relative((moved[0] - moved[1]) / 2e-5, exact) < 1e-7
