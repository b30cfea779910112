"""The sampler's own adjoint with the network's share interpolated between nodes: exact at all nodes, and without a floor at a few.

A step of the solvers here is linear in the state, the registers and the network's output p, so that backwards

    (kappa_i, q_i) = [d step / d(carry_i, p_i)]^T kappa_{i+1},    kappa_i += J_i^T q_i in the place of x,   J = dp/dx         (1)

needs the network for J_i^T q_i alone, and kappa is known on all N steps as soon as that is. With S_i the same q_i for a state of one number, whose
J is that of data N(0, c^2) and whose cotangent is 1/m_i at every step (m of `adjoint_jax.splitting`), u_i = q_i / S_i is about m dL/dx and
changes little from step to step, as does what is left of the network's share without that of such data:

    r_i = sigma_i J_eps,i^T u_i - f_i u_i,     f = rho^2 / (c^2 + rho^2).                                              (2)

r is found at M of the N steps, by one linearisation each, and interpolated by polynomials in lam elsewhere: extrapolated to the next node, found
there, interpolated, and found again from what that gives (one linearisation, two cotangents). The first nodes of a method of order q start from
the last step each time, through all nodes so far, so that the start costs no order. The gradient in conditioning and weights is

    sum_i q_i^T dp_i/dtheta = sum_k Omega_k u_k^T dp_k/dtheta,    Omega_k = sum_i (S_i / B_i) l_ik B_k,                     (3)

l the interpolation from the nodes k to step i and B the weight of p in F of the frame. A continuous adjoint ends where its gradient is that of
the ODE; this one tends to that of the sampler: with a node at every step it is `DiscreteAdjoint`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import is_concrete, zeros_like
from ..solvers.linear import AbstractLinear
from ._base import AbstractSamplerAdjoint
from ._computation import Computation, Inputs, add_to_value, answering, closed, first, run_forward, value_of
from ._continuous import run_keeping
from ._interpolation import Plan, Table, Way
from .discrete import accumulator, add, constant


class InterpolatedAdjoint(AbstractSamplerAdjoint):
    """The sampler's own adjoint, the network linearised at `steps` of its N steps, equations (1) to (3). Approximate; exact for steps = N.

    Cost: the sampler, then a forward and two backward evaluations a node (one where the next node is the next step). Memory: the states at
    the nodes. Differentiable: x_T, all states of a saved trajectory, args, the network, per-step leaves, injected noise. Not the grid.

    On the flow ViT (48 steps of DPM-Solver++(2M), 8 images) order 3 errs by 3.5e-2, 1.1e-2 and 4.4e-3 in the median at 12, 16 and 24 nodes, on
    a mixture of Gaussians by 1e-2 at 12, where `AdjointDEIS` has 2e-3: what it gains is the floor that the latter has, not accuracy at few nodes.

    Args:
        order: of the interpolation, 1 to 4.
        sigma_data: c of the frame, the standard deviation that the data are assumed to have, a positive number.
        steps: number M of nodes, at most the sampler's N; None is N, the exact gradient.
        nodes: "lam", "t", "index" or indices of steps, as `AdjointDEIS`; the first and the last step are always nodes.
    Raises:
        ValueError: for another order or sigma_data, a solver with several evaluations a step, a traced grid, or a gradient in the grid.

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.adjoints.InterpolatedAdjoint(steps=12))))(x_T)
    """

    order: int = eqx.field(static=True)
    sigma_data: float = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    nodes: str | tuple[int, ...] = eqx.field(static=True)

    def __init__(self, order: int = 3, sigma_data: float = 1.0, steps: int | None = None, nodes: str | Sequence[int] = "lam"):
        if order not in (1, 2, 3, 4) or not 0 < sigma_data < np.inf:
            raise ValueError(f"InterpolatedAdjoint has orders 1 to 4 and a finite positive sigma_data; got {order!r} and {sigma_data!r}.")
        self.order, self.sigma_data, self.steps = order, float(sigma_data), steps
        self.nodes = nodes if isinstance(nodes, str) else tuple(int(i) for i in nodes)

    def run(self, computation: Computation) -> tuple[Any, Any]:
        solver, name = computation.solver, type(computation.solver).__name__
        if not isinstance(solver, AbstractLinear) or solver.pattern.reads != ("x",) or np.ndim(computation.rows.of_x) != 2:
            raise ValueError(f"InterpolatedAdjoint takes solvers that read the network once a step, at x; {name} does not: use DiscreteAdjoint.")
        if not is_concrete(computation.ts):
            raise ValueError("InterpolatedAdjoint lays its nodes on a concrete grid, and this one is traced: use DiscreteAdjoint.")
        plan = Plan(computation, self.order, self.sigma_data, self.steps, self.nodes)
        shared, _ = computation.shared()
        carry, inputs = computation.carry(), computation.inputs()
        step = closed(computation.step, shared, carry, first(inputs))
        predict = closed(computation.predict, shared, first(inputs).per_step, inputs.t0[0], computation.x)
        blank = lambda p, carry, inputs: computation.advance(answering(computation.term, p), None, carry, inputs)  # noqa: E731
        linear = closed(blank, computation.x, carry, first(inputs))
        return _run((step, predict, linear, shared, carry, inputs), constant(_scales(computation, plan, linear)), plan)


class _Scales(NamedTuple):
    """S `[N]`, Omega `[M]`, and the matrix of (3) for per-step leaves, `[N, M]`; the table."""

    s: Any
    omega: Any
    spread: Any
    table: Table


def _scales(computation: Computation, plan: Plan, linear: Callable) -> _Scales:
    """S by (1) on a state of one number."""
    dtype, carry, inputs = computation.x.dtype, computation.carry(), computation.inputs()
    one = jnp.zeros((1,) * computation.x.ndim, dtype)
    small = jax.tree.map(lambda leaf: one if jnp.shape(leaf) == computation.x.shape else leaf, carry)
    table = Table(*(jnp.asarray(value, dtype) for value in plan.table))
    copies = computation.solver.pattern.copies  # type: ignore[attr-defined]
    noise = None if inputs.noise is None else jnp.zeros((plan.n, computation.solver.draws, *one.shape), dtype)
    steps = inputs._replace(noise=noise, per_step=None)

    def whole(kappa: Any) -> Any:
        x, state = kappa
        return x + sum((state.registers[name] for name in copies), jnp.zeros_like(x))

    def body(kappa: Any, slices: Any) -> tuple[Any, Any]:
        inputs_i, row, size = slices
        size = size / whole(kappa).ravel()[0]
        kappa = jax.tree.map(lambda leaf: leaf * size, kappa)
        advance = lambda p, carry: _floats(computation.advance(answering(computation.term, p), None, eqx.combine(carry, small), inputs_i))  # noqa: E731
        q, (x, state) = jax.vjp(advance, one, _floats(small))[1](kappa)
        return (x + ((row.fraction / row.sigma) - row.of_x) / row.of_p * q, state), q.ravel()[0]

    start = add_to_value(jax.tree.map(zeros_like, _floats(small)), one + 1, False)
    _, s = jax.lax.scan(body, start, (steps, table, jnp.asarray(1 / plan.scale[1:], dtype)), reverse=True)
    outputs = jnp.asarray(plan.of_output, dtype)
    spread = (s / outputs)[:, None] * jnp.asarray(plan.gather, dtype) * outputs[plan.index][None]
    return _Scales(s, jnp.sum(spread, axis=0), spread, table)


def _floats(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_inexact_array)


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, scales: _Scales, plan: Plan) -> tuple[Any, Any]:
    step, _, _, shared, carry, inputs = vjp_arg
    carry, states = run_forward(step, shared, carry, inputs, lambda _, following: value_of(following, plan.paired) if plan.save else None)
    return value_of(carry, plan.paired), states


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, scales: _Scales, plan: Plan) -> tuple[Any, Any]:
    if any(jax.tree.leaves((perturbed[5].row, perturbed[5].t0, perturbed[5].t1))):
        raise ValueError("InterpolatedAdjoint gives no gradient in the grid or the process: use DiscreteAdjoint, or jax.lax.stop_gradient on them.")
    step, _, _, shared, carry, inputs = vjp_arg
    record = lambda following: value_of(following, plan.paired) if plan.save else None  # noqa: E731
    carry, kept, states = run_keeping(step, shared, carry, inputs, plan.index, record)
    return (value_of(carry, plan.paired), states), (kept, perturbed)


class _Back:
    """Equation (1), a step at a time."""

    def __init__(self, linear: Callable, carry: Any, inputs: Inputs, states: Any, noisy: bool, scales: _Scales, plan: Plan):
        self.linear, self.carry, self.inputs, self.states, self.noisy = linear, carry, inputs, states, noisy
        self.table, self.s, self.paired = scales.table, scales.s, plan.paired
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

    def along(self, kappa: Any, way: Way, weights: Any, known: Any, noises: Any) -> tuple[Any, Any]:
        """The steps to a node, r interpolated from what is known."""

        def body(j: Any, acc: Any) -> Any:
            kappa, noises = acc
            i = way.top - j
            kappa, q, noise = self.transposed(kappa, i)
            return self.completed(kappa, q, i, jnp.tensordot(weights[j], known, 1)), _written(noises, noise, i)

        return jax.lax.fori_loop(0, way.count, body, (kappa, noises))

    def at(self, kappa: Any, i: Any, pull: Callable) -> tuple[Any, Any, Any, Any]:
        """A node: kappa_i, r_i, what else the network's transpose gives, and the cotangent of the noise."""
        kappa, q, noise = self.transposed(kappa, i)
        u, table = q / self.s[i], self.table
        of_x, *shares = pull(u)
        r = table.sigma[i] * (table.of_p[i] * of_x + table.of_x[i] * u) - table.fraction[i] * u
        return self.completed(kappa, q, i, r), r, shares, noise


