"""The work of a program: flops of its matrix products and convolutions, a loop's body times its trips, read from its trace.

    2 (elements of the result) (length of the contraction)      for each product                                      (1)

Everything else a network does is small beside them. Dead code, which the compiler removes, is removed first. A loop without a known number of
trips counts once, a branch as its most expensive side.
"""

from math import prod
from typing import Any

import jax
import jax.extend
from jax.interpreters import partial_eval


def flops(function: Any, *args: Any) -> int:
    """Of one call of function(*args); `args` are arrays or their shapes."""
    traced = jax.make_jaxpr(function)(*args).jaxpr
    live, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _of(live)


def _of(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inner = [_of(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params)]
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            shape = equation.invars[0].aval.shape
            total += 2 * prod(equation.outvars[0].aval.shape) * prod(shape[axis] for axis in params["dimension_numbers"][0][0])
        elif name == "conv_general_dilated":
            kernel, out_feature = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += 2 * prod(equation.outvars[0].aval.shape) * prod(kernel) // kernel[out_feature]
        else:
            total += max(inner, default=0) if name == "cond" else params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)
    return total
