"""The audit: errors against the exact gradient or against differences, costs, and the warnings of adjoints beyond their limits."""

import counting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax._work import flops

PROCESS = aj.VPLinear()
GRID = aj.grids.log_snr(PROCESS, 6, t_start=0.6, t_end=0.05)
X = jax.random.normal(jax.random.key(0), (4, 3))
ARGS = {"w": jax.random.normal(jax.random.key(1), (3, 3)), "cond": jnp.ones((4, 3)), "label": jnp.arange(4)}
TERM = aj.DiffusionTerm(lambda x, t, args: jnp.tanh(x @ args["w"] + args["cond"]), PROCESS)


def loss(x):
    return jnp.sum(jnp.sin(x))


def audited(adjoints, **more):
    return aj.audit(loss, TERM, X, ARGS, **{"grid": GRID, **more}, adjoints=adjoints)


def test_rows_costs_and_notes(tmp_path):
    published = aj.AdjointDEIS(order=2, sigma_data=np.inf, published=True)
    with pytest.warns(UserWarning, match="unstable for steps in lam above 0.46"):
        table = audited({"direct": aj.DirectAdjoint(), "exact": aj.DiscreteAdjoint(), "2M": published})
    assert [(r.adjoint, r.wrt) for r in table[:3]] == [("direct", "x_T"), ("direct", "args['cond']"), ("direct", "args['w']")]
    direct, exact, deis = table[0], table[3], table[6]
    assert max(r.relative_error for r in table[:6]) < 1e-12
    assert direct.growth == pytest.approx(exact.growth, rel=1e-12)
    assert exact.growth ** len(GRID[1:]) == pytest.approx(table.norms[0] / table.norms[-1], rel=1e-12)
    assert exact.flops - direct.flops == 6 * 2 * 4 * 3 * 3  # the recomputation
    assert min(r.bytes for r in table) > 0
    assert min(r.seconds for r in table) > 0
    assert deis.relative_error > 0.01
    assert "unstable for steps in lam above 0.46" in table.notes["2M"]
    assert list(table.notes) == ["2M"]
    text = str(table)
    assert "\n\n2M: The published AdjointDEIS" in text
    assert "Exact gradient: |dL/dx_i| grows by" in text
    table.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"


def test_differences_as_the_reference():
    table = audited({"exact": aj.DiscreteAdjoint(), "deis": aj.AdjointDEIS(steps=2)}, reference="differences")
    assert max(r.relative_error for r in table[:3]) < 1e-7
    true = audited({"deis": aj.AdjointDEIS(steps=2)})
    for found, known in zip(table[3:], true, strict=True):
        assert found.relative_error == pytest.approx(known.relative_error, rel=1)
    assert table.norms is None
    assert "Exact" not in str(table)


def test_stochastic_solvers_and_errors():
    table = audited({"exact": aj.DiscreteAdjoint(keep="all")}, solver=aj.SDEDPMSolverPP(), key=jax.random.key(0), wrt=("args['w']",))
    assert [r.wrt for r in table] == ["args['w']"]
    assert table[0].relative_error < 1e-12
    with pytest.raises(ValueError, match=r"names no float input; there are x_T, args\['cond'\], args\['w'\]"):
        audited({}, wrt=("args['label']",))
    with pytest.raises(ValueError, match='use "exact" or "differences"'):
        audited({}, reference="autodiff")


def test_flops_of_the_trace_are_those_of_the_compiled_program():
    """Products, nested loops, dead code; a convolution by hand."""

    def program(x):
        gradient = jax.grad(lambda x: loss(aj.sample(TERM, x, ARGS, grid=GRID, adjoint=aj.DiscreteAdjoint(states="multilevel"))))
        return gradient(x)

    assert flops(program, X) == counting.matmul_flops(jax.jit(program).lower(X).compile())
    assert flops(lambda x: (x @ x.T, x)[1], X) == 0
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    assert flops(convolve, image, kernel) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
