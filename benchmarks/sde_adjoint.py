"""AdjointDEIS on an SDE and on a schedule: its error in every input against the exact gradient of the sampler that ran.

    python benchmarks/sde_adjoint.py

A mixture of 8 Gaussians in 16 dimensions (standard deviation of the data 1), VPLinear, float64, N = 48 steps on a grid uniform in lam, 64 samples
each with a noise, a condition (a shift of the means, of every other one to the other side; one for each interval in the second table) and a target
of its own;
L = sum of sin(x_0) times the target. Median relative error (median cosine) over the samples, M nodes even in lam.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import adjoint_jax as aj
from adjoint_jax.audit import compare

DIM, MEANS, WIDTH = 16, 8, 0.5


@dataclass(frozen=True)
class Config:
    steps: int = 48
    adjoint_steps: tuple[int, ...] = (6, 12, 24, 48)
    samples: int = 64


def mixture(process: aj.VPLinear) -> aj.DiffusionTerm:
    """eps of the mixture, its means shifted by `args` to either side: one shift of all is a symmetry, of which even Euler keeps the gradient."""
    sides = 0.3 * (-1.0) ** np.arange(MEANS)[:, None]
    means = jax.random.normal(jax.random.key(0), (MEANS, DIM)) * np.sqrt(1 - WIDTH**2)

    def network(x: Any, t: Any, args: Any) -> Any:
        alpha, sigma = process.alpha(t), process.sigma(t)
        v = alpha**2 * WIDTH**2 + sigma**2
        d = x[None] - alpha * (means + sides * args[None])
        return sigma / v * (jax.nn.softmax(-0.5 * jnp.sum(d**2, axis=-1) / v) @ d)

    return aj.DiffusionTerm(network, process)


METHODS = {
    "published 1": lambda m: aj.AdjointDEIS(1, np.inf, m, published=True),
    "published 2M": lambda m: aj.AdjointDEIS(2, np.inf, m, published=True),
    "2M, exact weights": lambda m: aj.AdjointDEIS(2, np.inf, m, published="exact"),
    "c=1 AB1": lambda m: aj.AdjointDEIS(1, 1.0, m, mode="AB"),
    "c=1 PECE1": lambda m: aj.AdjointDEIS(1, 1.0, m),
    "c=1 Heun": lambda m: aj.AdjointDEIS(2, 1.0, m, mode="Heun"),
    "c=1 PECE2": lambda m: aj.AdjointDEIS(2, 1.0, m),
    "c=1 PECE3": lambda m: aj.AdjointDEIS(3, 1.0, m),
    "c=0.5 PECE2": lambda m: aj.AdjointDEIS(2, 0.5, m),
    "c=1 PECE3, integrals of order 1": lambda m: aj.AdjointDEIS(3, 1.0, m, integral_order=1),
}


def gradients(config: Config, stochastic: bool, adjoint: Any) -> list[np.ndarray]:
    """In x_T, the condition and (of the SDE) the noise, one row a sample."""
    term, keys = mixture(aj.VPLinear()), jax.random.split(jax.random.key(1), 4)
    ts, n = aj.grids.log_snr(term.process, config.steps), config.samples
    normal = lambda key, *shape: jax.random.normal(key, (n, *shape, DIM))  # noqa: E731
    x, cond, noise, target = (normal(key, *shape) for key, shape in zip(keys, ((), (), (config.steps,), ()), strict=True))
    cond = cond if stochastic else jnp.repeat(cond[:, None], config.steps, axis=1)

    def loss(x: Any, cond: Any, noise: Any, target: Any) -> Any:
        how = {"solver": aj.SDEDPMSolverPP(1), "noise": noise} if stochastic else {}
        return jnp.sum(jnp.sin(aj.sample(term, x, cond if stochastic else aj.PerStep(cond), grid=ts, adjoint=adjoint, **how)) * target)

    wanted = (0, 1, 2) if stochastic else (0, 1)
    return [np.asarray(found).reshape(n, -1) for found in jax.jit(jax.vmap(jax.grad(loss, wanted)))(x, cond, noise, target)]


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    warnings.filterwarnings("ignore", "The published AdjointDEIS")
    for stochastic, title in ((True, "SDE-DPM-Solver++(1): x_T / condition / noise"), (False, "DPM-Solver++(2M): x_T / condition by interval")):
        exact = gradients(config, stochastic, aj.DiscreteAdjoint())
        print(f"\n{title}\n\n| method | " + " | ".join(f"M = {m}" for m in config.adjoint_steps) + " |\n|" + "---|" * (1 + len(config.adjoint_steps)))
        for name, make in METHODS.items():
            cells = []
            for m in config.adjoint_steps:
                pairs = zip(gradients(config, stochastic, make(m)), exact, strict=True)
                found = [np.nanmedian([compare(f, e)[:2] for f, e in zip(one, two, strict=True)], axis=0) for one, two in pairs]
                cells.append(" / ".join(f"{error:.1e} ({cosine:.3f})" for error, cosine in found))
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
