"""Truncated and greedy gradients against plain autodiff through the steps that they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import Mixture, gaussian, relative

import adjoint_jax as aj
from adjoint_jax.adjoints._computation import first
from adjoint_jax.sample import prepare

A = aj.adjoints
PROCESS = aj.VPLinear()
TERM = Mixture(PROCESS).term()
X, ARGS, TARGET = Mixture.inputs()
N = 5
TS = aj.grids.log_snr(PROCESS, N)
SOLVERS = {"DPMSolverPP(3)": aj.DPMSolverPP(3), "BDIA": aj.BDIA(), "SDE": aj.SDEDPMSolverPP(2)}


def drawn(solver):
    return {"noise": jax.random.normal(jax.random.key(2), (N, *X.shape))} if solver == "SDE" else {}


def loss(x):
    return jnp.sum(jnp.sin(x) * TARGET)


def stopped(solver, k, args, save=False):
    """The states after the last k steps, the carry before them a constant: a Python loop under plain autodiff."""
    computation = prepare(TERM, X, args, TS, SOLVERS[solver], None, drawn(solver).get("noise"), False)
    (shared, _), carry, states = computation.shared(), computation.carry(), []
    for i in range(N):
        carry = jax.lax.stop_gradient(carry) if i == N - k else carry
        carry = computation.step(shared, carry, first(computation.inputs(), i))
        states.append(carry[0] if i >= N - k else jax.lax.stop_gradient(carry[0]))
    return jnp.stack(states) if save else carry[0]


def gradient(adjoint, solver="DPMSolverPP(3)", save=False, of=ARGS, x=X):
    def objective(args, x):
        found = aj.sample(TERM, x, args, grid=TS, solver=SOLVERS[solver], adjoint=adjoint, save=save, **drawn(solver))
        return jnp.sum(found.xs[1:] ** 2) if save else loss(found)

    return jax.jit(jax.grad(objective, (0, 1)))(of, x)


def close(found, expected, tolerance=1e-12):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(one, two) < tolerance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [1, 3])
def test_last_k_is_autodiff_from_a_constant_carry(solver, k):
    """History, pairs and noises are carried over; x_T gets zero; the value is that of every adjoint."""
    found, of_x = gradient(aj.LastK(k), solver)
    close(found, jax.jit(jax.grad(lambda args: loss(stopped(solver, k, args))))(ARGS))
    assert not np.any(of_x)
    run = lambda adjoint: aj.sample(TERM, X, ARGS, grid=TS, solver=SOLVERS[solver], adjoint=adjoint, **drawn(solver))  # noqa: E731
    np.testing.assert_array_equal(run(aj.LastK(k)), run(aj.DiscreteAdjoint()))


def test_a_trajectory_is_constant_up_to_the_last_k():
    found, _ = gradient(aj.LastK(2), save=True)
    close(found, jax.jit(jax.grad(lambda args: jnp.sum(stopped("DPMSolverPP(3)", 2, args, save=True) ** 2)))(ARGS))


def test_all_steps_are_the_exact_gradient():
    close(gradient(aj.LastK(9)), gradient(aj.DiscreteAdjoint()))


def test_per_step_leaves_before_the_last_k_get_zero():
    """The others get what they get from a constant carry."""
    values = ARGS["cond"][None] * jnp.linspace(0.5, 1.5, N)[:, None, None]
    found, _ = gradient(aj.LastK(2), of={**ARGS, "cond": aj.PerStep(values)})
    exact = jax.grad(lambda args: loss(stopped("DPMSolverPP(3)", 2, args)))({**ARGS, "cond": aj.PerStep(values)})
    assert not np.any(found["cond"].value[:-2])
    assert relative(found["cond"].value, exact["cond"].value) < 1e-12


def test_random_k_is_last_k():
    """One program for all keys; every K up to `most` comes; K is uniform."""
    program = jax.jit(lambda key: gradient(A.RandomK(key, 3))[0])
    expected = [jax.tree.leaves(gradient(aj.LastK(k))[0]) for k in (1, 2, 3)]
    seen = []
    for i in range(12):
        found = jax.tree.leaves(program(jax.random.key(i)))
        errors = [max(relative(one, two) for one, two in zip(found, leaves, strict=True)) for leaves in expected]
        assert min(errors) < 1e-12
        seen.append(int(np.argmin(errors)))
    assert set(seen) == {0, 1, 2}


def test_low_variance_is_the_mean_over_noisings():
    """(3), written out for eps: DDIM from the noised sample, cotangent of the loss at the sample."""
    key, n = jax.random.key(4), 3
    found, of_x = gradient(A.LowVariance(key, n))
    x = aj.sample(TERM, X, ARGS, grid=TS, solver=SOLVERS["DPMSolverPP(3)"])
    (a, b), (s, u) = PROCESS.alpha(TS[-2:]), PROCESS.sigma(TS[-2:])
    xi = jnp.stack([jax.random.normal(jax.random.fold_in(key, k), X.shape) for k in range(n)])
    noisy = a / b * x[None] + np.sqrt(s**2 - (a / b * u) ** 2) * xi

    def ddim(args):
        one = lambda y: b / a * y + (u - b * s / a) * TERM.predict(TS[-2], y, args)  # noqa: E731
        return jnp.sum(jax.grad(loss)(x) * jnp.mean(jax.vmap(one)(noisy), axis=0))

    close(found, jax.grad(ddim)(ARGS), 1e-10)
    assert not np.any(of_x)
    np.testing.assert_array_equal(aj.sample(TERM, X, ARGS, grid=TS, adjoint=A.LowVariance(key)), aj.sample(TERM, X, ARGS, grid=TS))


def test_the_noisings_are_those_of_the_forward_process():
    """Gaussian data: a sample of variance alpha^2 s^2 + sigma^2 is noised to the variance one node earlier."""
    lam = PROCESS.lam(TS[-2:])
    (a, b), (s, u) = PROCESS.alpha(TS[-2:]), PROCESS.sigma(TS[-2:])
    spread = s * np.sqrt(-np.expm1(-2 * (lam[1] - lam[0])))
    assert abs((a / b) ** 2 * (b**2 * 0.36 + u**2) + spread**2 - (a**2 * 0.36 + s**2)) < 1e-14


def test_posterior_gradient_of_a_gaussian():
    """x0 = alpha s^2 x / v, so that d|x0|^2 / dx is in closed form."""
    t, s = 0.4, 0.6
    a, v = PROCESS.alpha(t), PROCESS.alpha(t) ** 2 * s**2 + PROCESS.sigma(t) ** 2
    found = A.posterior_gradient(lambda x0: jnp.sum(x0**2), gaussian(PROCESS, "v", s), X, t)
    assert relative(found, 2 * (a * s**2 / v) ** 2 * X) < 1e-12


def test_look_ahead_goes_from_greedy_to_full():
    """One evaluation is the posterior gradient; all of them are the full gradient of DDIM into sigma = 0."""
    process = aj.FlowMatching()
    term, ts = Mixture(process).term(), aj.grids.uniform(process, 6, t_start=0.9, t_end=0.0)
    ahead = lambda t, steps, **more: A.look_ahead(loss, term, X, t, ARGS, grid=ts, steps=steps, **more)  # noqa: E731
    assert relative(ahead(ts[1], 1), A.posterior_gradient(loss, term, X, ts[1], ARGS)) < 1e-14
    full = jax.grad(lambda x: loss(aj.sample(term, x, ARGS, grid=ts[1:], solver=aj.DDIM())))(X)
    errors = [relative(ahead(ts[1], steps, solver=aj.DDIM()), full) for steps in (1, 2, 5)]
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-12
    assert relative(ahead(ts[1], 5, solver=aj.DDIM(), adjoint=aj.LastK(9)), full) < 1e-12
