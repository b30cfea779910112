"""How good a gradient is: any adjoints against the exact gradient of the sampler that ran."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._types import Args, ArrayLike, State
from .adjoints import DiscreteAdjoint
from .sample import sample
from .terms import DiffusionTerm


class AuditRow(NamedTuple):
    """One adjoint and one input: |g - g_exact| / |g_exact|, the cosine between the two, and |g| / |g_exact|."""

    adjoint: str
    wrt: str
    relative_error: float
    cosine: float
    norm_ratio: float


class Audit(tuple[AuditRow, ...]):
    """Rows of an audit; prints as a Markdown table."""

    def __str__(self) -> str:
        head = "| adjoint | input | relative error | cosine | norm ratio |\n|---|---|---|---|---|\n"
        return head + "\n".join(f"| {r.adjoint} | {r.wrt} | {r.relative_error:.2e} | {r.cosine:.4f} | {r.norm_ratio:.3g} |" for r in self)


def audit(
    loss: Callable[[State], Any],
    term: DiffusionTerm,
    x_T: State,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: diffrax.AbstractSolver | None = None,
    adjoints: Mapping[str, diffrax.AbstractAdjoint],
    wrt: Sequence[str] = ("x_T", "args"),
) -> Audit:
    """Compares the gradient of loss(sample) by each adjoint with the exact one (`DiscreteAdjoint`).

    Args:
        loss: maps the sample, `[*x]`, to a scalar.
        term, x_T, args, grid, solver: as in `sample`.
        adjoints: named adjoints.
        wrt: "x_T", "args" (every float leaf), or one entry of a dict of args, such as "args['cond']".

    Returns:
        One row for each adjoint and input.

    Raises:
        ValueError: where `wrt` names no float input.

        print(aj.audit(loss, term, x_T, args, grid=ts, adjoints={"M = 12": aj.AdjointDEIS(steps=12)}))
    """
    named = {"x_T": x_T, **_float_leaves(args)}
    chosen = {name: leaf for name, leaf in named.items() if any(name == w or name.startswith(w + "[") for w in wrt)}
    if not chosen:
        raise ValueError(f"wrt={tuple(wrt)!r} names no float input; there are {', '.join(named)}.")

    @eqx.filter_jit
    def gradient(chosen: Any, term: DiffusionTerm, x_T: State, args: Args, adjoint: Any) -> Any:
        def objective(chosen: Any) -> Any:
            filled = jax.tree_util.tree_map_with_path(lambda path, leaf: chosen.get(_name(path), leaf), args)
            return loss(sample(term, chosen.get("x_T", x_T), filled, grid=grid, solver=solver, adjoint=adjoint))

        return jax.grad(objective)(chosen)

    exact = gradient(chosen, term, x_T, args, DiscreteAdjoint())
    rows = []
    for name, adjoint in adjoints.items():
        found = gradient(chosen, term, x_T, args, adjoint)
        rows += [AuditRow(name, leaf, *compare(found[leaf], exact[leaf])) for leaf in chosen]
    return Audit(rows)


def compare(found: ArrayLike, exact: ArrayLike) -> tuple[float, float, float]:
    """(relative error, cosine, ratio of norms) of two arrays, in float64. NaN where the exact one is zero."""
    g, e = (np.asarray(value, np.float64).ravel() for value in (found, exact))
    size, length = np.linalg.norm(e), np.linalg.norm(g)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.linalg.norm(g - e) / size), float(g @ e / (size * length)), float(length / size)


def _name(path: Any) -> str:
    return "args" + jax.tree_util.keystr(path)


def _float_leaves(args: Args) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(args)
    return {_name(path): leaf for path, leaf in leaves if eqx.is_inexact_array_like(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}
