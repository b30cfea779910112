"""GMS: a reverse transition that is a mixture of two Gaussians, with the first three moments of the true one in every pixel.

Given x_0 the process's own transition s -> t is Gaussian, and what the network leaves open is x_0 itself, with posterior moments m, V, K
(mean, variance, third central moment). In the weights of the data splitting at tau = 1, whose order 1 this is for V = K = 0,

    x_t = R x_s + W x_0 + S n,    hence    M = R x_s + W m,    M2 = S^2 + W^2 V,    M3 = W^3 K                            (1)

are the mean and the second and third central moments of x_t | x_s. Two components of weights 1/3, 2/3, means M + 2k, M - k and one variance,

    k = (M3/2)^(1/3),    variance = M2 - 2 k^2,                                                                     (2)

have them exactly where M3^2 <= M2^3/2 (a skewness up to 0.707); beyond, k = +-(M2/2)^(1/2) keeps two moments and as much of the third as
there is. A network gives E p, E p^2, E p^3 of its prediction p = (x_0 - A x)/B, so V = B^2 (E p^2 - (E p)^2),
K = B^3 (E p^3 - 3 E p E p^2 + 2 (E p)^3).                                                                          (3)
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax import RESULTS
from jax.scipy.special import ndtr

from .. import grids
from .._numerics import at_least_float32, zeros_like
from .._traced import in_order
from .._types import Args, ArrayLike, State
from ..networks import as_pytree
from ..processes import AbstractProcess
from ..splitting import Splitting
from ..terms import DiffusionTerm
from ._base import AbstractSampler, check_rows, dense_info, unwrap
from .linear import Row
from .named import SDEDPMSolverPP

FIRST = 1 / 3
"""The weight of the component whose mean is M + 2k."""


class GMSState(eqx.Module):
    """`row` and `noise` `[2, *x]` of this step."""

    row: Row | None
    noise: Any


class GMS(AbstractSampler):
    """Gaussian Mixture Solver, (1)-(3): one evaluation and two draws a step; the mean of DDIM(eta=1), so order 1, and better in few steps.

    In 10 steps on a one-dimensional mixture the Wasserstein distance to the data is 0.025 with three moments, 0.038 with two, 0.091 with
    `x0_variance` and 0.155 with DDIM(eta=1).

    The component is chosen once for each image, as published (the state's leading axis is the batch), so the moments hold in each pixel but
    not across them; the first draw is the noise, the first number of each image's second draw makes the choice. Gradients go through the
    means and the variance, not through the choice; that of k in M3 is unbounded at M3 = 0, where rounding error counts as 0. (2) is solved
    in closed form; the published code takes 70 steps of Adan on the three moments' errors, and its clamps on x_0 and on the last variance are
    left out. Moments of eps lose digits at high noise, where (3) multiplies them by (sigma/alpha)^3: those of x0 or v do not.

    Args:
        heads: `heads(x, t, args) -> (E p, E p^2, E p^3)` of the term's prediction p given x, each of the shape of x; the term's network is
            not called. A pair (E p, E p^2) leaves M3 = 0: one Gaussian of the right variance. None: the term's network is E p.
        variance: where there are no heads, the posterior variance V of x_0: 0 (ancestral DDPM with the small variance), a number, or one a
            step, `[steps]`, as `aj.solvers.x0_variance` estimates it (Analytic-DPM's optimal one). Differentiable.
    Raises:
        ValueError: for heads together with a variance, other answers of the heads, a negative variance or another number of them.
    Reference: Guo et al., Gaussian mixture solvers for diffusion models (NeurIPS 2023); Bao et al., Analytic-DPM (ICLR 2022).

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.GMS(heads), key=key)
    """

    heads: Any
    variance: Any
    splitting: Splitting

    def __init__(self, heads: Any = None, variance: Any = 0.0):
        self.heads = None if heads is None else as_pytree(heads)
        self.variance, self.splitting = variance, Splitting(0.0, 1.0)
        if isinstance(variance, float | int | np.ndarray) and not np.all(np.asarray(variance) >= 0):
            raise ValueError(f"GMS's variance is at least 0; got {variance!r}.")
        if heads is not None and not (np.ndim(variance) == 0 and isinstance(variance, float | int) and variance == 0):
            raise ValueError("GMS takes the variance from its heads: give either heads or variance.")

    def order(self, terms: Any) -> int:
        return 1

    @property
    def draws(self) -> int:
        return 2

    @property
    def follows_ode(self) -> bool:
        return False

    def table(self, process: AbstractProcess, prediction: str, ts: Any) -> Row:
        """The row of SDE-DPM-Solver++(1), with V behind R, W and S."""
        row, steps = SDEDPMSolverPP(1).table(process, prediction, ts), len(ts) - 1
        if np.ndim(self.variance) and np.shape(self.variance) != (steps,):
            raise ValueError(f"GMS's variance is a number or one a step, here {steps}; got shape {np.shape(self.variance)}.")
        concrete = isinstance(row.x, np.ndarray) and not isinstance(self.variance, jax.Array)
        xp = np if concrete else jnp
        column = xp.broadcast_to(xp.asarray(self.variance, row.x.dtype), (steps,))[:, None]
        row = row._replace(x=xp.concatenate([xp.asarray(row.x), column], axis=1))
        if concrete:
            check_rows(row, np.asarray(ts), f"GMS with prediction {prediction!r}")
        return row

    def init(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args) -> GMSState:
        return GMSState(None, None)

    def step(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args, solver_state: GMSState, made_jump: Any) -> tuple:
        term, _ = unwrap(terms)
        row, noise = solver_state.row, solver_state.noise
        if row is None or noise is None:
            raise ValueError("GMS draws noise, which only aj.sample gives it: use aj.sample(..., key=key).")
        kept, taken, spread, variance = row.x
        mean, second, third = self._posterior(term, y0, row, variance, args)
        m2, m3 = spread**2 + taken**2 * second, taken**3 * third  # (1)
        k, width = mixture(m2, m3)
        images = noise[1].reshape(y0.shape[:1] + (-1,))[..., 0]
        first = fit_batch(ndtr(images) < FIRST, y0)
        y1 = kept * y0 + taken * mean + jnp.where(first, 2 * k, -k) + width * noise[0]
        return y1, None, dense_info(y0, y1), solver_state, RESULTS.successful

    def _posterior(self, term: DiffusionTerm, x: State, row: Row, variance: Any, args: Args) -> tuple[State, State, State]:
        """m, V and K of (1) by (3)."""
        of_x, of_p = row.of_x[0], row.of_p[0]
        if self.heads is None:
            p = term.predict(row.times[0], x, args)
            return of_x * x + of_p * p, zeros_like(x) + variance, zeros_like(x)
        moments = [jnp.asarray(each).astype(x.dtype) for each in self.heads(x, row.times[0], args)]
        if len(moments) not in (2, 3) or any(each.shape != x.shape for each in moments):
            got = [each.shape for each in moments]
            raise ValueError(f"GMS's heads answer with two or three moments in the shape of x, {x.shape}; they gave {got}.")
        p, square, *cube = moments
        third = of_p**3 * (cube[0] - 3 * p * square + 2 * p**3) if cube else zeros_like(x)
        return of_x * x + of_p * p, of_p**2 * jnp.maximum(square - p**2, 0), third

    def remember(self, x: State, state: GMSState) -> State:
        return x

    def recall(self, memory: State, state: GMSState) -> tuple[State, GMSState]:
        return memory, state


def mixture(m2: State, m3: State) -> tuple[State, State]:
    """k and the standard deviation of (2)."""
    positive = m2 > 0
    m2 = jnp.where(positive, m2, 1)
    skewness = m3 / (m2 * jnp.sqrt(m2))
    some = positive & (jnp.abs(skewness) > 64 * jnp.finfo(m2.dtype).eps)  # what rounding makes of 0 has no cube root
    k = jnp.where(some, jnp.cbrt(jnp.where(some, skewness, 1) / 2), 0)  # in units of sqrt(M2)
    most = float(np.sqrt(0.5))
    k = jnp.clip(k, -most, most)
    left = 1 - 2 * k**2
    inside = positive & (left > 0)
    width = jnp.where(inside, jnp.sqrt(jnp.where(inside, m2 * left, 1)), 0)
    return k * jnp.sqrt(m2), width


def fit_batch(images: Any, x: State) -> Any:
    """One value for each image, to broadcast against x."""
    return images.reshape(images.shape + (1,) * (x.ndim - images.ndim))


def x0_variance(term: DiffusionTerm, x_0: State, args: Args = None, *, grid: ArrayLike, key: Any) -> Any:
    """The posterior variance of x_0 at each step's start, `[steps]`: the mean square error of the network's x0 on noised data, one draw a time.

    For the optimal network that is E Var(x_0 | x_t), with which GMS(variance=...) has Analytic-DPM's optimal isotropic variance.

    Args:
        term: network, process and prediction.
        x_0: data `[B, ...]`; the more, the better the estimate.
        args, grid: as `aj.sample`.
        key: of the noise.
    Raises:
        ValueError: for a bad grid.
    Reference: Bao et al., Analytic-DPM (ICLR 2022).

        aj.solvers.GMS(variance=aj.solvers.x0_variance(term, x_0, args, grid=ts, key=key))
    """
    x_0 = jnp.asarray(x_0)
    x_0 = x_0.astype(at_least_float32(x_0.dtype))
    ts = jnp.asarray(grids.check(term.process, grid)[:-1], x_0.dtype)

    def error(inputs: Any) -> Any:
        t, key = inputs
        x = term.process.alpha(t) * x_0 + term.process.sigma(t) * jax.random.normal(key, x_0.shape, x_0.dtype)
        return jnp.mean((term.x0_and_eps(t, x, args)[0] - x_0) ** 2)

    return jax.lax.map(in_order(error), (ts, jax.random.split(key, len(ts))))
