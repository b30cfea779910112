"""The plan: its bytes are those of the compiled gradient, and it names the cheapest exact adjoint that fits."""

import jax
import jax.numpy as jnp
import pytest

import adjoint_jax as aj

PROCESS = aj.VPLinear()


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolutional(x, t, args):
    h = jax.nn.silu(convolve(x, args["in"]) + jnp.sin(jnp.asarray(t, x.dtype)))
    return convolve(h + jax.nn.silu(convolve(h, args["mid"])), args["out"])


def problem(solver, wrt, steps, budget, network=convolutional, **more):
    shapes = {"in": (3, 3, 3, 8), "mid": (3, 3, 8, 8), "out": (3, 3, 8, 3)} if network is convolutional else {"w": (16, 16)}
    args = {name: jnp.full(shape, 0.1, jnp.float32) for name, shape in shapes.items()}
    x = jnp.ones((2, 16, 16, 3) if network is convolutional else (8, 16), jnp.float32)
    grid, term = aj.grids.log_snr(PROCESS, steps, t_start=0.8, t_end=0.1), aj.DiffusionTerm(network, PROCESS)
    return aj.plan(term, x, args, grid=grid, solver=solver, budget_bytes=budget, wrt=wrt, **more), (term, x, args, grid)


@pytest.mark.parametrize(
    ("solver", "wrt"),
    [(aj.DPMSolverPP(3), ("x_T",)), (aj.EDMHeun(), ("x_T", "args")), (aj.solvers.BELM(), ("x_T",))],
    ids=["x_T", "both", "pair"],
)
def test_bytes_are_those_of_the_compiled_gradient(solver, wrt):
    """Within 10 % for all, at half of the nodes where there are several."""
    plan, (term, x, args, grid) = problem(solver, wrt, 20, 1_000_000)
    assert any("Reversible" in row.name for row in plan) == (solver == aj.solvers.BELM())
    names = {row.name.split("(")[0] for row in plan if not row.exact}
    assert (
        names
        == {
            aj.DPMSolverPP(3): {"InterpolatedAdjoint", "AdjointDEIS", "AdjointDPM"},
            aj.EDMHeun(): {"AdjointDEIS", "AdjointDPM", "LastK"},
            aj.solvers.BELM(): {"InterpolatedAdjoint"},
        }[solver]
    )
    for row in [row for row in plan if "levels=3" not in row.name and (row.exact or "steps=10" in row.name or "LastK" in row.name)]:
        loss = lambda x, args, row=row: jnp.sum(aj.sample(term, x, args, grid=grid, solver=solver, adjoint=row.adjoint) ** 2)  # noqa: E731
        program = jax.jit(jax.grad(loss, (0, 1) if "args" in wrt else 0)).lower(x, args).compile()
        assert row.bytes == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.1), row.name


def dense(x, t, args):
    return jnp.tanh(x @ args["w"]) + jnp.tanh(2 * x @ args["w"])


def test_the_cheapest_exact_one_that_fits():
    """A budget for all linearisations, for some, for the states, for fewer states, for none; costs in units of 2N F + N B."""
    rich, _ = problem(None, ("x_T",), 64, 10**9, dense)
    rows = {row.name: row for row in rich}
    assert rich.best is rows['keep="all"'].adjoint
    assert rows['keep="all"'].cost == pytest.approx(2 / 3)
    assert rows["keep=0"].cost == 1
    assert rows['states="multilevel", levels=2'].cost == pytest.approx(4 / 3)
    assert all(row.fits for row in rich)
    some, _ = problem(None, ("x_T",), 64, (rows["keep=0"].bytes + rows['keep="all"'].bytes) // 2, dense)
    assert 0 < some.best.keep < 64
    assert max(row.cost for row in some if row.adjoint is some.best) < 1
    few, _ = problem(None, ("x_T",), 64, rows["keep=0"].bytes - 1, dense)
    assert (few.best.states, few.best.levels) == ("multilevel", 2)
    none, _ = problem(None, ("x_T",), 64, 1, dense)
    assert none.best is None
    assert not any(row.fits for row in none)
    assert "remat" in str(none)
    assert "chosen" in str(rich)


def test_stochastic_solvers_per_step_leaves_and_errors():
    key = jax.random.key(0)
    plan, _ = problem(aj.SDEDPMSolverPP(), ("x_T",), 8, 10**9, dense, key=key)
    assert {row.name.split("(")[0] for row in plan if not row.exact} == {"InterpolatedAdjoint", "AdjointDEIS"}
    args = {"w": aj.PerStep(jnp.ones((5, 16, 16), jnp.float32))}
    grid, term = aj.grids.log_snr(PROCESS, 5, t_start=0.8, t_end=0.1), aj.DiffusionTerm(dense, PROCESS)
    assert aj.plan(term, jnp.ones((8, 16), jnp.float32), args, grid=grid, budget_bytes=10**9, wrt=("x_T",)).best.keep == "all"
    with pytest.raises(ValueError, match="budget_bytes=0: a positive number of bytes"):
        problem(None, ("x_T",), 8, 0, dense)
    with pytest.raises(ValueError, match=r"names no float input; there are x_T, args\['w'\]"):
        problem(None, ("cond",), 8, 1, dense)


@pytest.mark.parametrize(("solver", "tol"), [(aj.solvers.EDICT(), 1e-4), (aj.BDIA(), 1e-5)], ids=["EDICT", "BDIA"])
def test_the_plan_counts_segments(solver, tol):
    """As many as the drift allows, with their bytes; no row where none are enough."""
    plan, (term, x, args, grid) = problem(solver, ("x_T",), 40, 10**9, tol=tol)
    (row,) = (row for row in plan if "Reversible" in row.name)
    needed = aj.adjoints.segments_needed(term, x, args, grid=grid, solver=solver, tol=tol)
    assert (row.adjoint.segments, row.adjoint.tol) == (needed, tol)
    assert needed > 1
    loss = lambda x: jnp.sum(aj.sample(term, x, args, grid=grid, solver=solver, adjoint=row.adjoint) ** 2)  # noqa: E731
    program = jax.jit(jax.grad(loss)).lower(x).compile()
    assert row.bytes == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.1)


def test_a_drift_that_no_segments_keep():
    assert not any("Reversible" in row.name for row in problem(aj.solvers.EDICT(), ("x_T",), 40, 10**9, tol=1e-12)[0])
    with pytest.raises(ValueError, match=r"tol=0.*positive"):
        problem(aj.BDIA(), ("x_T",), 8, 10**9, tol=0.0)
    with pytest.raises(ValueError, match="tol is the drift of an exactly invertible solver, and DDIM is none"):
        problem(aj.DDIM(), ("x_T",), 8, 10**9, tol=0.1)


def test_a_network_without_weights():
    """Shapes in place of arrays give the same plan; a tol would have to run it."""
    plan, (term, x, args, grid) = problem(aj.BDIA(), ("x_T", "args"), 12, 10**9, dense)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, args))
    options = {"grid": grid, "solver": aj.BDIA(), "budget_bytes": 10**9, "wrt": ("x_T", "args")}
    assert str(aj.plan(term, *shapes, **options)) == str(plan)
    with pytest.raises(ValueError, match="tol runs the sampler"):
        aj.plan(term, *shapes, **options, tol=1e-4)