def _written(buffer: Any, value: Any, i: Any) -> Any:
    return None if buffer is None else jax.lax.dynamic_update_index_in_dim(buffer, value, i, 0)


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, scales: _Scales, plan: Plan) -> Any:
    kept, perturbed = residuals
    step, predict, linear, shared, carry, inputs = vjp_arg
    cotangent, states = cotangents
    differentiated, fixed = eqx.partition((predict, shared), (perturbed[1], perturbed[3]))
    per_step, per_step_fixed = eqx.partition(inputs.per_step, perturbed[5].per_step)
    noisy = any(jax.tree.leaves(perturbed[5].noise))
    back = _Back(linear, carry, inputs, states, noisy, scales, plan)

    def node(acc: Any, slices: Any) -> tuple[Any, Any]:
        base, known, total, noises = acc
        way, x, omega = slices
        i = way.index
        here, here_fixed = first((per_step, per_step_fixed), i)

        def answer(x: Any, differentiated: Any, here: Any) -> Any:
            predict, shared = eqx.combine(differentiated, fixed)
            return predict(shared, eqx.combine(here, here_fixed), inputs.t0[i], x)

        pull = jax.vjp(answer, x, differentiated, here)[1]
        ahead, _ = back.along(base, way, way.ahead, known, None)
        once = back.at(ahead, i, pull)

        def again(_: Any) -> tuple[Any, Any]:
            corrected, written = back.along(base, way, way.between, jnp.concatenate([once[1][None], known[:-1]]), noises)
            return back.at(corrected, i, pull), written

        (kappa, r, shares, noise), noises = jax.lax.cond(way.count > 0, again, lambda _: (once, noises), None)
        total = jax.tree.map(lambda sum_, share: add(sum_, omega.astype(share.dtype) * share), total, shares[0])
        base = jax.tree.map(lambda new, old: jnp.where(way.restart, new, old), kappa, base)
        return (base, jnp.concatenate([r[None], known[:-1]]), total, _written(noises, noise, i)), shares[1]

    known, total = jnp.zeros((plan.order, *carry[0].shape), carry[0].dtype), jax.tree.map(accumulator, differentiated)
    start = (add_to_value(back.zero, cotangent, plan.paired), known, total, zeros_like(inputs.noise) if noisy else None)
    slices = (Way(*map(jnp.asarray, plan.way)), kept, scales.omega)
    (kappa, _, total, noises), by_node = jax.lax.scan(node, start, slices)
    of_predict, of_shared = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, differentiated)
    of_per_step = jax.tree.map(lambda share: jnp.tensordot(scales.spread.astype(share.dtype), share, 1), by_node)
    of_step, of_linear, of_inputs = jax.tree.map(lambda _: None, (step, linear, inputs))
    of_inputs = of_inputs._replace(per_step=of_per_step, **({"noise": noises} if noisy else {}))
    return of_step, of_predict, of_linear, of_shared, kappa, of_inputs
