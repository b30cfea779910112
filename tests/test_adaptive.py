"""Adaptive steps: embedded error estimates, diffrax's controllers, and the grids of the published samplers' own."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PROCESSES, Mixture, relative, span

import adjoint_jax as aj
from adjoint_jax.solvers import ExponentialStages, StepController, adaptive_grid

X, ARGS, TARGET = Mixture.inputs()
PAIRS = [(2, np.inf), (2, 0.0), (2, 0.7), (3, np.inf), (3, 0.0), (2, np.array([0.5, 1.0]))]


@pytest.mark.parametrize(("order", "sigma_data"), [*PAIRS, (3, 0.7)], ids=str)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_the_error_is_the_difference_to_the_order_below(order, sigma_data, solver_type):
    """Of one step, to 1e-13: DPM-Solver-12, and -23 whose lower member is 2S with r_1 = 1/3."""
    term, ts = Mixture(PROCESSES["vp_linear"]).term(), np.array([0.7, 0.6])
    high = ExponentialStages(order, sigma_data, solver_type=solver_type)
    low = ExponentialStages(order - 1, sigma_data, solver_type=solver_type, nodes=high.nodes[: order - 2])
    t0, t1 = jnp.asarray(ts)
    _, error, *_ = high.step(term, t0, t1, X, ARGS, high.init(term, t0, t1, X, ARGS), False)
    ends = [aj.sample(term, X, ARGS, grid=ts, solver=solver) for solver in (high, low)]
    assert relative(error, ends[0] - ends[1]) < 1e-12 * np.linalg.norm(ends[0]) / np.linalg.norm(error)


@pytest.mark.parametrize(("name", "pair"), list(zip(PROCESSES, PAIRS, strict=True))[::2], ids=str)
def test_under_diffrax_controllers(name, pair):
    """On every process the value and its gradient, by diffrax's own adjoint, are within 1e-4 of an accurate solution's."""
    process, (start, end) = PROCESSES[name], span(name)
    term, solver = Mixture(process, "v").term(), ExponentialStages(*pair)
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-7)

    def adaptive(x):
        more = {"stepsize_controller": controller, "adjoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=64)}
        found = diffrax.diffeqsolve(term, solver, start, end, (end - start) / 1000, x, ARGS, **more)
        return 0.5 * jnp.sum((found.ys[-1] - TARGET) ** 2), (found.ys[-1], found.stats)

    def accurate(x):
        grid = aj.grids.log_snr(process, 128, t_start=start, t_end=end)
        return 0.5 * jnp.sum((aj.sample(term, x, ARGS, grid=grid, solver=diffrax.Tsit5()) - TARGET) ** 2)

    (value, (x_0, stats)), slope = jax.jit(jax.value_and_grad(adaptive, has_aux=True))(X)
    expected, exact = jax.jit(jax.value_and_grad(accurate))(X)
    assert np.all(np.isfinite(x_0))
    assert abs(value - expected) < 1e-4 * expected
    assert relative(slope, exact) < 1e-4
    assert stats["num_accepted_steps"] < 2000


CONTROLS = {
    "dpm-solver": {},
    "k-diffusion": {"controller": "k-diffusion"},
    "PI": {"controller": StepController(0.9, 0.8, pcoeff=0.3, icoeff=0.4, dcoeff=0.1)},
}


@pytest.mark.parametrize(
    ("control", "name", "pair"), [("dpm-solver", "vp_linear", (2, np.inf)), ("k-diffusion", "flow", (3, 0.0)), ("PI", "vp_discrete", (2, 0.0))]
)
def test_the_grid_found_is_a_grid(control, name, pair):
    """Its sample is the state that the search ended at, to 1e-12; a thousandth of the tolerance costs more and errs less."""
    (start, end), solver = span(name), ExponentialStages(*pair)
    term = Mixture(PROCESSES[name]).term()
    search = partial(adaptive_grid, term, X, ARGS, solver=solver, t_start=start, t_end=end, **CONTROLS[control])
    exact = aj.sample(term, X, ARGS, grid=aj.grids.log_snr(PROCESSES[name], 256, t_start=start, t_end=end), solver=diffrax.Tsit5())
    errors, costs = [], []
    for tolerance in (5e-2, 5e-5):
        found = search(rtol=tolerance, atol=tolerance / 10)
        assert found.ts[0] == start
        assert found.ts[-1] == end
        assert len(found.ts) - 1 + found.rejections == len(found.accepted)
        assert found.evaluations == pair[0] * len(found.accepted)
        assert relative(found.x, aj.sample(term, X, ARGS, grid=found.ts, solver=solver)) < 1e-12
        errors.append(relative(found.x, exact))
        costs.append(found.evaluations)
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 30
    assert costs[1] > 3 * costs[0]


def test_a_search_repeated_is_differentiable():
    """In x_T through the step sizes: the state's derivative is that of finite differences of searches."""
    term, solver = Mixture(PROCESSES["vp_linear"]).term(), ExponentialStages(2)
    search = partial(adaptive_grid, term, args=ARGS, solver=solver, rtol=0.2, atol=0.05)
    found = search(X)

    def end(x):
        again = search(x, like=found)
        return jnp.sum(again.x * TARGET), again

    (_, again), slope = jax.jit(jax.value_and_grad(end, has_aux=True))(X)
    assert relative(again.ts, found.ts) < 1e-12
    assert relative(again.x, found.x) < 1e-12
    away = 1e-5 * TARGET
    ends = [search(X + sign * away) for sign in (1, -1)]
    assert all(end.accepted == found.accepted for end in ends)
    measured = float(jnp.sum((ends[0].x - ends[1].x) * TARGET)) / 2
    assert abs(measured - float(jnp.sum(slope * away))) < 1e-6 * abs(measured)
