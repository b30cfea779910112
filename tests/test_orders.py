"""Orders on a Gaussian mixture: VPLinear, grid uniform in lam, t from 1 to 1e-3, slope from 160 to 320 steps, for samples and for every gradient."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convergence import PUBLISHED as TABLE, ROWS
from goldens.cases import cases, complete, shared_file
from goldens.networks import Golden, arguments
from models import Mixture, relative

import adjoint_jax as aj
from adjoint_jax.sample import prepare

PROCESS = aj.VPLinear()
X, ARGS, TARGET = Mixture.inputs()


CACHE = {}


def solve(solver, adjoint, steps):
    """The sample and dL/d(x_T, cond, params), L = |x_0 - target|^2 / 2."""
    key = (str(solver), str(adjoint), steps)
    if key not in CACHE:
        CACHE[key] = compute(solver, adjoint, steps)
    return CACHE[key]


def compute(solver, adjoint, steps):
    term, ts = Mixture(PROCESS).term(), aj.grids.log_snr(PROCESS, steps)

    @jax.jit
    def run(x, args):
        value, pull = jax.vjp(lambda x, args: aj.sample(term, x, args, grid=ts, solver=solver, adjoint=adjoint), x, args)
        slope, shares = pull(value - TARGET)
        return {"x_0": value, "x_T": slope, **shares}

    return run(X, ARGS)


def slopes(solver, adjoint):
    exact = solve(aj.ExponentialRK(diffrax.Dopri8()), aj.DiscreteAdjoint(), 500)
    errors = [{name: relative(found[name], exact[name]) for name in exact} for found in (solve(solver, adjoint, n) for n in (160, 320))]
    return {name: np.log2(errors[0][name] / errors[1][name]) for name in exact}, errors[0]


STOCK = (diffrax.Euler(), diffrax.Heun(), diffrax.Bosh3())
SAMPLERS = [
    (aj.DDIM(), 1),
    *((aj.DEIS(order, variable), order) for order, variable in ((2, "rho"), (3, "t"), (4, "t"), (4, "lam"))),
    *((aj.DPMSolverPP(order), order) for order in (2, 3)),
    *((aj.Exponential(order, 0.7), order) for order in (1, 3)),
    (aj.Exponential(4, 0.7), 3.75),  # the start, of order 1, begins to show: 3.56 here, 3.1 from 320 to 640
    (aj.Exponential(3, 1.0, "theta"), 3),
    (aj.Exponential(2, np.array([0.5, 1.0])), 2),
    *((aj.ExponentialRK(stock, 0.7), order) for order, stock in enumerate(STOCK, 1)),
    (aj.ExponentialRK(diffrax.Bosh3()), 3),
    (aj.ExponentialRK(diffrax.Tsit5(), 0.0), 5),
    (aj.solvers.PlainRK(diffrax.Heun()), 2),
    (aj.solvers.PNDM(4, "heun"), 2),
    (aj.solvers.FON(2, "heun"), 2),
    (aj.BDIA(), 2),
    (aj.BDIA(0.5), 1),
    (aj.solvers.BELM(0.7), 2),
    (aj.solvers.EDICT(), 1),
    (aj.Rex(), 2),
    (aj.Rex(diffrax.Bosh3(), sigma_data=0.7), 3),
    (aj.ExponentialRK(diffrax.Bosh3(), np.array([0.5, 1.0])), 3),
]


@pytest.mark.parametrize(("solver", "order"), SAMPLERS, ids=lambda value: str(value)[:60])
def test_samples_and_exact_gradients_have_the_solvers_order(solver, order):
    found, _ = slopes(solver, aj.DiscreteAdjoint())
    assert min(found.values()) > order - 0.25, found


MOST = 320
GOLDEN = aj.DiffusionTerm(Golden("gmm2", "eps", PROCESS), PROCESS)
FIRST = {}


@eqx.filter_jit
def march(computation, inputs, steps):
    shared, _ = computation.shared()
    step = lambda i, carry: computation.step(shared, carry, jax.tree.map(lambda leaf: leaf[i], inputs))  # noqa: E731
    return jax.lax.fori_loop(0, steps, step, computation.carry())[0]


def golden_start():
    """Unit normal noise and the mixture's parameters, of any of the goldens."""
    return jnp.asarray(cases()["dpm-solver/lu_adaptive_dpmsolver++_o2_gmm2_rtol0.05_detach_h"].array("xT")), arguments("gmm2")


def golden_sample(solver, steps):
    """The sample; all solvers of one pattern, and all numbers of steps, share a compiled program."""
    x, args = golden_start()
    laid_out = prepare(GOLDEN, x, args, aj.grids.log_snr(PROCESS, steps), solver, None, None, False)
    key = (type(laid_out.solver).step, str(laid_out.solver.pattern))
    inputs = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.zeros((MOST - steps, *leaf.shape[1:]), leaf.dtype)]), laid_out.inputs())
    same = FIRST.setdefault(key, eqx.tree_at(lambda c: (c.ts, c.rows), laid_out, (jnp.zeros(2), None)))
    return march(same, inputs, steps)


@functools.cache
def golden_solution():
    x, args = golden_start()
    ts, solver = aj.grids.log_snr(PROCESS, 1500), aj.ExponentialRK(diffrax.Dopri8(), 0.7)
    return np.asarray(jax.jit(lambda x: aj.sample(GOLDEN, x, args, grid=ts, solver=solver))(x))


