"""CycleDiffusion's encoder: the noises with which a stochastic sampler makes a given image.

Let the image X be the state at t_N, and x_i | X = (alpha_i/alpha_N) X + sqrt(v_i) n, v_i = sigma_i^2 - (alpha_i/alpha_N)^2 sigma_N^2, the
forward process from there. One joint path is drawn, x_0 first, then for each step

    x_{i+1} = (alpha_{i+1}/alpha_N) X + sqrt((v_{i+1} - c^2)/v_i) (x_i - (alpha_i/alpha_N) X) + c n_i               (1)
    c^2 = min(1, eta^2 (1 - r)) v_{i+1},      r = (alpha_i/alpha_{i+1})^2 v_{i+1}/v_i                             (2)

eta = 1 being the process's own bridge, and eta^2 s^-2 = 1/(sigma_{i+1}^2 (1 - (rho_{i+1}/rho_i)^2)) for a solver that adds s z. The
solver's step from x_i without noise ends at m_i, and

    z_i = (x_{i+1} - m_i) / s_i,      zero where s_i = 0                                                        (3)

makes it end at x_{i+1}. Independent marginals in place of (1) would give noises far from Gaussian.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .. import grids
from .._numerics import at_least_float32, broadcasting, is_concrete, namespace
from .._traced import in_order
from .._types import Args, ArrayLike, State
from ..processes import AbstractProcess
from ..splitting import level
from ..terms import DiffusionTerm
from ._base import as_dtype, fit
from .linear import AbstractLinear


def encode_noise(
    term: DiffusionTerm,
    x_0: State,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: AbstractLinear,
    key: Any = None,
    noise: Any = None,
) -> tuple[State, Any]:
    """(x_T, z): the start and the noises `[steps, *x]` with which `aj.sample(term, x_T, args, grid=grid, solver=solver, noise=z)` is x_0.

    Decoding with other args edits the image. One evaluation a step. Exact where every step adds noise; a last step into sigma = 0 adds
    none, and then the sample is x_0 up to that step. Differentiable by plain autodiff, in the memory of all steps.

    Args:
        term, x_0, args, grid: as `aj.invert`; x_0 is the state at grid[-1]; args are the same for all steps.
        solver: one with a single draw a step that it adds to x: `aj.DDIM(eta)`, `aj.SDEDPMSolverPP(...)`, `aj.solvers.SDEDPMSolver(...)`.
        key, noise: one of the two, of the path (1): x_T takes noise[0], step i noise[i + 1]; a key means `normal(fold_in(key, i), x_0.shape)`.
    Raises:
        TypeError: for another solver.
        ValueError: where neither or both of key and noise are given, noise of another shape, or a bad grid.
    Reference: Wu & De la Torre, A latent space of stochastic diffusion models for zero-shot image editing and guidance (ICCV 2023).

        x_T, z = aj.solvers.encode_noise(term, x_0, args, grid=ts, solver=aj.DDIM(1.0), key=key)
    """
    pattern = solver.pattern if isinstance(solver, AbstractLinear) else None
    sums = [] if pattern is None else [*pattern.reads, *pattern.registers.values()]
    if pattern is None or pattern.draws != 1 or "z0" not in pattern.x or any("z0" in what for what in sums):
        raise TypeError(f"encode_noise takes a solver that adds one draw a step to x, such as aj.DDIM(eta=1.0); got {type(solver).__name__}.")
    x_0 = jnp.asarray(x_0)
    x_0 = x_0.astype(at_least_float32(x_0.dtype))
    ts = grids.check(term.process, grid) if is_concrete(grid, term.process, solver) else jnp.asarray(grid, x_0.dtype)
    rows = solver.table(term.process, term.prediction, ts)
    added = rows.x.take(pattern.x.index("z0"), axis=1)
    path = as_dtype(bridge(term.process, ts, added), x_0.dtype)
    steps = len(ts) - 1
    noise = _path_noise(key, noise, steps, x_0)
    times, rows, added = jnp.asarray(ts, x_0.dtype), as_dtype(rows, x_0.dtype), jnp.asarray(added, x_0.dtype)
    x_T = path["mean"][0] * x_0 + path["start"] * noise[0]

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, state = carry
        t0, t1, row, s, mean, following, keep, spread, n = inputs
        state = eqx.tree_at(_given, state, (row, jnp.zeros_like(x)[None]), is_leaf=lambda leaf: leaf is None)
        end, _, _, state, _ = solver.step(term, t0, t1, x, args, state, False)
        state = eqx.tree_at(_given, state, (None, None), is_leaf=lambda leaf: leaf is None or leaf is row)
        x = following * x_0 + fit(keep, x) * (x - mean * x_0) + fit(spread, x) * n  # (1)
        s = fit(s, x)
        return (x, state), jnp.where(s > 0, (x - end) / jnp.where(s > 0, s, 1), 0)  # (3)

    mean = path["mean"]
    last = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])
    inputs = (times[:-1], times[1:], rows, added, mean[:-1], mean[1:], path["keep"], path["spread"], last)
    _, z = jax.lax.scan(in_order(body), (x_T, solver.init(term, times[0], times[1], x_T, args)), inputs)
    return x_T, z


def _given(state: Any) -> tuple[Any, Any]:
    return state.row, state.noise


def _path_noise(key: Any, noise: Any, steps: int, x: State) -> Any:
    if (key is None) == (noise is None):
        raise ValueError(f"encode_noise draws a path: give either key or noise, not {'both' if noise is not None else 'neither'}.")
    if noise is None:
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype))(jnp.arange(steps))
    noise = jnp.asarray(noise)
    if noise.shape != (steps, *x.shape):
        raise ValueError(f"noise of a path of {steps} steps has the shape {(steps, *x.shape)}; got {noise.shape}.")
    return noise.astype(x.dtype)


@broadcasting
def bridge(process: AbstractProcess, ts: Any, added: Any) -> dict[str, Any]:
    """(1), (2): `mean` alpha_i/alpha_N `[N + 1]`, `start` sqrt(v_0), `keep` and `spread`, the weights of the second and the third term `[N, *c]`."""
    xp = namespace(ts, added)
    at = level(process, ts)
    mean = at.alpha / at.alpha[-1]
    # alpha^2 (rho^2 - rho_N^2) loses digits next to t_N alone, where the step is short
    v = xp.concatenate([at.sigma[:-1] ** 2 - (mean[:-1] * at.sigma[-1]) ** 2, xp.zeros_like(mean[:1])])
    wide = lambda part: part.reshape(part.shape + (1,) * (added.ndim - 1))  # noqa: E731
    alpha = (at.alpha[:-1] / at.alpha[1:]) ** 2
    own = at.sigma[1:] ** 2 * (1 - alpha * (at.sigma[1:] / at.sigma[:-1]) ** 2)
    share = xp.where(wide(own) > 0, added**2 / wide(xp.where(own > 0, own, 1)), 0) * wide(1 - alpha * v[1:] / v[:-1])
    share = xp.minimum(share, 1)
    return {
        "mean": mean,
        "start": xp.sqrt(v[0]),
        "keep": xp.sqrt(wide(v[1:] / v[:-1]) * (1 - share)),
        "spread": xp.sqrt(wide(v[1:]) * share),
    }
