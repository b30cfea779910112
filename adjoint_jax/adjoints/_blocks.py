"""A traced step differentiated block by block: only what crosses from one block to the next is stored, the inside of a block is recomputed.

The equations of the trace are cut into about sqrt(n) blocks of equal output bytes, each cut where the least is alive nearby (between two
layers rather than within one), and every block runs under `jax.checkpoint`: n residuals become sqrt(n), for one more forward evaluation.
"""

from itertools import pairwise
from math import isqrt
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from ._computation import Closed

INLINED = ("jit", "pjit", "closed_call", "core_call")


def in_blocks(step: Closed, *args: Any) -> Any:
    """step(*args), of which each block is recomputed where it is differentiated."""
    leaves = jax.tree.leaves(args)
    flat = jax.make_jaxpr(lambda consts, leaves: _evaluate(step.jaxpr, consts, leaves))(step.consts, leaves)
    jaxpr = flat.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*flat.consts, *step.consts, *leaves], strict=True))
    last = _last_uses(jaxpr)
    for start, end in pairwise(_cuts(jaxpr, last)):
        block = jaxpr.eqns[start:end]
        made = [var for eqn in block for var in eqn.outvars]
        needed = list(dict.fromkeys(v for eqn in block for v in eqn.invars if not isinstance(v, Literal) and v not in made))
        out = [var for var in made if last.get(var, -1) >= end]

        def run(inner: list, block: Any = block, needed: Any = needed, out: Any = out) -> list:
            found = dict(zip(needed, inner, strict=True))
            _advance(block, found)
            return [found[var] for var in out]

        values |= zip(out, jax.checkpoint(run)([values[var] for var in needed]), strict=True)
    return jax.tree.unflatten(step.structure, [_read(values, var) for var in jaxpr.outvars])


def _read(values: dict, var: Any) -> Any:
    return var.val if isinstance(var, Literal) else values[var]


def _evaluate(jaxpr: Any, consts: Any, leaves: Any) -> list:
    """The values of `jaxpr`, with the jitted functions that it calls written out."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *leaves], strict=True))
    _advance(jaxpr.eqns, values)
    return [_read(values, var) for var in jaxpr.outvars]


def _advance(eqns: Any, values: dict) -> None:
    for eqn in eqns:
        given = [_read(values, var) for var in eqn.invars]
        if eqn.primitive.name in INLINED:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            found = _evaluate(inner.jaxpr, inner.consts, given)
        else:
            functions, params = eqn.primitive.get_bind_params(eqn.params)
            found = eqn.primitive.bind(*functions, *given, **params)
            found = found if eqn.primitive.multiple_results else [found]
        values |= zip(eqn.outvars, found, strict=True)


def _last_uses(jaxpr: Any) -> dict:
    """The last equation that reads each variable; what the trace returns is read after the last one."""
    last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, Literal)}
    return last | {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, Literal)}


def _cuts(jaxpr: Any, last: dict) -> list[int]:
    """Where the blocks begin and the last one ends."""
    n = len(jaxpr.eqns)
    made = np.array([sum(_bytes(var) for var in eqn.outvars) for eqn in jaxpr.eqns])
    change = np.zeros(n + 1)
    change[1:] = made
    for i, eqn in enumerate(jaxpr.eqns):
        for var in eqn.outvars:
            change[min(last.get(var, i), n - 1) + 1] -= _bytes(var)
    alive, reached = np.cumsum(change), np.cumsum(made) / max(made.sum(), 1)
    blocks = max(isqrt(n), 2)
    edges = np.searchsorted(reached, (np.arange(1, blocks) - 0.5) / blocks).tolist() + [n - 1]
    cuts = [low + 1 + int(np.argmin(alive[low + 1 : high + 1])) for low, high in pairwise(edges) if high > low]
    return sorted({0, *cuts, n})


def _bytes(var: Any) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return int(np.prod(shape)) * getattr(dtype, "itemsize", 4)
