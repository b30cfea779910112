"""Bad input gets one sentence that says what was wrong, what was expected and what to do; each at trace time where it can be known there."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import adjoint_jax as aj


@pytest.fixture(autouse=True)
def without_type_checks():
    """Users have no import hook: they see the package's own sentences, not the checker's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PROCESS = aj.VPLinear()
GRID = aj.grids.log_snr(PROCESS, 4, t_start=0.5, t_end=0.2)
X = jnp.asarray([[0.3, -0.7, 1.1]])


def network(x, t, args):
    del t, args
    return jnp.tanh(x)


TERM = aj.DiffusionTerm(network, PROCESS)
PATH = diffrax.UnsafeBrownianPath((1, 3), jax.random.key(0))
EDGE = aj.DiffusionTerm(network, aj.FlowMatching(), "eps")


def term(function):
    return aj.DiffusionTerm(function, PROCESS)


def sample(x=X, args=None, of=TERM, **more):
    return aj.sample(of, x, args, **{"grid": GRID, **more})


def adaptive(x=X, of=TERM, **more):
    return aj.solvers.adaptive_grid(of, x, solver=aj.solvers.ExponentialStages(2), **more)


def gradient(**more):
    return jax.grad(lambda x: jnp.sum(sample(x, **more)))(X)


def traced(**more):
    return jax.jit(lambda grid: sample(grid=grid, **more))(jnp.asarray(GRID))


class Zero(diffrax.AbstractTerm):
    """A term of another kind."""

    def vf(self, t, y, args):
        return y

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        return vf * control


