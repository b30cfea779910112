"""Convolutions in order: the same values and derivatives whatever their layout, groups and strides, and one layout in the compiled loops."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj
from adjoint_jax._traced import closed, in_order

STANDARD = {3: "b0f_0io->b0f", 4: "b01f_01io->b01f", 5: "b012f_012io->b012f"}
LAYOUTS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), {}),
    "NCHW": (("NCHW", "OIHW", "NCHW"), {}),
    "mixed": (("HNCW", "IWOH", "CWNH"), {}),
    "grouped": (("NCHW", "OIHW", "NCHW"), {"feature_group_count": 2}),
    "depthwise": (("NCHW", "OIHW", "NCHW"), {"feature_group_count": 4}),
    "strided": (("NCHW", "OIHW", "NHWC"), {"window_strides": (2, 1), "padding": ((1, 1), (0, 2))}),
    "dilated": (("NHWC", "HWIO", "NHWC"), {"lhs_dilation": (1, 2), "rhs_dilation": (2, 1), "padding": ((2, 1), (3, 0))}),
    "batched": (("NCHW", "OIHW", "NCHW"), {"batch_group_count": 2}),
    "line": (("NCW", "OIW", "NCW"), {"window_strides": (1,)}),
    "volume": (("NCDHW", "OIDHW", "NCDHW"), {"window_strides": (1, 1, 1)}),
}


def given(spec, params):
    """x and w with 4 channels in and 6 out (8 where grouped), windows of 3."""
    groups = params.get("feature_group_count", 1)
    sizes = dict(zip("NCDHW", (2, 4, 3, 5, 6), strict=True))
    kernel = {"O": 6 if groups == 1 else 8, "I": 4 // groups, "D": 3, "H": 3, "W": 3}
    shapes = [sizes[axis] for axis in spec[0]], [kernel[axis] for axis in spec[1]]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def convolution(spec, params, x, w):
    params = {"window_strides": (1, 1), "padding": "SAME", **params}
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=spec, **params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_transposes_are_the_same_in_any_layout(layout):
    spec, params = LAYOUTS[layout]
    x, w = given(spec, params)
    convolve = partial(convolution, spec, params)
    plain, transpose = jax.vjp(convolve, x, w)
    np.testing.assert_allclose(closed(convolve, x, w)(x, w), plain, rtol=1e-12, atol=1e-12)
    for found, asked in zip(in_order(transpose)(plain), transpose(plain), strict=True):
        np.testing.assert_allclose(found, asked, rtol=1e-12, atol=1e-11)


def network(spec, x, t, args):
    return jnp.tanh(convolution(spec, {}, x, args["w"])) + args["bias"] * jnp.asarray(t, x.dtype)


def objective(spec, adjoint, x, args):
    term = aj.DiffusionTerm(partial(network, spec), aj.VPLinear())
    solver = aj.BDIA() if isinstance(adjoint, aj.ReversibleAdjoint) else None
    return jnp.sum(aj.sample(term, x, args, grid=aj.grids.log_snr(term.process, 4), solver=solver, adjoint=adjoint) ** 2)


ADJOINTS = {
    "discrete": aj.DiscreteAdjoint(),
    "blocks": aj.DiscreteAdjoint(keep=2, remat="block"),
    "kept": aj.AdjointDEIS(steps=2, keep=True),
    "stored": aj.AdjointDEIS(steps=2),
    "DPM": aj.AdjointDPM(),
    "interpolated": aj.adjoints.InterpolatedAdjoint(steps=2),
    "reversible": aj.ReversibleAdjoint(),
    "last": aj.LastK(2),
}


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("spec", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")], ids=str)
def test_every_convolution_of_a_gradient_compiles_in_one_layout(adjoint, spec):
    sizes, kernel = {"N": 2, "C": 4, "H": 5, "W": 6}, {"O": 4, "I": 4, "H": 3, "W": 3}
    x, w = jnp.ones([sizes[axis] for axis in spec[0]]), jnp.ones([kernel[axis] for axis in spec[1]])
    args = {"w": w, "bias": jnp.ones(())}
    assert layouts(jax.grad(partial(objective, spec, ADJOINTS[adjoint]), (0, 1)), x, args) == {STANDARD[4]}


def layouts(function, *args):
    """Of all convolutions in the compiled program."""
    return set(re.findall(r"dim_labels=(\S+?)[,}\s]", jax.jit(function).lower(*args).compile().as_text()))


TERM = aj.DiffusionTerm(partial(network, ("NCHW", "OIHW", "NCHW")), aj.VPLinear())
GRID, KEY = aj.grids.log_snr(TERM.process, 4), jax.random.key(3)
FOUND = aj.solvers.adaptive.AdaptiveGrid(None, None, (True, False, True), 6)
LOOPS = {
    "direct": lambda x, args: aj.sample(TERM, x, args, grid=GRID, adjoint=aj.DirectAdjoint()),
    "encode_noise": lambda x, args: aj.solvers.encode_noise(TERM, x, args, grid=GRID, solver=aj.DDIM(1.0), key=KEY),
    "x0_variance": lambda x, args: aj.solvers.x0_variance(TERM, x, args, grid=GRID, key=KEY),
    "adaptive_grid": lambda x, args: aj.solvers.adaptive_grid(TERM, x, args, solver=aj.solvers.ExponentialStages(2), t_end=0.1, like=FOUND).x,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_without_a_gradient_compile_in_one_layout(loop):
    assert layouts(LOOPS[loop], jnp.ones((2, 4, 5, 6)), {"w": jnp.ones((4, 4, 3, 3)), "bias": jnp.ones(())}) == {STANDARD[4]}


def test_second_derivatives_are_those_of_autodiff():
    spec = ("NCHW", "OIHW", "NCHW")
    x, args = (
        jax.random.normal(jax.random.key(0), (2, 4, 5, 6)),
        {"w": 0.1 * jax.random.normal(jax.random.key(1), (4, 4, 3, 3)), "bias": jnp.ones(())},
    )
    along = jax.random.normal(jax.random.key(2), x.shape)

    def product(adjoint, x, args):
        return jax.jvp(jax.grad(partial(objective, spec, adjoint), (0, 1)), (x, args), (along, jax.tree.map(jnp.ones_like, args)))[1]

    found, asked = (jax.jit(partial(product, adjoint))(x, args) for adjoint in (aj.DiscreteAdjoint(), aj.DirectAdjoint()))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
