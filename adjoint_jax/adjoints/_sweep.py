"""The transposed steps of the interpolated adjoint: equations (1) and (2) of `adjoint_jax.adjoints.interpolated`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import zeros_like
from ._computation import Computation, Inputs, add_to_value, advanced, first
from ._interpolation import Plan, Table, Way
from .discrete import constant


class Scales(NamedTuple):
    """S `[N]` and the table of the steps."""

    s: Any
    table: Table


def scales(computation: Computation, plan: Plan) -> Scales:
    """S by (1) on a state of one number."""
    one = jnp.zeros((1,) * computation.x.ndim, computation.x.dtype)
    noise = None if computation.noise is None else jnp.zeros((plan.n, computation.solver.draws, *one.shape), one.dtype)
    small = dataclasses.replace(computation, x=one, args=None, noise=noise, aux=None, start=None)
    carry, inputs = small.carry(), small.inputs()
    table = Table(*(jnp.asarray(value, one.dtype) for value in plan.table))

    def body(kappa: Any, slices: Any) -> tuple[Any, Any]:
        inputs_i, row, size = slices
        size = size / whole(small, kappa).ravel()[0]
        kappa = jax.tree.map(lambda leaf: leaf * size, kappa)
        advance = lambda p, floats: _floats(advanced(small, p, eqx.combine(floats, carry), inputs_i))  # noqa: E731
        q, (x, state) = jax.vjp(advance, one, _floats(carry))[1](kappa)
        return (x + ((row.fraction / row.sigma) - row.of_x) / row.of_p * q, state), q.ravel()[0]

    start = add_to_value(jax.tree.map(zeros_like, _floats(carry)), one + 1, False)
    _, s = jax.lax.scan(body, start, (inputs, table, jnp.asarray(1 / plan.scale[1:], one.dtype)), reverse=True)
    return constant(Scales(s, table))


def whole(computation: Computation, kappa: Any) -> Any:
    """dL/dx_i, with what the registers that are copies of x_i have of it."""
    x, state = kappa
    return x + sum((state.registers[name] for name in computation.solver.pattern.copies), jnp.zeros_like(x))  # type: ignore[attr-defined]


def _floats(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_inexact_array)


class Sweep:
    """Equation (1), a step at a time."""

    def __init__(self, linear: Callable, carry: Any, inputs: Inputs, states: Any, noisy: bool, scales: Scales, paired: bool):
        self.linear, self.carry, self.inputs, self.states, self.noisy = linear, carry, inputs, states, noisy
        self.table, self.s, self.paired = scales.table, scales.s, paired
        self.zero = jax.tree.map(zeros_like, _floats(carry))

    def transposed(self, kappa: Any, i: Any) -> tuple[Any, Any, Any]:
        """(1) without the network: kappa_i, q_i and the cotangent of the noise."""
        here = first(self.inputs, i)
        kappa = add_to_value(kappa, None if self.states is None else first(self.states, i), self.paired)

        def local(p: Any, carry_diff: Any, noise: Any) -> Any:
            return _floats(self.linear(p, eqx.combine(carry_diff, self.carry), here._replace(noise=noise) if self.noisy else here))

        q, kappa, noise = jax.vjp(local, zeros_like(self.carry[0]), self.zero, here.noise if self.noisy else None)[1](kappa)
        return kappa, q, noise

    def completed(self, kappa: Any, q: Any, i: Any, r: Any) -> Any:
        """(1) with J^T q by (2)."""
        table = self.table
        share = ((table.fraction[i] * q + self.s[i] * r) / table.sigma[i] - table.of_x[i] * q) / table.of_p[i]
        return (kappa[0] + share, kappa[1])

    def along(self, kappa: Any, top: Any, count: Any, weights: Any, known: Any, noises: Any) -> tuple[Any, Any]:
        """`count` steps from `top` on, r interpolated from what is known and u."""

        def body(j: Any, acc: Any) -> Any:
            kappa, noises = acc
            i = top - j
            kappa, q, noise = self.transposed(kappa, i)
            r = jnp.tensordot(weights[j, :-1], known, 1) + weights[j, -1] / self.s[i] * q
            return self.completed(kappa, q, i, r), written(noises, noise, i)

        return jax.lax.fori_loop(0, count, body, (kappa, noises))

    def at(self, kappa: Any, i: Any, pull: Callable) -> tuple[Any, Any, Any, Any]:
        """A node: kappa_i, r_i, what else the network's transpose gives of u, and the cotangent of the noise."""
        kappa, q, noise = self.transposed(kappa, i)
        u, table = q / self.s[i], self.table
        of_x, *shares = pull(u)
        r = table.sigma[i] * (table.of_p[i] * of_x + table.of_x[i] * u) - table.fraction[i] * u
        return self.completed(kappa, q, i, r), r, shares, noise

    def node(self, base: Any, way: Way, known: Any, pull: Callable, noises: Any, twice: bool) -> tuple[Any, Any, Any, Any]:
        """From `base` to a node: kappa there, r, what else the transpose gives, and the noises' cotangents."""
        ahead, _ = self.along(base, way.top, way.count, way.ahead, known, None)
        once = self.at(ahead, way.index, pull)

        def again(_: Any) -> Any:
            kappa, r, shares, _ = once
            corrected, filled = self.along(base, way.top, way.count, way.between, jnp.concatenate([r[None], known[:-1]]), noises)
            if twice:
                kappa, r, shares, noise = self.at(corrected, way.index, pull)
            else:
                kappa, q, noise = self.transposed(corrected, way.index)
                kappa = self.completed(kappa, q, way.index, r)
            return kappa, r, shares, written(filled, noise, way.index)

        return jax.lax.cond(way.count > 0, again, lambda _: (*once[:3], written(noises, once[3], way.index)), None)


def written(buffer: Any, value: Any, i: Any) -> Any:
    return None if buffer is None else jax.lax.dynamic_update_index_in_dim(buffer, value, i, 0)