CASES = {  # what is done, the error, what its sentence holds
    # the state and the network
    "x_T of integers": (lambda: sample(jnp.ones((1, 3), int)), ValueError, r"x_T must be an array of floats; got dtype int"),
    "x_T complex": (lambda: sample(X.astype(complex)), ValueError, r"x_T must be an array of floats; got dtype complex128"),
    "output shape": (lambda: sample(of=term(lambda x, t, args: x[:, :2])), ValueError, r"answer in the shape of x, \(1, 3\); it gave \(1, 2\)"),
    "output that would broadcast": (lambda: sample(of=term(lambda x, t, args: x[:1, :1])), ValueError, r"shape of x, \(1, 3\); it gave \(1, 1\)"),
    "output shape in a gradient": (lambda: gradient(of=term(lambda x, t, args: x[None])), ValueError, r"it gave \(1, 1, 3\)"),
    "term of another kind": (lambda: sample(of=Zero()), TypeError, r"term must be an aj.DiffusionTerm.*got Zero"),
    "process of another kind": (
        lambda: aj.DiffusionTerm(network, "vp"),
        TypeError,
        r"process must be a noise process such as aj.VPLinear\(\); got str",
    ),
    "unknown prediction": (
        lambda: aj.DiffusionTerm(network, PROCESS, "epsilon"),
        ValueError,
        r"prediction='epsilon' is not known: use one of eps, x0, v",
    ),
    "pair for another solver": (
        lambda: sample(aj.Paired(X)),
        TypeError,
        r"aj.Paired is for the exactly invertible solvers.*DPMSolverPP takes an array",
    ),
    "pair of two shapes": (lambda: sample(aj.Paired(X, X[:, :2]), solver=aj.BDIA()), ValueError, r"one shape; got \(1, 3\) and \(1, 2\)"),
    "BDIA's gamma": (lambda: aj.BDIA(0.0), ValueError, r"gamma is above 0 and at most 1; got 0.0"),
    "BDIA on a multistep method": (lambda: aj.BDIA(1.0, aj.DEIS(2)), TypeError, r"BDIA takes a deterministic one-step solver.*got DEIS"),
    "EDICT's p": (lambda: aj.solvers.EDICT(1.5), ValueError, r"p is above 0 and at most 1; got 1.5"),
    "Rex's zeta": (lambda: aj.Rex(zeta=0.0), ValueError, r"zeta is above 0 and at most 1; got 0.0"),
    "Rex's tau": (lambda: aj.Rex(sigma_data=0.5, tau=1.0), ValueError, r"Rex's tau is one number, and above 0 for sigma_data 0 or infinity only"),
    "inverse of noise": (
        lambda: aj.invert(TERM, X, grid=GRID, solver=aj.DDIM(1.0), key=jax.random.key(0)),
        ValueError,
        r"DDIM draws noise and cannot be undone: use aj.Rex\(tau=...\), or aj.solvers.encode_noise",
    ),
    "GMS's variance": (lambda: aj.solvers.GMS(variance=-1.0), ValueError, r"GMS's variance is at least 0; got -1.0"),
    "GMS's variances": (
        lambda: sample(solver=aj.solvers.GMS(variance=np.ones(3)), key=jax.random.key(0)),
        ValueError,
        r"GMS's variance is a number or one a step, here 4; got shape \(3,\)",
    ),
    "GMS's heads and variance": (lambda: aj.solvers.GMS(network, 0.5), ValueError, r"give either heads or variance"),
    "GMS's heads": (
        lambda: sample(solver=aj.solvers.GMS(lambda x, t, args: (x, x[:, :2])), key=jax.random.key(0)),
        ValueError,
        r"two or three moments in the shape of x, \(1, 3\); they gave \[\(1, 3\), \(1, 2\)\]",
    ),
    "GDDIM's l": (lambda: aj.solvers.GDDIM(1, -0.5), ValueError, r"tau is a number, at least 0; got -0.5"),
    "GDDIM's order": (lambda: aj.solvers.GDDIM(5), ValueError, r"Exponential has orders 1 to 4; got order=5"),
    "sde_terms' term": (lambda: aj.sde_terms(Zero(), 1.0, PATH), TypeError, r"term must be an aj.DiffusionTerm.*got Zero"),
    "sde_terms' path": (lambda: aj.sde_terms(TERM, 1.0, lambda t0, t1: t1 - t0), TypeError, r"path must be a Brownian path such as.*got function"),
    "sde_terms' tau": (lambda: aj.sde_terms(TERM, -1.0, PATH), ValueError, r"tau is a number, at least 0; got -1.0"),
    "continuous adjoint of a pair": (
        lambda: gradient(solver=aj.BDIA(), adjoint=aj.AdjointDEIS()),
        ValueError,
        r"AdjointDEIS follows the ODE from single states, and BDIA.*use DiscreteAdjoint",
    ),
    "steps uncounted": (
        lambda: diffrax.diffeqsolve(
            TERM, aj.solvers.EDICT(), GRID[0], GRID[-1], None, X, stepsize_controller=diffrax.StepTo(GRID), adjoint=diffrax.DirectAdjoint()
        ),
        ValueError,
        r"EDICT counts its steps, which only aj.sample",
    ),
    "inverse into infinite lam": (
        lambda: aj.invert(EDGE, X, grid=[0.5, 0.2, 0.0], solver=aj.Rex()),
        ValueError,
        r"Inverse with prediction 'eps' is not defined on step 0.*a step from sigma = 0 needs sigma_data > 0",
    ),
    "noises of a deterministic sampler": (
        lambda: aj.solvers.encode_noise(TERM, X, grid=GRID, solver=aj.DDIM(), key=jax.random.key(0)),
        TypeError,
        r"adds one draw a step to x, such as aj.DDIM\(eta=1.0\); got DDIM",
    ),
    "adaptive steps without an estimate": (
        lambda: aj.solvers.adaptive_grid(TERM, X, solver=aj.DPMSolverPP(2)),
        TypeError,
        r"one-step solver with an error estimate such as ExponentialStages\(2\); got DPMSolverPP",
    ),
    "adaptive steps of first order": (
        lambda: aj.solvers.adaptive_grid(TERM, X, solver=aj.solvers.ExponentialStages(1)),
        TypeError,
        r"error estimate such as ExponentialStages\(2\); got ExponentialStages",
    ),
    "adaptive steps from infinity": (lambda: adaptive(of=EDGE), ValueError, r"infinite at t_start=1 or t_end=0: give times between"),
    "adaptive steps unknown": (lambda: adaptive(controller="pid"), ValueError, r"controller='pid' is not known: use 'dpm-solver', 'k-diffusion'"),
    "adaptive steps that do not arrive": (lambda: adaptive(most=3), ValueError, r"No grid in 3 attempts: at t = .*; loosen rtol=0.05, atol=0.0078"),
    "adaptive steps traced": (lambda: jax.jit(adaptive)(X), TypeError, r"adaptive_grid is not traced.*or with like=, its own earlier answer"),
    "reflected pair": (lambda: aj.solvers.Reflected(aj.BDIA()), TypeError, r"carries no second state; got BDIA"),
    "key given": (
        lambda: sample(key=jax.random.key(0)),
        ValueError,
        r"DPMSolverPP is deterministic.*leave key and noise None",
    ),
    "noise given": (
        lambda: sample(noise=jnp.ones((4, 1, 3))),
        ValueError,
        r"DPMSolverPP is deterministic.*leave key and noise None",
    ),
    # args
    "cfg without uncond": (
        lambda: sample(args={"cond": X}, of=term(aj.cfg(network, 2.0))),
        ValueError,
        r"reads args\['cond'\] and args\['uncond'\]: give both",
    ),
    "cfg without args": (lambda: sample(of=term(aj.cfg(network, 2.0))), ValueError, r"args\['cond'\] and args\['uncond'\]: give both"),
    "module without params": (
        lambda: sample(args={"cond": X}, of=term(aj.linen(None))),
        ValueError,
        r"reads its weights from args\['params'\]: give args = ",
    ),
    "PerStep of another length": (
        lambda: sample(args={"s": aj.PerStep(jnp.ones(3))}),
        ValueError,
        r"one value for each of the 4 steps; got shape \(3,\)",
    ),
    "PerStep scalar": (lambda: sample(args={"s": aj.PerStep(jnp.ones(()))}), ValueError, r"one value for each of the 4 steps; got shape \(\)"),
    # the grid
    "grid increasing": (lambda: sample(grid=GRID[::-1]), ValueError, r"must decrease strictly, from noise to data; ts\[0\] = 0.2 is followed by"),
    "grid with equal times": (lambda: sample(grid=[0.5, 0.4, 0.4, 0.2]), ValueError, r"must decrease strictly.*ts\[1\] = 0.4 is followed by 0.4"),
    "grid with NaN": (lambda: sample(grid=[0.5, np.nan, 0.2]), ValueError, r"must decrease strictly"),
    "grid above the range": (lambda: sample(grid=[1.5, 0.5]), ValueError, r"runs from 1.5 to 0.5, but VPLinear is defined for t in \[0, 1\]: choose"),
    "grid below the range": (
        lambda: sample(grid=[0.5, -0.2]),
        ValueError,
        r"runs from 0.5 to -0.2, but VPLinear is defined for t in \[0, 1\]: choose",
    ),
    "grid scalar": (lambda: sample(grid=0.5), ValueError, r"vector of at least two times; got shape \(\)"),
    "grid of one time": (lambda: sample(grid=[0.5]), ValueError, r"vector of at least two times; got shape \(1,\)"),
    "grid of two axes": (lambda: sample(grid=GRID[:, None]), ValueError, r"vector of at least two times; got shape \(5, 1\)"),
    "traced grid scalar": (lambda: jax.jit(lambda grid: sample(grid=grid))(0.5), ValueError, r"vector of at least two times; got shape \(\)"),
    "infinite weight at the start": (
        lambda: sample(of=EDGE, grid=[1.0, 0.5, 0.2], solver=aj.DDIM()),
        ValueError,
        r"DDIM with prediction 'eps' is not defined on step 0 of this grid, t = 1 -> 0.5 .*alpha = 0 needs",
    ),
    "grid without steps": (lambda: aj.grids.uniform(PROCESS, 0), ValueError, r"whole number of steps, at least 1; got 0"),
    "grid to infinite lam": (lambda: aj.grids.log_snr(aj.FlowMatching(), 4), ValueError, r"infinite at t = 1 or t = 0.*give a t_start"),
    # solvers
    "no solver": (lambda: sample(solver="euler"), TypeError, r"solver must be a solver of aj.solvers or an explicit diffrax solver; got str"),
    "implicit solver": (lambda: sample(solver=diffrax.Kvaerno3()), TypeError, r"takes .*an explicit Runge-Kutta.*got Kvaerno3"),
    "implicit solver wrapped": (lambda: aj.ExponentialRK(diffrax.ImplicitEuler()), TypeError, r"such as diffrax.Heun\(\); got ImplicitEuler"),
    "DEIS order 0": (lambda: aj.DEIS(order=0), ValueError, r"DEIS has orders 1 to 4; got order=0"),
    "DEIS order 5": (lambda: aj.DEIS(order=5), ValueError, r"DEIS has orders 1 to 4; got order=5"),
    "DPMSolverPP order 4": (lambda: aj.DPMSolverPP(order=4), ValueError, r"DPMSolverPP has orders 1 to 3; got order=4"),
    "Exponential order 2.5": (lambda: aj.Exponential(order=2.5), ValueError, r"Exponential has orders 1 to 4; got order=2.5"),
    "DEIS variable": (lambda: aj.DEIS(variable="sigma"), ValueError, r"variable='sigma' is not known: use one of lam, rho, t, theta"),
    "theta without width": (lambda: aj.DEIS(variable="theta"), ValueError, r"one finite sigma_data: use 'rho' or 'lam'"),
    "DDIM eta": (lambda: aj.DDIM(eta=1.5), ValueError, r"DDIM's eta is a share of the noise, from 0 to 1; got 1.5"),
    "no noise": (lambda: sample(solver=aj.DDIM(1.0)), ValueError, r"DDIM draws noise: give either key or noise, not neither"),
    "two noises": (
        lambda: sample(solver=aj.DDIM(1.0), key=jax.random.key(0), noise=jnp.ones((4, 1, 3))),
        ValueError,
        r"DDIM draws noise: give either key or noise, not both",
    ),
    "shape of noise": (
        lambda: sample(solver=aj.DDIM(1.0), noise=jnp.ones((3, 1, 3))),
        ValueError,
        r"noise for DDIM on 4 steps is an array of floats of shape \(4, 1, 3\); got float64 of shape \(3, 1, 3\)",
    ),
    "noise in diffeqsolve": (
        lambda: diffrax.diffeqsolve(
            TERM, aj.DDIM(1.0), GRID[0], GRID[-1], None, X, stepsize_controller=diffrax.StepTo(GRID), adjoint=diffrax.DirectAdjoint()
        ),
        ValueError,
        r"DDIM draws noise, which only aj.sample gives it",
    ),
    "churn and AdjointDEIS": (
        lambda: gradient(solver=aj.solvers.Churn(aj.DDIM(), 0.3), key=jax.random.key(0), adjoint=aj.AdjointDEIS()),
        ValueError,
        r"follows the ODE, or an SDE of one stochasticity tau, and Churn here has no such SDE: use DiscreteAdjoint",
    ),
    "keep of AdjointDEIS": (lambda: aj.AdjointDEIS(keep=3), ValueError, r"keep=3: AdjointDEIS keeps the linearisations of all its nodes or of none"),
    "kept linearisations of several stages": (
        lambda: gradient(solver=aj.EDMHeun(), adjoint=aj.AdjointDEIS(keep=True)),
        ValueError,
        r"AdjointDEIS\(keep=True\) takes solvers that read the network once a step, at x; ExponentialRK does not: use DiscreteAdjoint",
    ),
    "tau by step and AdjointDEIS": (
        lambda: gradient(solver=aj.solvers.SASolver(tau=(1.0, 0.5, 0.0, 1.0)), key=jax.random.key(0), adjoint=aj.AdjointDEIS()),
        ValueError,
        r"an SDE of one stochasticity tau, and SASolver here has no such SDE: use DiscreteAdjoint",
    ),
    "noise and AdjointDPM": (
        lambda: gradient(solver=aj.DDIM(1.0), key=jax.random.key(0), adjoint=aj.AdjointDPM()),
        ValueError,
        r"AdjointDPM follows the ODE, and DDIM draws noise: use AdjointDEIS, or DiscreteAdjoint",
    ),
    "negative tau": (lambda: aj.Exponential(tau=-1.0), ValueError, r"tau is a number, at least 0; got -1.0"),
    "solver_type": (lambda: aj.DPMSolverPP(solver_type="euler"), ValueError, r"solver_type='euler' is not known: use 'midpoint' or 'heun'"),
    "variant": (lambda: aj.UniPC(variant="bh3"), ValueError, r"variant='bh3' is not known: use one of bh1, bh2, exact, vary_coeff"),
    "published DEIS": (lambda: aj.DEIS(3, "lam", published=True), ValueError, r"published=True is not known for variable='lam': use True for 't'"),
    "published iPNDM_v": (lambda: aj.DEIS(4, "rho", published="ipndm_v"), ValueError, r"DEIS has orders 1 to 3; got order=4"),
    "published SDE": (
        lambda: aj.SDEDPMSolverPP(3, solver_type="heun", published="diffusers"),
        ValueError,
        r"published='diffusers' is not known for solver_type='heun'",
    ),
    "denoise": (lambda: aj.solvers.SASolver(3, 0, denoise=True), ValueError, r"denoise=True is about the corrected state: it needs a corrector"),
    "stages": (lambda: aj.solvers.ExponentialStages(3, nodes=(0.5, 1.1)), ValueError, r"2 numbers that increase within \(0, 1\]; got \(0.5, 1.1\)"),
    "orders": (lambda: sample(solver=aj.DEIS(lower_order_final=(1, 2))), ValueError, r"One order a step: got 2 orders for 4 steps"),
    "negative sigma_data": (lambda: aj.Exponential(sigma_data=-1.0), ValueError, r"sigma_data must be 0, infinity, a positive number.*got -1.0"),
    "sigma_data NaN": (lambda: aj.ExponentialRK(diffrax.Heun(), np.nan), ValueError, r"sigma_data must be 0, infinity, a positive number.*got nan"),
    "sigma_data array with 0": (lambda: aj.Exponential(sigma_data=np.array([0.0, 1.0])), ValueError, r"array of finite positive numbers; got array"),
    # adjoints
    "adjoint of diffrax": (lambda: sample(adjoint=diffrax.BacksolveAdjoint()), TypeError, r"got BacksolveAdjoint: use it in diffrax.diffeqsolve\("),
    "checkpoints of diffrax": (
        lambda: sample(adjoint=diffrax.RecursiveCheckpointAdjoint()),
        TypeError,
        r"got RecursiveCheckpointAdjoint: use it in diffrax",
    ),
    "no adjoint": (lambda: sample(adjoint="exact"), TypeError, r"takes the adjoints of aj.adjoints; got str"),
    "keep": (lambda: aj.DiscreteAdjoint(keep=-1), ValueError, r'keep=-1\): keep is a number of steps, at least 0, or "all"'),
    "remat": (lambda: aj.DiscreteAdjoint(remat="some"), ValueError, 'remat is "none", "block", or "full"'),
    "remat_full": (lambda: aj.DiscreteAdjoint(2, remat="full"), ValueError, "needs keep=0"),
    "states": (lambda: aj.DiscreteAdjoint(states="disk"), ValueError, 'states is "device", "host" or "multilevel"'),
    "levels": (lambda: aj.DiscreteAdjoint(states="multilevel", levels=1), ValueError, "levels is at least 2"),
    "clip": (lambda: aj.DiscreteAdjoint(clip=0.0), ValueError, "a positive norm, or None"),
    "adjoint order": (lambda: aj.AdjointDEIS(order=5), ValueError, r"orders 1 to 4, and 1 or 2 where published=True; got order=5"),
    "published order": (lambda: aj.AdjointDEIS(order=3, sigma_data=np.inf, published=True), ValueError, r"1 or 2 where published=True; got order=3"),
    "mode": (lambda: aj.AdjointDEIS(mode="PECECE"), ValueError, r"mode='PECECE' is not known: use \"PECE\", \"PEC\", \"AB\" or \"Heun\""),
    "integral_order": (lambda: aj.AdjointDEIS(integral_order=0), ValueError, r"orders 1 to 4.*got order=3, integral_order=0"),
    "published integrals": (
        lambda: aj.AdjointDEIS(2, np.inf, published=True, integral_order=3),
        ValueError,
        r"published=True; got.*integral_order=3",
    ),
    "Heun's order": (lambda: aj.AdjointDEIS(mode="Heun"), ValueError, r'mode="Heun" is of order 2: give order=2; got order=3'),
    "published weights": (lambda: aj.AdjointDEIS(2, np.inf, published="2M"), ValueError, r"published='2M' is not known: use True or \"exact\""),
    "per-step leaves and AdjointDPM": (
        lambda: jax.grad(lambda v: jnp.sum(sample(of=term(lambda x, t, args: x * args), args=aj.PerStep(v), adjoint=aj.AdjointDPM())))(jnp.ones(4)),
        ValueError,
        r"AdjointDPM gives no gradient in the grid, the process or per-step leaves: use DiscreteAdjoint",
    ),
    "published with a frame": (
        lambda: aj.AdjointDEIS(order=2, sigma_data=1.0, published=True),
        ValueError,
        r"sigma_data=inf and no corrector: give sigma_data",
    ),
    "published PEC": (
        lambda: aj.AdjointDEIS(order=2, sigma_data=np.inf, mode="PEC", published=True),
        ValueError,
        r"no corrector.*leave mode out",
    ),
    "adjoint sigma_data": (lambda: aj.AdjointDEIS(sigma_data=-0.5), ValueError, r"sigma_data must be 0, infinity, a positive number.*got -0.5"),
    "more nodes than steps": (
        lambda: gradient(adjoint=aj.AdjointDEIS(steps=5)),
        ValueError,
        r"steps=5\).*the sampler's 4 intervals: choose steps between 1 and 4",
    ),
    "ReversibleAdjoint's solver": (
        lambda: sample(adjoint=aj.ReversibleAdjoint()),
        ValueError,
        r"undoes the steps of BDIA, BELM, EDICT or Rex, and DPMSolverPP's cannot be: use DiscreteAdjoint",
    ),
    "ReversibleAdjoint's segments": (lambda: aj.ReversibleAdjoint(0), ValueError, r"segments are a number of stretches, at least 1; got 0"),
    "ReversibleAdjoint's inverse": (
        lambda: aj.sample(
            aj.DiffusionTerm(network, aj.FlowMatching(), "v"),
            X,
            grid=np.linspace(0.9, 0.0, 5),
            solver=aj.solvers.EDICT(sigma_data=0.0),
            adjoint=aj.ReversibleAdjoint(),
        ),
        ValueError,
        r"is not defined on step 0 of this grid, t = 0 -> 0.225",
    ),
    "AdjointDPM's solver": (lambda: aj.AdjointDPM(diffrax.Kvaerno3()), TypeError, r"takes an explicit Runge-Kutta solver.*got Kvaerno3"),
    "AdjointDPM's states": (lambda: aj.AdjointDPM(states="kept"), ValueError, r"states='kept' is not known: use \"stored\" or \"resolved\""),
    "AdjointDPM's nodes": (lambda: gradient(adjoint=aj.AdjointDPM(steps=5)), ValueError, r"AdjointDPM\(steps=5\).*choose steps between 1 and 4"),
    "AdjointDPM on a trajectory": (
        lambda: jax.grad(lambda x: jnp.sum(sample(x, adjoint=aj.AdjointDPM(), save=True).xs))(X),
        ValueError,
        r"AdjointDPM differentiates the final state only",
    ),
    "LastK's k": (lambda: aj.LastK(0), ValueError, r"LastK's k is a number, at least 1; got 0"),
    "LowVariance on a trajectory": (
        lambda: sample(adjoint=aj.adjoints.LowVariance(jax.random.key(0)), save=True),
        ValueError,
        r"LowVariance differentiates a sample alone: use LastK\(1\)",
    ),
    "look_ahead's steps": (
        lambda: aj.adjoints.look_ahead(jnp.sum, TERM, X, GRID[1], grid=GRID, steps=4),
        ValueError,
        r"takes from 1 to 3 steps, as many as the grid has below t = 0.4.*; got 4",
    ),
    "look_ahead's grid": (
        lambda: jax.jit(lambda t: aj.adjoints.look_ahead(jnp.sum, TERM, X, t, grid=GRID, steps=1))(0.4),
        ValueError,
        r"chooses its times on the host: give t and grid as numbers",
    ),
    "no nodes": (lambda: gradient(adjoint=aj.AdjointDEIS(steps=0)), ValueError, r"steps=0\).*choose steps between 1 and 4"),
    "unknown nodes": (
        lambda: gradient(adjoint=aj.AdjointDEIS(steps=2, nodes="rho")),
        ValueError,
        r"nodes='rho' is not known: use \"lam\", \"t\", \"index\"",
    ),
    "nodes outside": (lambda: gradient(adjoint=aj.AdjointDEIS(nodes=(0, 7))), ValueError, r"indices of the grid, integers from 0 to 4; got \(0, 7\)"),
    "nodes in lam of a traced grid": (
        lambda: traced(adjoint=aj.AdjointDEIS(steps=2)),
        ValueError,
        r"nodes=\"lam\"\) measures the grid.*traced here.*use nodes=\"index\"",
    ),
    "forward mode of an adjoint": (lambda: jax.jvp(sample, (X,), (X,)), TypeError, r"has no forward mode.*use adjoint=aj.DirectAdjoint\(\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case):
    act, error, says = CASES[case]
    with pytest.raises(error, match=says) as caught:
        act()
    sentence = str(caught.value).split("\n-----")[0]  # JAX adds a note of its own below
    assert "\n" not in sentence
    assert sentence.endswith((".", ")"))


def bad_from(time, value):
    """A network whose answer turns bad at t <= time."""
    return aj.DiffusionTerm(lambda x, t, args: jnp.where(jnp.asarray(t) <= time, value, 1.0) * jnp.tanh(x), PROCESS)


@pytest.mark.parametrize("solver", [aj.DPMSolverPP(order=2), aj.DEIS(order=3), aj.ExponentialRK(diffrax.Euler())], ids=["2M", "DEIS3", "Euler"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_the_step_at_which_a_state_is_not_finite_is_named(step, value, solver):
    says = rf"not finite after step {step} of 4 \(t = {GRID[step]:g}\): the network's output.* is NaN.*Check its weights"
    with pytest.raises(FloatingPointError, match=says):
        sample(of=bad_from(GRID[step] + 1e-9, value), solver=solver)


def test_bad_states_elsewhere():
    with pytest.raises(FloatingPointError, match="x_T holds NaN or infinity: start from finite numbers"):
        sample(X * jnp.nan)
    with pytest.raises(FloatingPointError, match="not finite after step 1 of 4"):
        sample(of=bad_from(GRID[1] + 1e-9, jnp.nan), save=True)
    with pytest.raises(FloatingPointError, match="not finite after step"):
        aj.invert(bad_from(GRID[2] + 1e-9, jnp.nan), X, grid=GRID, solver=aj.DDIM())
    assert jnp.isnan(jax.jit(partial(sample, of=bad_from(GRID[2] + 1e-9, jnp.nan)))(X)).all()


@pytest.mark.parametrize("order", [1, 2])
def test_the_published_adjoint_warns_where_it_is_unstable(order):
    adjoint = aj.AdjointDEIS(order=order, sigma_data=np.inf, published=True)
    coarse = aj.grids.log_snr(PROCESS, 2, t_start=0.9, t_end=0.1)
    with pytest.warns(UserWarning, match=rf"order {order} is unstable for steps in lam above 0\.\d+; the longest here is \d"):
        gradient(adjoint=adjoint, grid=coarse)
