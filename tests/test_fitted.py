"""Fitted interpolation: a pilot's nodes and weights serve other noise, conditions and losses, with the error that is predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, Mixture, relative, span

import adjoint_jax as aj
from adjoint_jax._work import flops
from adjoint_jax.adjoints import InterpolatedAdjoint, fit_interpolation

N = 20
X, ARGS, TARGET = Mixture.inputs()
OTHER = jnp.cos(3.0 * X[::-1] + 1.0)


def problem(process="vp_linear", solver=None):
    """The term, the grid, and `gradients(x, adjoint)` in x_T, conditions, per-step shifts and the noise."""
    solver, term = solver or aj.DPMSolverPP(2), Mixture(PROCESSES[process]).term()
    grid = aj.grids.log_snr(PROCESSES[process], N) if process != "flow" else np.linspace(*span(process), N + 1)
    shifts = 0.1 * jnp.cos(jnp.arange(N, dtype=float))[:, None, None] * jnp.ones((N, 3, 2))
    draws = jax.random.normal(jax.random.key(8), (N, *X.shape)) if getattr(solver, "draws", 0) else None
    more = {} if draws is None else {"noise": draws}

    def gradients(x, adjoint):
        def loss(x, cond, shifts, draws):
            args = {"params": aj.PerStep(shifts), "cond": cond}
            out = aj.sample(term, x, args, grid=grid, solver=solver, adjoint=adjoint, noise=draws)
            return jnp.sum(jnp.sin(out - TARGET))

        argnums = (0, 1, 2) if draws is None else (0, 1, 2, 3)
        return jax.jit(jax.grad(loss, argnums))(x, ARGS["cond"][::-1], 0.5 * shifts, None if draws is None else draws[::-1])

    fit = lambda **options: fit_interpolation(  # noqa: E731
        term, OTHER, {"params": aj.PerStep(shifts), "cond": ARGS["cond"]}, grid=grid, solver=solver, **more, **options
    )
    return fit, gradients


@pytest.mark.parametrize(
    ("process", "solver"),
    [("vp_linear", aj.DPMSolverPP(2)), ("edm", aj.UniPC(3)), ("flow", aj.DEIS(3)), ("vp_linear", aj.SDEDPMSolverPP(2))],
    ids=["DPM-Solver++(2M)", "UniPC", "DEIS", "SDE-DPM-Solver++"],
)
def test_what_was_fitted_serves_other_samples(process, solver):
    """Ten of twenty nodes, on other noise, conditions, shifts and another loss: dL/dx_T as was predicted, the integrals to 2e-3, their parts, a
    step each, to 2e-2. Polynomials on ten nodes err by three times more at least."""
    fit, gradients = problem(process, solver)
    adjoint = fit(steps=10)
    exact, found, kept = (gradients(X, each) for each in (aj.DiscreteAdjoint(), adjoint, fit(steps=10, keep=True)))
    errors = [relative(*pair) for pair in zip(found, exact, strict=True)]
    assert errors[0] < 4 * adjoint.fitted.error
    assert all(error < bound for error, bound in zip(errors, (2e-3, 2e-3, 2e-2, 2e-3), strict=False))
    assert all(relative(*pair) < 1e-12 for pair in zip(kept, found, strict=True))
    assert relative(gradients(X, InterpolatedAdjoint(steps=10))[0], exact[0]) > 3 * errors[0]


def test_all_nodes_are_exact():
    fit, gradients = problem()
    for one, two in zip(gradients(X, fit(steps=N)), gradients(X, aj.DiscreteAdjoint()), strict=True):
        assert relative(one, two) < 1e-12


def test_a_tolerance_chooses_the_nodes():
    """The fewest whose predicted error is below it."""
    fit, gradients = problem()
    loose, tight = fit(tol=1e-2), fit(tol=1e-4)
    assert loose.steps < tight.steps
    for adjoint, tol in ((loose, 1e-2), (tight, 1e-4)):
        assert adjoint.fitted.error <= tol < fit(steps=adjoint.steps - 1).fitted.error
    exact = gradients(X, aj.DiscreteAdjoint())[0]
    assert relative(gradients(X, tight)[0], exact) < relative(gradients(X, loose)[0], exact)


def test_a_file_holds_a_fit(tmp_path):
    fit, gradients = problem()
    adjoint = fit(steps=6)
    adjoint.fitted.save(tmp_path / "fit.npz")
    read = InterpolatedAdjoint(fitted=aj.adjoints.Fitted.load(tmp_path / "fit.npz"))
    assert (read.fitted.error, read.nodes, read.order) == (adjoint.fitted.error, adjoint.nodes, adjoint.order)
    for one, two in zip(gradients(X, read), gradients(X, adjoint), strict=True):
        np.testing.assert_array_equal(one, two)
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(ValueError, match=r"holds no fit: give a file that Fitted\.save wrote"):
        aj.adjoints.Fitted.load(tmp_path / "other.npz")


def test_cost():
    """N forward evaluations, then a backward one a node, and a forward one unless its linearisation was kept; memory of the nodes alone."""
    weight, grid = jnp.eye(64), aj.grids.log_snr(PROCESSES["vp_linear"], N)
    term = aj.DiffusionTerm(lambda x, t, args: jnp.tanh(x @ args), PROCESSES["vp_linear"])
    fit = lambda keep: fit_interpolation(term, jnp.ones((4, 64)), weight, grid=grid, steps=6, order=1, keep=keep)  # noqa: E731
    work = lambda adjoint: flops(jax.grad(lambda x: jnp.sum(aj.sample(term, x, weight, grid=grid, adjoint=adjoint))), jnp.ones((4, 64)))  # noqa: E731
    evaluation = 2 * 4 * 64 * 64
    assert work(fit(True)) // evaluation == N + 6
    assert work(fit(False)) // evaluation == N + 2 * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problem()[0](steps=0), "choose between 1 and"),
        (lambda: problem()[0](steps=N + 1), "choose between 1 and"),
        (lambda: problem(solver=aj.solvers.ExponentialStages(2))[0](steps=4), "read the network once"),
        (
            lambda: aj.sample(TERM, X, ARGS, grid=np.linspace(0.9, 0.1, 5), adjoint=problem()[0](steps=4)),
            "fitted to 20 steps of .* another grid, of 4",
        ),
        (lambda: aj.sample(TERM, X, ARGS, grid=GRID, solver=aj.DDIM(), adjoint=problem()[0](steps=4)), "another solver, DDIM"),
        (lambda: jax.grad(lambda x: jnp.sum(aj.sample(TERM, x, ARGS | {"more": X}, grid=GRID, adjoint=problem()[0](steps=4))))(X), "other leaves"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TERM, GRID = Mixture(PROCESSES["vp_linear"]).term(), aj.grids.log_snr(PROCESSES["vp_linear"], N)
