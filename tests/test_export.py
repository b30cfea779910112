"""The jitted gradient is exported for a TPU on the CPU, under every adjoint, and holds no float64: neither with x64 off nor with it on."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import adjoint_jax as aj

PROCESS = aj.VPLinear()
GRID = aj.grids.log_snr(PROCESS, 4, t_start=0.5, t_end=0.2)
ADJOINTS = {
    "direct": aj.DirectAdjoint(),
    "discrete": aj.DiscreteAdjoint(),
    "PECE": aj.AdjointDEIS(order=4),
    "PEC": aj.AdjointDEIS(order=2, steps=2, nodes="index", mode="PEC"),
    "AB": aj.AdjointDEIS(order=3, mode="AB"),
    "published": aj.AdjointDEIS(order=2, sigma_data=np.inf, published=True),
}
SOLVERS = {
    "DPMSolverPP3": aj.DPMSolverPP(order=3),
    "DEIS4": aj.DEIS(order=4),
    "Exponential2": aj.Exponential(order=2, sigma_data=0.5, variable="theta"),
    "RK_Heun": aj.ExponentialRK(diffrax.Heun()),
    "RK_Tsit5": aj.ExponentialRK(diffrax.Tsit5(), sigma_data=0.5),
    "DDIM": aj.DDIM(),
}
PAIRS = list(zip(ADJOINTS, SOLVERS, strict=True))
FLOAT64 = re.compile(r"(?<![\w])(?:tensor<(?:[\dx?]*x)?f64>|f64\b)")


def network(x, t, args):
    hidden = jnp.tanh(x @ args["params"]["in"] + args["cond"] * jnp.asarray(t, x.dtype))
    return hidden @ args["params"]["out"]


def loss(x, cond, scale, params, grid, *, adjoint, solver):
    term = aj.DiffusionTerm(aj.cfg(network, scale), PROCESS, "v")
    args = {"params": params, "cond": cond, "uncond": jnp.zeros_like(cond)}
    return jnp.sum(aj.sample(term, x, args, grid=grid, solver=SOLVERS[solver], adjoint=ADJOINTS[adjoint]) ** 2)


def shapes():
    single = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return single((2, 3)), single((2, 4)), single((2,)), {"in": single((3, 4)), "out": single((4, 3))}


def exported(adjoint, solver, traced_grid):
    """The StableHLO of the gradient for a TPU."""
    function = partial(loss, adjoint=adjoint, solver=solver)
    grid = (jax.ShapeDtypeStruct((len(GRID),), jnp.float32),) if traced_grid else ()
    program = jax.jit(jax.grad(function if traced_grid else partial(function, grid=GRID), argnums=(0, 1, 2, 3)))
    return jax.export.export(program, platforms=["tpu"])(*shapes(), *grid).mlir_module()


@pytest.mark.parametrize("traced_grid", [False, True], ids=["concrete", "traced"])
@pytest.mark.parametrize(("adjoint", "solver"), PAIRS)
def test_float32_stays_float32_where_x64_is_on(adjoint, solver, traced_grid):
    assert jax.config.jax_enable_x64
    assert not FLOAT64.findall(exported(adjoint, solver, traced_grid))


def test_the_pattern_finds_float64():
    double = jax.export.export(jax.jit(lambda x: 2 * x), platforms=["tpu"])(jax.ShapeDtypeStruct((3,), jnp.float64)).mlir_module()
    assert FLOAT64.findall(double)


def main():
    """Exports every pair as a process without x64 does it."""
    assert not jax.config.jax_enable_x64
    for adjoint, solver in PAIRS:
        for traced_grid in (False, True):
            text = exported(adjoint, solver, traced_grid)
            print(adjoint, solver, len(text), len(FLOAT64.findall(text)))


def test_export_where_x64_is_off():
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), "JAX_ENABLE_X64": "0"}
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert len(rows) == 2 * len(PAIRS)
    assert all(row[-1] == "0" for row in rows)


if __name__ == "__main__":
    main()
