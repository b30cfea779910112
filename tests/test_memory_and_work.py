"""Memory and work, read from compiled programs: one state a step, and no matrix product that the gradient asked for does not need."""

from functools import cache

import counting
import diffrax
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj

PROCESS = aj.VPLinear()
SOLVERS = {
    "DDIM": aj.DDIM(),
    "DEIS4": aj.DEIS(order=4),
    "DEIS3_lam": aj.DEIS(order=3, variable="lam"),
    "DPMSolverPP2": aj.DPMSolverPP(order=2),
    "DPMSolverPP3": aj.DPMSolverPP(order=3),
    "Exponential4": aj.Exponential(order=4, sigma_data=0.5),
    "RK_Heun": aj.ExponentialRK(diffrax.Heun()),
    "RK_Tsit5": aj.ExponentialRK(diffrax.Tsit5(), sigma_data=1.0),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # the programs are read, not run
ROWS, STATE, HIDDEN = 4, 2048, 8
WIDTH, INNER = 16, 32


def network(x, t, args):
    """x @ a -> tanh -> @ b -> tanh: forward, backward in x and backward in the parameters take two matrix products each."""
    del t
    return jnp.tanh(jnp.tanh(x @ args["a"]) @ args["b"])


TERM = aj.DiffusionTerm(network, PROCESS)


def grid(steps):
    return aj.grids.log_snr(PROCESS, steps, t_start=0.8, t_end=0.1)


def compiled(steps, solver, adjoint, wrt, width, hidden):
    """The gradient in x_T ("x"), in the parameters ("params"), or in both."""
    shapes = (jax.ShapeDtypeStruct((ROWS, width), jnp.float32), {"a": (width, hidden), "b": (hidden, width)})
    shapes = (shapes[0], {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes[1].items()})

    def loss(x, params):
        return jnp.sum(aj.sample(TERM, x, params, grid=grid(steps), solver=solver, adjoint=adjoint) ** 2)

    wanted = {"x": (0,), "params": (1,), "both": (0, 1)}[wrt]
    return jax.jit(jax.grad(loss, argnums=wanted)).lower(*shapes).compile(compiler_options=QUICK)


def temporary(steps, solver, adjoint):
    """Bytes of temporaries, in states."""
    program = compiled(steps, solver, adjoint, "both", STATE, HIDDEN)
    return program.memory_analysis().temp_size_in_bytes / (ROWS * STATE * 4)


@pytest.mark.parametrize("name", SOLVERS)
def test_discrete_adjoint_stores_one_state_a_step(name):
    adjoint = aj.DiscreteAdjoint()
    growth = (temporary(256, SOLVERS[name], adjoint) - temporary(16, SOLVERS[name], adjoint)) / 240
    assert 0.9 <= growth <= 1.1


@pytest.mark.parametrize("name", ["DPMSolverPP2", "DEIS4", "RK_Heun"])
def test_continuous_adjoint_stores_its_nodes_only(name):
    adjoint = aj.AdjointDEIS(steps=8)
    growth = (temporary(256, SOLVERS[name], adjoint) - temporary(16, SOLVERS[name], adjoint)) / 240
    assert growth <= 0.01  # the table of weights: at most 64 numbers a step beside states of 8192


@pytest.mark.parametrize("end", [0.1, 0.0])
def test_kept_linearisations_are_all_that_a_node_keeps(end):
    """Of a network whose linearisation is eight numbers in 2048, also where the last interval needs its state."""
    term = aj.DiffusionTerm(lambda x, t, args: jnp.tanh(x @ args["a"]) @ args["b"], PROCESS)

    def states(nodes):
        shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("a", (STATE, HIDDEN)), ("b", (HIDDEN, STATE)))}
        ts, adjoint = aj.grids.uniform(PROCESS, 64, t_end=end), aj.AdjointDEIS(steps=nodes, keep=True)
        loss = lambda x, args: jnp.sum(aj.sample(term, x, args, grid=ts, adjoint=adjoint) ** 2)  # noqa: E731
        program = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((ROWS, STATE), jnp.float32), shapes).compile(compiler_options=QUICK)
        return program.memory_analysis().temp_size_in_bytes / (ROWS * STATE * 4)

    assert states(48) - states(8) < 2


def test_continuous_adjoint_memory_grows_by_one_state_a_node():
    small, large = (temporary(64, SOLVERS["DDIM"], aj.AdjointDEIS(steps=steps)) for steps in (8, 56))
    assert 0.9 <= (large - small) / 48 <= 1.1


@pytest.mark.parametrize("name", ["DPMSolverPP2", "RK_Heun"])
def test_plain_autodiff_stores_more(name):
    few, many = (temporary(steps, SOLVERS[name], aj.DirectAdjoint()) for steps in (16, 256))
    assert (many - few) / 240 >= 2


UNIT = 2 * ROWS * WIDTH * INNER
FORWARD = BACKWARD = PARAMS = 2 * UNIT
EVALUATIONS = {"DDIM": 1, "DEIS4": 1, "DPMSolverPP3": 1, "RK_Heun": 2}


@cache
def flops(steps, name, adjoint, wrt):
    return counting.matmul_flops(compiled(steps, SOLVERS[name], adjoint, wrt, WIDTH, INNER))


