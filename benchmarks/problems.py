"""Four networks with their data, noise, ends and reference solutions, for the benchmarks.

The reference is x_0 by a Runge-Kutta method in float64, one step for each training step: networks that saw only whole times are rough between them
(their fastest sine turns by one radian a step), and coarser grids differ by 1e-3 whatever the order. It is kept on disk.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import adjoint_jax as aj

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from own_network.flow_vit import load_flow_vit
from own_network.unet64 import START, load_unet64


@dataclass(frozen=True)
class Problem:
    """A term, its arguments for a batch, the noise, and where samples start and end."""

    name: str
    term: aj.DiffusionTerm
    args: Any
    x_T: Any
    start: float
    end: float
    betas: Any = None
    extra: Any = None
    """What other packages need to know of it."""

    @property
    def large(self) -> bool:
        return self.name == "unet64"

    def fine(self, steps: int) -> np.ndarray:
        """A grid uniform in log(alpha/sigma), after one step off alpha = 0 where it starts there."""
        return aj.search.fine_grid(self.term.process, steps, self.start, self.end)

    def even(self, steps: int) -> np.ndarray:
        """A grid uniform in log(alpha/sigma), from a little below alpha = 0 where it would start there."""
        process, finite = self.term.process, np.isfinite(self.term.process.lam(self.start))
        return aj.grids.log_snr(process, steps, t_start=self.start if finite else 0.99 * self.start, t_end=self.end)

    @property
    def finest(self) -> np.ndarray:
        """Every training step; 200 steps of `fine` for a network of continuous times."""
        return self.fine(200) if self.betas is None else np.arange(self.start, self.end - 1, -1)

    def reference(self, folder: Path) -> np.ndarray:
        """x_0 by Dormand and Prince's method of order 8, of order 5 for the large network; prints what the next lower order changes for one image."""
        path = self._path(folder, "reference")
        if not path.exists():
            high, low = (diffrax.Tsit5(), diffrax.Bosh3()) if self.large else (diffrax.Dopri8(), diffrax.Tsit5())
            rough = replace(self, x_T=self.x_T[:1], args=self.args if "cond" not in self.args else {**self.args, "cond": self.args["cond"][:1]})
            x_0 = self._solve(high, np.float64)
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(path, x_0=x_0, error=aj.search.distances(rough._solve(low, np.float64), x_0[:1]).max())
        with np.load(path) as file:
            print(f"{self.name}: the reference and one of lower order differ by {float(file['error']):.1e}", flush=True)
            return file["x_0"]

    def target(self, folder: Path) -> np.ndarray:
        """x_0 in float32 by Heun's method on the same grid: what schedules are searched for."""
        path = self._path(folder, "target")
        if not path.exists():
            np.savez(path, x_0=self._solve(diffrax.Heun(), np.float32))
        with np.load(path) as file:
            return file["x_0"]

    def _path(self, folder: Path, kind: str) -> Path:
        return folder / f"{kind}_{self.name}_{len(self.x_T)}_{_digest(self.x_T)}.npz"

    def _solve(self, method: diffrax.AbstractSolver, dtype: Any) -> np.ndarray:
        with jax.enable_x64(dtype == np.float64):
            widen = lambda leaf: jnp.asarray(np.asarray(leaf), dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf  # noqa: E731
            term, x_T, args = self.wide() if dtype == np.float64 else self.term, *jax.tree.map(widen, (self.x_T, self.args))
            solver = aj.ExponentialRK(method, 0.5)
            return np.asarray(jax.jit(lambda x, args: aj.sample(term, x, args, grid=self.finest, solver=solver))(x_T, args))

    def wide(self) -> aj.DiffusionTerm:
        """The term with a network that computes in float64."""
        if self.name != "digits":
            return self.term
        network, _, process, prediction = aj.load(dtype=jnp.float64)
        return aj.DiffusionTerm(network, process, prediction)


def _digest(x: Any) -> str:
    return hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:8]


def mean_error(x: Any, reference: Any) -> float:
    """The geometric mean of the relative distances of the images."""
    return float(np.exp(np.mean(np.log(aj.search.distances(x, reference) + 1e-12))))


def digits(shared: Path, images: int, seed: int) -> Problem:
    network, params, process, prediction = aj.load()
    term, x_T = aj.DiffusionTerm(network, process, prediction), jax.random.normal(jax.random.key(seed), (images, 28, 28, 1))
    betas = np.linspace(1e-4, 0.02, 1000)
    return Problem("digits", term, {"params": params, "cond": jnp.arange(images) % 10}, x_T, 999.0, 0.0, betas)


def flow(shared: Path, images: int, seed: int) -> Problem:
    term, params = load_flow_vit(shared / "mnist_flow_vit.npz")
    x_T = jax.random.normal(jax.random.key(seed), (images, 28, 28, 1))
    return Problem("flow", term, {"params": params, "cond": jnp.arange(images) % 10}, x_T, 1.0, 0.02)


def unet64(shared: Path, images: int, seed: int) -> Problem:
    with np.load(shared / "wang64_fixture.npz") as file:
        products = file["alphas_cumprod"][: int(START) + 1]
    term, params = load_unet64(shared / "wang64_unet_uint8.npz", products)
    x_T = jax.random.normal(jax.random.key(seed), (images, 64, 64, 3))
    betas = 1 - products / np.append(1.0, products[:-1])
    return Problem("unet64", term, {"params": params}, x_T, START, 0.0, betas)


class Mixture(NamedTuple):
    """sum_k w_k N(mu_k, s_k^2 I)."""

    means: np.ndarray
    widths: np.ndarray


def mixture(shared: Path, images: int, seed: int) -> Problem:
    """Eight Gaussians in 16 dimensions, moved by the condition; x0 is the posterior mean, in closed form."""
    rng = np.random.default_rng(0)
    data = Mixture(rng.normal(size=(8, 16)), rng.uniform(0.2, 0.5, 8))
    process = aj.VPLinear()

    def posterior_mean(x: Any, t: Any, args: Any) -> Any:
        alpha, sigma = process.alpha(t), process.sigma(t)
        means, widths = (jnp.asarray(part, x.dtype) for part in data)
        means = means[None] + args["cond"][:, None]
        variance = (alpha * widths) ** 2 + sigma**2
        away = x[:, None] - alpha * means
        logits = -0.5 * jnp.sum(away**2, -1) / variance[None] - 8 * jnp.log(variance)[None]
        share = jax.nn.softmax(logits)[..., None]
        return jnp.sum(share * (means + (alpha * widths**2 / variance)[None, :, None] * away), axis=1)

    x_T = jax.random.normal(jax.random.key(seed), (images, 16))
    cond = 0.5 * jax.random.normal(jax.random.key(seed + 100), (images, 16))
    return Problem("mixture", aj.DiffusionTerm(posterior_mean, process, "x0"), {"cond": cond}, x_T, *process.span, extra=data)


PROBLEMS: dict[str, Callable[[Path, int, int], Problem]] = {"mixture": mixture, "digits": digits, "flow": flow, "unet64": unet64}
