"""A traced step differentiated block by block: only what crosses from one block to the next is stored, the inside of a block is recomputed.

The equations of the trace are cut into about sqrt(n) blocks of equal output bytes, each cut where the least is alive nearby (between two
layers rather than within one), and every block runs under `jax.checkpoint`: n residuals become sqrt(n), for one more forward evaluation.
"""

from functools import partial
from itertools import pairwise
from math import isqrt
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal

from .._traced import Closed

INLINED = ("jit", "pjit")


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

        run = partial(eval_jaxpr, _part(jaxpr, needed, out, block), [])
        values |= zip(out, jax.checkpoint(run)(*(values[var] for var in needed)), strict=True)
    return jax.tree.unflatten(step.structure, [_read(values, var) for var in jaxpr.outvars])


def _read(values: dict, var: Any) -> Any:
    return var.val if isinstance(var, Literal) else values[var]


def _part(jaxpr: Any, needed: list, out: list, eqns: list) -> Jaxpr:
    """Some equations as a trace of their own."""
    return Jaxpr([], needed, out, eqns, jaxpr.effects, jaxpr.debug_info.with_unknown_names())


def _evaluate(jaxpr: Any, consts: Any, leaves: Any) -> list:
    """The values of `jaxpr`, with the jitted functions that it calls written out."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *leaves], strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in INLINED:
            inner = eqn.params["jaxpr"]
            found = _evaluate(inner.jaxpr, inner.consts, [_read(values, var) for var in eqn.invars])
        else:
            needed = list(dict.fromkeys(var for var in eqn.invars if not isinstance(var, Literal)))
            found = eval_jaxpr(_part(jaxpr, needed, eqn.outvars, [eqn]), [], *(values[var] for var in needed))
        values |= zip(eqn.outvars, found, strict=True)
    return [_read(values, var) for var in jaxpr.outvars]


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