@pytest.mark.parametrize("name", ROWS)
def test_convergence(name):
    """The last slope is the published one, or the stated order, less 0.15; the errors are the published ones to 1 %."""
    row, exact = ROWS[name], golden_solution()
    made = row.solver if isinstance(row.solver, eqx.Module) else None
    errors = {}
    for steps in (10, 20, 80, 160, 320) if row.errors else (160, 320):
        found = golden_sample(made or row.solver(steps), steps)
        errors[steps] = float(np.abs(found - exact).max() / np.abs(exact).max())
    assert np.log2(errors[160] / errors[320]) > row.slope - 0.15, errors
    np.testing.assert_allclose([errors[steps] for steps in (10, 20, 80, 320) if row.errors], row.errors, rtol=row.exact_to)


def test_the_published_convergence_is_complete():
    """Every row of the shared table stands in ours, with its numbers."""
    if not complete():
        pytest.skip("the shared data are not here")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shared_file("convergence.md").splitlines()[2:]]
    found = {name: ([float(error) for error in errors], float(slope)) for name, _, *errors, _, slope in rows}
    assert found == {name: (list(row.errors), row.slope) for name, row in TABLE.items()}


# 160 to 320 steps is not yet asymptotic for every frame: PEC at sigma_data 0.8 and 2 slopes 1.5 to 2 where the terms of two orders partly cancel,
# order 3 at sigma_data 0 slopes 2.3 there, 2.7 from 320 to 640 and 2.9 from 640 to 1280.
FRAMES = ((1.0, "PECE"), (np.inf, "PECE"), (1.5, "PEC"), (1.0, "AB"))
ADJOINTS = [(aj.AdjointDEIS(1), 1), *((aj.AdjointDEIS(order, c, mode=mode), order) for order in (2, 3, 4) for c, mode in FRAMES)]
ADJOINTS += [(aj.AdjointDEIS(order, 0.0), order) for order in (2, 4)]
PUBLISHED = [(aj.AdjointDEIS(order, np.inf, published=True), order) for order in (1, 2)]


@pytest.mark.filterwarnings("ignore:The published AdjointDEIS")
@pytest.mark.parametrize(("adjoint", "order"), ADJOINTS + PUBLISHED, ids=lambda value: getattr(value, "mode", value))
def test_continuous_adjoints_have_their_order(adjoint, order):
    found, _ = slopes(aj.ExponentialRK(diffrax.Dopri5()), adjoint)
    assert min(found[name] for name in ("x_T", "cond", "params")) > order - 0.25, found


@pytest.mark.parametrize(("p", "q"), [(1, 3), (2, 4), (3, 2)])
def test_an_adjoint_on_a_sampler_has_the_lower_of_both_orders(p, q):
    found, _ = slopes(aj.Exponential(p, 0.7), aj.AdjointDEIS(q, 1.0))
    assert min(found[name] for name in ("x_T", "cond", "params")) > min(p, q) - 0.25, found


def test_ddim_is_euler_in_the_noise_splitting():
    ts, term = aj.grids.log_snr(PROCESS, 20), Mixture(PROCESS).term()
    one, two = (aj.sample(term, X, ARGS, grid=ts, solver=solver) for solver in (aj.DDIM(), diffrax.Euler()))
    assert relative(one, two) < 1e-14


def test_dpm_solver_pp_2m_is_the_published_rule():
    """x_t = (sigma_t/sigma_s) x - alpha_t expm1(-h) D, D = (1 + 1/(2r)) x0_s - x0_{s-1}/(2r), r = h_{-1}/h."""
    network, ts = Mixture(PROCESS, "x0"), aj.grids.karras(PROCESS, 9)
    alpha, sigma, lam = (getattr(PROCESS, name)(ts) for name in ("alpha", "sigma", "lam"))
    x, past = X, None
    for i in range(9):
        x0, h = network(x, jnp.asarray(ts[i]), ARGS), lam[i + 1] - lam[i]
        r = np.inf if past is None else (lam[i] - lam[i - 1]) / h
        mean = x0 if past is None else (1 + 1 / (2 * r)) * x0 - past / (2 * r)
        x, past = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * mean, x0
    assert relative(aj.sample(network_term(network), X, ARGS, grid=ts), x) < 1e-13


def network_term(network):
    return aj.DiffusionTerm(network, PROCESS, network.prediction)


def test_published_adjoint_deis_1_is_its_recursion():
    """a_t = (alpha_s/alpha_t) a_s + sigma_t (e^h - 1) (alpha_s/alpha_t)^2 J_eps^T a_s from less to more noise."""
    ts, network = aj.grids.log_snr(PROCESS, 30), Mixture(PROCESS)
    alpha, sigma, lam = (getattr(PROCESS, name)(ts) for name in ("alpha", "sigma", "lam"))
    path = aj.sample(network_term(network), X, ARGS, grid=ts, save=True).xs
    a, cond = path[-1] - TARGET, 0
    for i in range(30, 0, -1):
        pull = jax.vjp(lambda x, cond: network(x, jnp.asarray(ts[i]), {**ARGS, "cond": cond}), path[i], ARGS["cond"])[1]  # noqa: B023
        of_x, of_cond = pull(a)
        ratio, growth = alpha[i] / alpha[i - 1], sigma[i - 1] * np.expm1(lam[i - 1] - lam[i])
        a, cond = ratio * a + growth * ratio**2 * of_x, cond + growth * ratio * of_cond
    adjoint = aj.AdjointDEIS(1, np.inf, published=True)
    objective = lambda x, args: 0.5 * jnp.sum((aj.sample(network_term(network), x, args, grid=ts, adjoint=adjoint) - TARGET) ** 2)  # noqa: E731
    found, shares = jax.grad(objective, (0, 1))(X, ARGS)
    assert relative(found, a) < 1e-12
    assert relative(shares["cond"], cond) < 1e-12
