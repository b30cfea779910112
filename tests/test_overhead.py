"""What a solver costs beside its network: arithmetic per number of the state, state-sized buffers, traces. Read from compiled programs.

`cost_analysis` counts a loop's body once, so a program of any number of steps shows one step; what stands outside of the loop is counted too.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj

S = aj.solvers
PROCESS = aj.VPLinear()
UNET = 1.92e6
"""Flops per number of the state of the UNet at 64 x 64 x 3 with 63.2 million weights (block_out_channels (64, 128, 256, 512), attention in the
last two, two layers a block): 23.6 GFLOP in matrix products and convolutions, counted from its jaxpr."""
STEPS, N = 6, 1 << 20


def statistics():
    lam = np.linspace(-8, 8, 33)
    return S.ModelStatistics(lam, *(part * np.ones((33, 1)) for part in (0.7, -0.2, 0.1)))


SOLVERS = {
    "DDIM": aj.DDIM(),
    "DDIM(1)": aj.DDIM(1.0),
    "DEIS(4)": aj.DEIS(4),
    "DPMSolver(3)": aj.DPMSolver(3),
    "DPMSolverPP(2)": aj.DPMSolverPP(2),
    "DPMSolverPP(3)": aj.DPMSolverPP(3),
    "UniPC(3)": aj.UniPC(3),
    "SASolver(3, 4)": S.SASolver(),
    "ExponentialStages(3)": S.ExponentialStages(3),
    "ExponentialStages(3, SDE)": S.ExponentialStages(3, tau=1.0),
    "ExponentialRK(Heun)": aj.EDMHeun(),
    "ExponentialRK(Dopri5)": aj.ExponentialRK(diffrax.Dopri5()),
    "SDEDPMSolver(2)": S.SDEDPMSolver(2),
    "SDEDPMSolverPP(3)": aj.SDEDPMSolverPP(3),
    "PNDM": S.PNDM(4, "heun"),
    "IPNDM": S.IPNDM(),
    "BDIA": aj.BDIA(),
    "BELM": S.BELM(),
    "EDICT": S.EDICT(),
    "Rex": aj.Rex(),
    "Rex(SDE)": aj.Rex(tau=1.0),
    "Churn": aj.EDMHeun(0.2),
    "Ancestral": S.Ancestral(S.ExponentialStages(2)),
    "DPMSolverPPSDE": S.DPMSolverPPSDE(),
    "DPMSolverV3": S.DPMSolverV3(statistics()),
    "DCSolver": S.DCSolver(np.ones(STEPS), 3, 2),
    "GMS": S.GMS(),
}


def network(x, t, args):
    return x * args["scale"]


def grid(steps):
    return aj.grids.log_snr(PROCESS, steps, t_start=0.8, t_end=0.1)


def sampler(solver, steps=STEPS, seen=None):
    """The jitted sample of (x, args, key), and its program for a state of N numbers; `seen` counts the network's traces."""

    def counted(x, t, args):
        if seen is not None:
            seen.append(1)
        return network(x, t, args)

    @jax.jit
    def run(x, args, key):
        return aj.sample(aj.DiffusionTerm(counted, PROCESS), x, args, grid=grid(steps), solver=solver, key=key if solver.draws else None)

    shapes = (jax.ShapeDtypeStruct((N,), jnp.float32), {"scale": jax.ShapeDtypeStruct((), jnp.float32)})
    return run, run.lower(*shapes, jax.random.key(0)).compile()


def states(program):
    return program.memory_analysis().temp_size_in_bytes / (4 * N)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_costs_next_to_nothing_beside_its_network(name):
    """Flops below 0.1 % of one evaluation of the UNet (the target is 1 %): two for each term of a sum, and 90 for a draw.

    Temporaries: two states for each register, which the loop holds before and after its shift, six for each draw, which are the generator's
    own on the CPU, and at most three more. The network is traced by the first call alone.
    """
    solver, traces = SOLVERS[name], []
    run, program = sampler(solver, seen=traces)
    registers, draws = len(solver.pattern.registers) if isinstance(solver, S.AbstractLinear) else 0, solver.draws
    assert program.cost_analysis()["flops"] / N < 1e-3 * UNET
    assert states(program) <= 2 * registers + 6 * draws + 3.01
    small = jnp.ones(8, jnp.float32)
    run(small, {"scale": jnp.float32(0.5)}, jax.random.key(0))
    before = len(traces)
    run(2 * small, {"scale": jnp.float32(0.7)}, jax.random.key(1))
    assert len(traces) == before > 0


@pytest.mark.parametrize("name", ["DEIS(4)", "UniPC(3)", "ExponentialRK(Heun)", "SDEDPMSolverPP(3)", "Rex(SDE)", "GMS"])
def test_a_sample_takes_no_memory_for_its_steps(name):
    """Draws by key are made when they are needed."""
    few, many = (states(sampler(SOLVERS[name], steps)[1]) for steps in (STEPS, 8 * STEPS))
    assert abs(many - few) < 0.01


def test_one_step_is_what_is_counted():
    """Twice the steps is the same count, within the table; a body counted once."""
    few, many = (sampler(SOLVERS["DEIS(4)"], steps)[1].cost_analysis()["flops"] / N for steps in (STEPS, 2 * STEPS))
    assert few > 0
    assert abs(many - few) < 0.01
