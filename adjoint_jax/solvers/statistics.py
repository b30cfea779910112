"""Empirical model statistics: what DPM-Solver-v3 assumes of a network, dimension by dimension, as functions of lam.

    f = (sigma eps - l x)/alpha,        l = E[diag(sigma d eps/dx)],                                              (1)
    df/dlam = s f + b + rest            along the ODE, s = Cov(f, df/dlam)/Var(f),  b = E[df/dlam] - s E[f]              (2)

l makes df/dx small, (s, b) are the least squares of (2); l = 1, s = b = 0 is data prediction (f is -x0), l = 0, s = -1, b = 0 noise prediction.
Between the nodes, even in lam, they are linear, so that their integrals from the first node are known in closed form:

    L = int l,    S = int s,    B = int e^(-S) b, with e^(-S) b linear between the nodes.                           (3)
"""

import io
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import floating, namespace, trailing
from .._traced import in_order
from .._types import Args, State
from ..terms import DiffusionTerm


class ModelStatistics(eqx.Module):
    """l, s and b of (1), (2) at nodes even in lam.

    Args:
        lam: the nodes, `[n]`, increasing and even, at least two.
        l, s, b: `[n, *c]`, where c broadcasts against the trailing axes of x.
    Raises:
        ValueError: for uneven nodes, other shapes, or numbers that are not finite.

        statistics = aj.solvers.ModelStatistics(lam, l, s, b)
    """

    lam: np.ndarray
    l: np.ndarray  # noqa: E741
    s: np.ndarray
    b: np.ndarray

    def __init__(self, lam: Any, l: Any, s: Any, b: Any):  # noqa: E741
        self.lam, self.l, self.s, self.b = (np.asarray(part, np.float64) for part in (lam, l, s, b))
        shapes = [part.shape for part in (self.l, self.s, self.b)]
        if self.lam.ndim != 1 or len(self.lam) < 2 or any(shape != shapes[0] or shape[:1] != self.lam.shape for shape in shapes):
            raise ValueError(f"Statistics are l, s, b of one shape [n, *c] at n >= 2 nodes lam [n]; got {shapes} at {self.lam.shape}.")
        if not all(np.isfinite(part).all() for part in (self.lam, self.l, self.s, self.b)):
            raise ValueError("Statistics are finite numbers; got NaN or infinity: keep their nodes inside of finite lam.")
        gaps = np.diff(self.lam)
        if gaps[0] <= 0 or np.ptp(gaps) > 1e-6 * gaps[0]:
            raise ValueError(f"Statistics have nodes that increase evenly in lam; got gaps from {gaps.min():g} to {gaps.max():g}.")

    @property
    def ndim(self) -> int:
        """The number of axes of c."""
        return self.l.ndim - 1

    @property
    def gap(self) -> float:
        return float(self.lam[-1] - self.lam[0]) / (len(self.lam) - 1)

    def tables(self) -> dict[str, np.ndarray]:
        """(3) at the nodes, and what is integrated."""
        cell = lambda f: np.concatenate([0 * f[:1], np.cumsum(self.gap / 2 * (f[1:] + f[:-1]), axis=0)])  # noqa: E731
        decayed = np.exp(-cell(self.s)) * self.b
        return {"l": self.l, "s": self.s, "d": decayed, "L": cell(self.l), "S": cell(self.s), "B": cell(decayed)}

    def at(self, lam: Any) -> tuple[Any, Any, Any, Any]:
        """(l, L, S, B) at `lam` `[...]`, each `[..., *c]`; beyond the nodes the first or last value counts."""
        xp, gap, last, c = namespace(lam), self.gap, len(self.lam) - 1, self.ndim
        place = (lam - float(self.lam[0])) / gap
        index = xp.clip(xp.floor(place), 0, last - 1).astype(int)
        share = trailing(place - index.astype(place.dtype), c)
        inner = xp.clip(share, 0, 1)
        tables = {name: floating(table, lam) for name, table in self.tables().items()}

        def linear(name: str) -> Any:
            return xp.take(tables[name], index, axis=0) * (1 - inner) + xp.take(tables[name], index + 1, axis=0) * inner

        def integral(name: str, of: str) -> Any:
            first, slope = xp.take(tables[of], index, axis=0), linear(of)
            return xp.take(tables[name], index, axis=0) + gap * (inner * (first + slope) / 2 + (share - inner) * slope)

        return linear("l"), integral("L", "l"), integral("S", "s"), integral("B", "d")

    def save(self, path: str | Path) -> None:
        """Writes an npz archive."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, lam=self.lam, l=self.l, s=self.s, b=self.b)
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "ModelStatistics":
        """What `save` wrote. Raises ValueError for another archive."""
        with np.load(path, allow_pickle=False) as file:
            if missing := {"lam", "l", "s", "b"} - set(file.files):
                raise ValueError(f"{path} holds no statistics: {', '.join(sorted(missing))} missing; it is written by ModelStatistics.save.")
            return cls(file["lam"], file["l"], file["s"], file["b"])


def estimate_statistics(
    term: DiffusionTerm, x_0: State, args: Args = None, *, key: Any, grid: Any, nodes: int = 121, draws: int = 1
) -> ModelStatistics:
    """The statistics (1), (2) of a network at `nodes` even in lam over a grid, by forward derivatives.

    At each node x = alpha x_0 + sigma eps is drawn; l is the mean of v * (sigma d eps/dx v) over signs v, df/dlam the derivative of f along the
    ODE, dl/dlam (by differences of l) included. Cost: nodes * (draws + 1) evaluations with their derivatives.

    Args:
        term, args: as of `aj.sample`; without a `PerStep`.
        x_0: data `[B, *x]`, or samples; the means are over B.
        key: for the noise and the signs.
        grid: the grid that is to be sampled on, or its two ends; its lam must be finite.
        nodes: number of nodes, at least 3.
        draws: signs v and noises per element of x_0.
    Raises:
        ValueError: for a grid that reaches infinite lam, or too few nodes.
    Reference: Zheng et al., DPM-Solver-v3 (2023).

        statistics = aj.solvers.estimate_statistics(term, data, args, key=key, grid=ts)
    """
    ends = np.asarray(term.process.lam(np.asarray(grid, np.float64)[[0, -1]]))
    if not np.isfinite(ends).all() or nodes < 3:
        raise ValueError(
            f"Statistics need at least 3 nodes between finite lam; got {nodes} between {ends[0]:g} and {ends[1]:g}: choose another grid."
        )
    lam = np.linspace(ends[0], ends[1], nodes)
    times = jnp.asarray(term.process.t_of_lam(lam), x_0.dtype)
    x_0 = jnp.concatenate([x_0] * draws)
    keys = jax.random.split(key, nodes)
    node = lambda t, key: _noised(term, x_0, t, key)  # noqa: E731

    def slope(point: Any) -> Any:
        t, key = point
        x = node(t, key)
        sign = jax.random.rademacher(jax.random.fold_in(key, 1), x.shape, x.dtype)
        _, along = jax.jvp(lambda x: term.x0_and_eps(t, x, args)[1], (x,), (sign,))
        return jnp.mean(sign * term.process.sigma(t) * along, axis=0)

    l = jax.lax.map(in_order(slope), (times, keys))  # noqa: E741
    change = jnp.gradient(l, float(lam[1] - lam[0]), axis=0)
    regression = lambda point: _regression(term, args, node(point[0], point[1]), *point[:1], *point[2:])  # noqa: E731
    s, b = jax.lax.map(in_order(regression), (times, keys, l, change))
    return ModelStatistics(lam, l, s, b)


def _noised(term: DiffusionTerm, x_0: State, t: Any, key: Any) -> State:
    return term.process.alpha(t) * x_0 + term.process.sigma(t) * jax.random.normal(key, x_0.shape, x_0.dtype)


def _regression(term: DiffusionTerm, args: Args, x: State, t: Any, l: Any, change: Any) -> tuple[Any, Any]:  # noqa: E741
    """(s, b) of (2)."""
    process = term.process
    alpha_rate, sigma_rate = process.rates(t)
    rate = alpha_rate / process.alpha(t) - sigma_rate / process.sigma(t)

    def f(x: Any, t: Any) -> Any:
        at = (l + change * (process.lam(t) - jax.lax.stop_gradient(process.lam(t))))[None]
        return (process.sigma(t) * term.x0_and_eps(t, x, args)[1] - at * x) / process.alpha(t)

    value, along = jax.jvp(f, (x, t), (term.vf(t, x, args), jnp.ones_like(t)))
    along = along / rate
    mean, mean_along = jnp.mean(value, axis=0), jnp.mean(along, axis=0)
    centred = value - mean[None]
    variance = jnp.mean(centred**2, axis=0)
    noisy = variance <= (1e3 * jnp.finfo(x.dtype).eps) ** 2 * jnp.mean((x / process.alpha(t)) ** 2, axis=0)  # f is rounding error alone
    s = jnp.where(noisy, 0, jnp.mean(centred * along, axis=0) / jnp.where(noisy, 1, variance))
    return s, mean_along - s * mean