def test_counter_against_hand_counts():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))

    def loop(a, b, steps):
        return jax.lax.fori_loop(0, steps, lambda _, y: jnp.tanh(y @ b @ b.T), a)

    def nested(a, b):
        return jax.lax.scan(lambda y, _: (loop(y, b, 4), None), a, None, length=6)[0]

    def batched(a, b):
        return jnp.tanh(jnp.einsum("ij,kjl->kil", a, jnp.broadcast_to(b, (2, 5, 7)) * jnp.arange(1.0, 3.0)[:, None, None]))

    def count(function):
        return counting.matmul_flops(jax.jit(function).lower(a, b).compile())

    once = 2 * 3 * 5 * 7
    assert count(lambda a, b: a @ b) == once
    assert count(batched) == 2 * once
    assert [count(lambda a, b, n=n: loop(a, b, n)) for n in (9, 18)] == [18 * once, 36 * once]
    assert count(nested) == 48 * once


def test_counter_refuses_what_it_cannot_count():
    endless = jax.jit(lambda a: jax.lax.while_loop(lambda a: jnp.sum(a) < 9, lambda a: a @ a, a)).lower(jnp.eye(4)).compile()
    with pytest.raises(ValueError, match="no known trip count"):
        counting.matmul_flops(endless)
    solve = jax.jit(jnp.linalg.cholesky).lower(jnp.eye(4)).compile()
    with pytest.raises(ValueError, match="not counted"):
        counting.matmul_flops(solve)


@pytest.mark.parametrize(
    ("name", "wrt", "parameters"),
    [*((name, *wrt) for name in EVALUATIONS for wrt in (("x", 0), ("both", PARAMS))), ("DDIM", "params", PARAMS)],
)
def test_work_of_the_discrete_adjoint(name, wrt, parameters):
    """N forward, then N (forward + backward), the parameters' share where asked for."""
    step = EVALUATIONS[name] * (FORWARD + FORWARD + BACKWARD + parameters)
    assert flops(8, name, aj.DiscreteAdjoint(), wrt) == 8 * step


@pytest.mark.parametrize("adjoint", [aj.DiscreteAdjoint(), aj.AdjointDEIS(mode="AB")], ids=["discrete", "AB"])
def test_twice_the_steps_is_twice_the_work(adjoint):
    assert flops(16, "DDIM", adjoint, "both") == 2 * flops(8, "DDIM", adjoint, "both")


@pytest.mark.parametrize(("wrt", "parameters"), [("x", 0), ("both", PARAMS)])
def test_work_of_plain_autodiff(wrt, parameters):
    assert flops(8, "DDIM", aj.DirectAdjoint(), wrt) == 8 * (FORWARD + BACKWARD + parameters)


CONTINUOUS = {  # adjoint, nodes at which the network is linearised, of which anew, cotangents a node
    "PECE": (aj.AdjointDEIS(order=3), 17, 17, 2),
    "PEC": (aj.AdjointDEIS(order=3, mode="PEC"), 17, 17, 1),
    "AB": (aj.AdjointDEIS(order=2, mode="AB"), 16, 16, 1),
    "PECE_index": (aj.AdjointDEIS(order=2, steps=4, nodes="index"), 5, 5, 2),
    "PECE_lam": (aj.AdjointDEIS(order=2, steps=8), 9, 9, 2),
    "kept": (aj.AdjointDEIS(order=2, steps=8, keep=True), 9, 1, 2),
    "published": (aj.AdjointDEIS(order=1, sigma_data=np.inf, published=True), 16, 16, 1),
}


@pytest.mark.parametrize(
    ("mode", "name", "wrt", "parameters"),
    [
        *((mode, "DDIM", *wrt) for mode in CONTINUOUS for wrt in (("x", 0), ("both", PARAMS))),
        ("PECE", "DDIM", "params", PARAMS),
        ("PECE", "RK_Heun", "both", PARAMS),
    ],
)
def test_work_of_the_continuous_adjoint(mode, name, wrt, parameters):
    """N forward, then a forward a node (kept: at the end alone), one or two backward, and one share of the parameters where asked for."""
    adjoint, nodes, anew, cotangents = CONTINUOUS[mode]
    sampler = 16 * EVALUATIONS[name] * FORWARD
    assert flops(16, name, adjoint, wrt) == sampler + anew * FORWARD + nodes * (cotangents * BACKWARD + parameters)


@pytest.mark.parametrize(("adjoint", "cotangents"), [(aj.DiscreteAdjoint(), 1), (aj.AdjointDEIS(order=2), 2)], ids=["discrete", "PECE"])
def test_the_parameters_share_is_not_even_traced(adjoint, cotangents):
    """What nobody asked for is not left for the compiler to remove: without jit nothing would remove it."""

    def products(jaxpr):
        inner = [sub for equation in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(equation.params)]
        return sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns) + sum(map(products, inner))

    def traced(wanted):
        params = {"a": jnp.ones((WIDTH, INNER)), "b": jnp.ones((INNER, WIDTH))}
        loss = lambda x, params: jnp.sum(aj.sample(TERM, x, params, grid=grid(4), adjoint=adjoint))  # noqa: E731
        return products(jax.make_jaxpr(jax.grad(loss, argnums=wanted))(jnp.ones((ROWS, WIDTH)), params).jaxpr)

    assert traced((0, 1)) - traced((0,)) == 2 * cotangents
