"""Quadrature, Lagrange bases and Adams weights, for numpy on the host and for JAX in the graph alike.

The weights of every multistep method here are integrals of a Lagrange basis over one step,

    C_j = int l_j(w(v)) phi(v) dv,        l_j(w) = prod_{m != j} (w - w_m) / (w_j - w_m),                        (1)

taken by Gauss-Legendre quadrature: its terms have one sign times l_j, so nothing cancels, however small the step -- unlike the
closed forms in exponentials, which need a series there. 24 nodes give rounding error for steps up to 10 in the half log-SNR.
Nodes that do not exist yet (warm-up) or lie at infinity are masked out of the basis, which lowers the order of that step.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils

_P = ParamSpec("_P")
_R = TypeVar("_R")
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(24)
GAUSS_POINTS, GAUSS_WEIGHTS = (_POINTS + 1) / 2, _WEIGHTS / 2
"""Nodes and weights on [0, 1]."""


def broadcasting(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets `function` broadcast arrays of different rank, whatever `jax_numpy_rank_promotion` says: tables of weights mean it."""

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped


def is_concrete(*trees: Any) -> bool:
    """Whether no leaf is a tracer, so that numpy on the host may compute with it."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def namespace(*values: Any) -> ModuleType:
    """numpy for numbers and numpy arrays, jax.numpy as soon as one value is a JAX array."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def floating(value: Any, like: Any) -> Any:
    """`value` in float64 on the host, or as an array of the dtype of `like` in the graph."""
    if isinstance(like, jax.Array):
        # A table of the host is cast there: in the graph it would be a float64 constant, which a TPU does not have.
        return jnp.asarray(value if isinstance(value, jax.Array) else np.asarray(value, like.dtype), like.dtype)
    return np.asarray(value, np.float64)


def mesh_axes(x: Any) -> frozenset:
    """The manual mesh axes over which x varies, under either of the names that JAX has had for them."""
    aval = jax.typeof(x)
    return getattr(aval, "vma", None) or getattr(getattr(aval, "mat", None), "varying", frozenset())


def varying_like(tree: Any, like: Any) -> Any:
    """The arrays of `tree` marked as varying over the mesh axes over which `like` varies; outside of `shard_map` they are returned as they are."""

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        missing = tuple(mesh_axes(like) - mesh_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def fetched(tree: Any) -> Any:
    """Arrays that this process can read: those in parts on several processes are put together, which all of them have to ask for."""

    def near(leaf: Any) -> Any:
        far = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if far else leaf

    return jax.tree.map(near, tree)


def at_least_float32(dtype: Any) -> Any:
    """promote(dtype, float32), under strict promotion too."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def zeros_like(x: Any, dtype: Any = None) -> Any:
    """Zeros of the shape and of the mesh axes of x."""
    return varying_like(jnp.zeros(jnp.shape(x), dtype or x.dtype), x)


def trailing(array: Any, ndim: int) -> Any:
    """`array` with `ndim` axes of length one behind, so that it broadcasts against that many channel axes."""
    return array.reshape(array.shape + (1,) * ndim) if ndim else array


def lagrange(nodes: Any, valid: Any, at: Any) -> Any:
    """The basis of (1) at the points `at`, `[..., q]`, for nodes `[..., k]` of which `valid` take part: `[..., k, q]`; zero for the others."""
    xp = namespace(nodes, at)
    k = nodes.shape[-1]
    basis = []
    for j in range(k):
        factor = xp.ones_like(at)
        for m in range(k):
            if m != j:
                both = valid[..., j] & valid[..., m]
                gap = xp.where(both, nodes[..., j] - nodes[..., m], 1)
                ratio = (at - nodes[..., m, None]) / gap[..., None]
                factor = factor * xp.where(both[..., None], ratio, 1)
        basis.append(xp.where(valid[..., j, None], factor, 0))
    return xp.stack(basis, axis=-2)


@broadcasting
def adams_weights(nodes: Any, valid: Any, start: Any, end: Any, growth: float = 0.0) -> Any:
    """`int_start^end e^(growth w) l_j(w) dw` for nodes `[..., k]`: Adams-Bashforth if `end` is not among them, Adams-Moulton if it is."""
    xp = namespace(nodes)
    points, weights = floating(GAUSS_POINTS, nodes), floating(GAUSS_WEIGHTS, nodes)
    length = (end - start)[..., None]
    at = start[..., None] + length * points
    safe = xp.where(valid, nodes, start[..., None])
    weights = (weights * xp.exp(growth * at))[..., None, :] if growth else weights
    return xp.sum(lagrange(safe, valid, at) * weights, axis=-1) * length


def past_nodes(ts: Any, order: int, extra: int = 0) -> tuple[Any, Any]:
    """For each step i of a grid of N + 1 times, the times t_i, t_{i-1}, ... (`[N + extra, order]`) and which of them exist."""
    xp = namespace(ts)
    index = np.arange(len(ts) - 1 + extra)[:, None] - np.arange(order)[None]
    return xp.take(ts, np.maximum(index, 0), axis=0), index >= 0
