"""Exact inversion on the embedded digit network: how far 50 steps to noise and back are from the digit, in float64 and in float32.

    python benchmarks/roundtrip.py

Prints, for each solver and grid, the relative distance in the maximum norm of x_0 -> x_T -> x_0 and of x_T -> x_0 -> x_T, both states kept.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import adjoint_jax as aj
from adjoint_jax.checkpoints import EMBEDDED

SOLVERS = {
    "DDIM": aj.DDIM(),
    "BDIA(1)": aj.BDIA(),
    "BELM": aj.solvers.BELM(),
    "BELM(0.5)": aj.solvers.BELM(0.5),
    "EDICT(0.93)": aj.solvers.EDICT(),
    "Rex(midpoint, data)": aj.Rex(diffrax.Midpoint()),
    "Rex(midpoint, noise)": aj.Rex(diffrax.Midpoint(), sigma_data=np.inf),
    "Rex(midpoint, 0.5)": aj.Rex(diffrax.Midpoint(), sigma_data=0.5),
}
NOISY = {"CycleDiffusion, DDIM(1)": aj.DDIM(1.0), "CycleDiffusion, 2M": aj.SDEDPMSolverPP(2)}


@dataclass(frozen=True)
class Config:
    model: Path = EMBEDDED / "digits"
    samples: int = 2
    steps: int = 50
    seed: int = 1
    dtypes: tuple[str, ...] = ("float64", "float32")
    only: str = ""
    """A part of the solvers' names."""


def far(found: Any, wanted: Any) -> float:
    return float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())


def chosen(solvers: dict[str, Any], config: Config) -> dict[str, Any]:
    return {label: solver for label, solver in solvers.items() if config.only in label}


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    network, params, process, prediction = aj.load(config.model)
    cast = lambda tree, dtype: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)  # noqa: E731
    grids = {"log_snr": aj.grids.log_snr(process, config.steps), "uniform": aj.grids.uniform(process, config.steps)}
    start = jax.random.normal(jax.random.key(config.seed), (config.samples, 28, 28, 1), jnp.float64)
    term = aj.DiffusionTerm(network, process, prediction)
    for dtype in map(jnp.dtype, config.dtypes):
        args = {"params": cast(params, dtype), "cond": jnp.arange(config.samples)}
        x_T = start.astype(dtype)
        for name, ts in grids.items():
            image = aj.sample(term, x_T, args, grid=ts)
            for label, solver in chosen(SOLVERS, config).items():
                trips = jax.jit(lambda x_T, image, args, ts=ts, solver=solver: trip(term, x_T, image, args, ts, solver))
                back, forth = trips(x_T, image, args)
                print(f"{dtype.name} {name:8} {label:22} x_0 {far(back, image):.1e}   x_T {far(forth, x_T):.1e}", flush=True)
            for label, noisy in chosen(NOISY, config).items():
                x, z = aj.solvers.encode_noise(term, image, args, grid=ts, solver=noisy, key=jax.random.key(2))
                back = aj.sample(term, x, args, grid=ts, solver=noisy, noise=z)
                print(f"{dtype.name} {name:8} {label:22} x_0 {far(back, image):.1e}", flush=True)


def trip(term: Any, x_T: Any, image: Any, args: Any, ts: Any, solver: Any) -> tuple[Any, Any]:
    """x_0 -> x_T -> x_0 and x_T -> x_0 -> x_T."""
    given = (lambda x: aj.Paired(x)) if isinstance(solver, aj.solvers.AbstractPaired) else (lambda x: x)
    state = lambda pair: pair.x if isinstance(pair, aj.Paired) else pair  # noqa: E731
    there, down = aj.invert(term, image, args, grid=ts, solver=solver), aj.sample(term, given(x_T), args, grid=ts, solver=solver)
    return state(aj.sample(term, there, args, grid=ts, solver=solver)), state(aj.invert(term, down, args, grid=ts, solver=solver))


if __name__ == "__main__":
    main(tyro.cli(Config))
