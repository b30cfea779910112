"""Traced functions: what they closed over made plain, their convolutions in the layout for which XLA's CPU backend has fast kernels in a loop.

In a program without a loop the CPU backend puts the axes of a convolution in order itself. In a loop's body it keeps the order in which they were
given, of networks that keep channels first and of every convolution's transposes, and takes a general kernel, up to a hundred times slower.
Here each is written as

    transpose(conv(transpose(x), transpose(w))),        x [batch, *space, in],   w [*space, in, out],                  (1)

the same sum of the same products. On other backends nothing is changed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.tree_util import Partial

CONVOLUTION = "conv_general_dilated"
JAXPRS = (Jaxpr, ClosedJaxpr)


class Closed(eqx.Module):
    """A traced function and the arrays that it closed over. Unlike Equinox's it does not compare shardings, which pmap changes inside a scan."""

    jaxpr: Any = eqx.field(static=True)
    consts: list
    structure: Any = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        return jax.tree.unflatten(self.structure, eval_jaxpr(self.jaxpr, self.consts, *jax.tree.leaves(args)))


def closed(function: Callable, *args: Any) -> Closed:
    """`function` traced once at `args`, every array that it closes over turned into a leaf of the result, so that nothing escapes a custom_vjp."""
    traced, answer = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = _rewritten(traced.jaxpr) if _orders() else traced.jaxpr
    return Closed(jaxpr, traced.consts, jax.tree.structure(answer))


def in_order(function: Callable) -> Callable:
    """`function` of arrays with the convolutions of its trace by (1): the body of a loop, or a transpose from `jax.vjp`, which stays a pytree."""
    return Partial(_ordered, function) if _orders() else function


def _ordered(function: Callable, *args: Any) -> Any:
    return closed(function, *args)(*args)


def _orders() -> bool:
    return jax.default_backend() == "cpu"


def _rewritten(value: Any) -> Any:
    """A jaxpr, closed or not, with the convolutions in it by (1); in a tuple those that it holds."""
    if isinstance(value, Jaxpr):  # first: from JAX 0.12 on, the two are one class
        return value.replace(eqns=[_by_one(equation) if equation.primitive.name == CONVOLUTION else _within(equation) for equation in value.eqns])
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(value.jaxpr))
    return tuple(map(_rewritten, value)) if type(value) is tuple else value


def _within(equation: Any) -> Any:
    """An operation with the jaxprs among its parameters rewritten; most have none, and stay as they are."""
    held = lambda value: isinstance(value, JAXPRS) or (type(value) is tuple and any(map(held, value)))  # noqa: E731
    new = {name: _rewritten(value) for name, value in equation.params.items() if held(value)}
    return equation.replace(params=equation.params | new) if new else equation


def _by_one(equation: Any) -> Any:
    params = equation.params
    numbers = params["dimension_numbers"]
    depthwise = params["feature_group_count"] > 1 and equation.invars[1].aval.shape[numbers.rhs_spec[1]] == 1  # fast with channels first
    if depthwise or numbers == _standard(len(numbers.lhs_spec)):
        return equation
    call = jax.make_jaxpr(jax.jit(partial(_convolution, **params)))(*(var.aval for var in equation.invars)).eqns[0]
    return equation.replace(primitive=call.primitive, params=call.params)


def _standard(ndim: int) -> jax.lax.ConvDimensionNumbers:
    """Of (1)."""
    space = range(1, ndim - 1)
    return jax.lax.ConvDimensionNumbers((0, ndim - 1, *space), (ndim - 1, ndim - 2, *range(ndim - 2)), (0, ndim - 1, *space))


def _convolution(x: Any, w: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """(1); a specification is (batch, feature, *space), or (out, in, *space)."""
    (batch, feature, *space), (out, into, *window), answer = dimension_numbers
    x, w = x.transpose(batch, *space, feature), w.transpose(*window, into, out)
    y = jax.lax.conv_general_dilated(x, w, dimension_numbers=_standard(x.ndim), **params)
    places = dict(zip(answer, (0, x.ndim - 1, *range(1, x.ndim - 1)), strict=True))
    return y.transpose([places[axis] for axis in range(x.ndim)])
