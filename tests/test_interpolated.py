"""The interpolated adjoint: exact with a node at every step, on Gaussians at two, and without a floor in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, Mixture, gaussian, relative, span

import adjoint_jax as aj
from adjoint_jax.adjoints import InterpolatedAdjoint

N = 9
X, ARGS, TARGET = Mixture.inputs()
SOLVERS = {
    "DPM-Solver++(2M)": aj.DPMSolverPP(2),
    "DEIS": aj.DEIS(3),
    "UniPC": aj.UniPC(3),
    "SDE-DPM-Solver++": aj.SDEDPMSolverPP(2),
    "DDIM(1)": aj.DDIM(1.0),
    "schedule": aj.Schedule((1, 2, 3, 2, 2, 2, 2, 2, 1), ("noise",) + 8 * ("data",), correctors=(0, 2, 3, 2, 2, 2, 2, 2, 0)),
    "BELM": aj.solvers.BELM(),
}


def gradients(solver, process, grid, *adjoints, save=False, rough=0.1):
    """Of a loss on the sample, or on all states, in x_T, constant and per-step arguments, and the noise."""
    term = Mixture(PROCESSES[process]).term()
    steps = len(grid) - 1
    shifts = rough * jax.random.normal(jax.random.key(7), (steps, 3, 2))
    draws = jax.random.normal(jax.random.key(8), (steps, *X.shape)) if getattr(solver, "draws", 0) else None

    def loss(x, cond, shifts, draws, adjoint):
        args = {"params": aj.PerStep(shifts), "cond": cond}
        out = aj.sample(term, x, args, grid=grid, solver=solver, adjoint=adjoint, noise=draws, save=save)
        return sum(jnp.sum((leaf - jnp.broadcast_to(TARGET, leaf.shape)) ** 2) for leaf in jax.tree.leaves(out.xs if save else out))

    argnums = (0, 1, 2) if draws is None else (0, 1, 2, 3)
    return [jax.jit(jax.grad(lambda *args: loss(*args, adjoint), argnums))(X, ARGS["cond"], shifts, draws) for adjoint in adjoints]  # noqa: B023


WHERE = ("vp_linear", "edm", "flow", "ve", "vp_discrete", "vp_linear", "vp_cosine")


@pytest.mark.parametrize(("name", "process"), list(zip(SOLVERS, WHERE, strict=True)))
def test_all_nodes_are_exact(name, process):
    """In x_T, arguments, each step's own and the noise, for a loss on the whole trajectory."""
    grid = np.linspace(*span(process), N + 1)
    exact, *found = gradients(SOLVERS[name], process, grid, aj.DiscreteAdjoint(), InterpolatedAdjoint(), InterpolatedAdjoint(keep=True), save=True)
    for each in found:
        for one, two in zip(each, exact, strict=True):
            assert relative(one, two) < 1e-12


@pytest.mark.parametrize("mode", ["PEC", "PECE"])
def test_kept_linearisations_change_nothing(mode):
    grid = np.linspace(*span("edm"), N + 1)
    options = {"steps": 5, "mode": mode, "nodes": "index"}
    one, two = gradients(SOLVERS["UniPC"], "edm", grid, InterpolatedAdjoint(**options), InterpolatedAdjoint(keep=True, **options))
    for left, right in zip(one, two, strict=True):
        assert relative(left, right) < 1e-13


def test_gaussians_need_two_nodes():
    """Data N(0, c^2) in the frame of c: nothing is left to interpolate."""
    process = PROCESSES["vp_linear"]
    term, grid = gaussian(process, "v", 0.5), aj.grids.log_snr(process, 12)
    loss = lambda x, adjoint: jnp.sum(jnp.sin(aj.sample(term, x, grid=grid, adjoint=adjoint)))  # noqa: E731
    exact, found = (jax.grad(lambda x: loss(x, adjoint))(X) for adjoint in (aj.DiscreteAdjoint(), InterpolatedAdjoint(1, 0.5, 2)))  # noqa: B023
    assert relative(found, exact) < 1e-12


@pytest.mark.parametrize("name", ["DPM-Solver++(2M)", "UniPC", "SDE-DPM-Solver++"])
def test_few_nodes_converge(name):
    """Nodes at an eighth, a quarter and half of 48 steps; the error falls with the nodes (on a rough path, the SDE's, more slowly)."""
    grid = aj.grids.log_snr(PROCESSES["vp_linear"], 48)
    counts = (6, 12, 24)
    exact, *found = gradients(SOLVERS[name], "vp_linear", grid, aj.DiscreteAdjoint(), *(InterpolatedAdjoint(3, 1.0, m) for m in counts), rough=0.0)
    bounds = (0.3, 0.15, 0.05) if name.startswith("SDE") else (0.1, 0.02, 0.005)
    for which in (0, 1):
        errors = [relative(each[which], exact[which]) for each in found]
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InterpolatedAdjoint(5), "orders 1 to 4"),
        (lambda: InterpolatedAdjoint(sigma_data=np.inf), "finite positive sigma_data"),
        (lambda: gradients(aj.solvers.ExponentialStages(2), "vp_linear", GRID, InterpolatedAdjoint()), "read the network once a step"),
        (lambda: gradients(aj.Exponential(1, np.array([0.5, 1.0])), "vp_linear", GRID, InterpolatedAdjoint()), "splittings of one number"),
        (lambda: gradients(aj.DDIM(), "vp_linear", GRID, InterpolatedAdjoint(steps=1)), "2 nodes or more"),
        (lambda: gradients(aj.DDIM(), "vp_linear", GRID, InterpolatedAdjoint(steps=90)), "choose steps between"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


GRID = aj.grids.log_snr(PROCESSES["vp_linear"], N)


def test_no_gradient_in_the_grid():
    term = Mixture(PROCESSES["vp_linear"]).term()
    with pytest.raises(ValueError, match="concrete grid"):
        jax.grad(lambda ts: jnp.sum(aj.sample(term, X, ARGS, grid=ts, adjoint=InterpolatedAdjoint())))(jnp.asarray(GRID))
