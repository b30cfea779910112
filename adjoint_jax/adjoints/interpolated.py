"""The sampler's own adjoint with the network's share interpolated between nodes: exact at all nodes, and without a floor at a few.

A step of the solvers here is linear in the state, the registers and the network's output p, so that backwards

    (kappa_i, q_i) = [d step / d(carry_i, p_i)]^T kappa_{i+1},    kappa_i += J_i^T q_i in the place of x,   J = dp/dx         (1)

needs the network for J_i^T q_i alone, and kappa is known on all N steps as soon as that is. With S_i the same q_i for a state of one number, whose
J is that of data N(0, c^2) and whose cotangent is 1/m_i at every step (m of `adjoint_jax.splitting`), u_i = q_i / S_i is about m dL/dx and
changes little from step to step, as does what is left of the network's share without that of such data:

    r_i = sigma_i J_eps,i^T u_i - f_i u_i,     f = rho^2 / (c^2 + rho^2).                                              (2)

r is found at M of the N steps, by one linearisation each, and elsewhere is a combination of itself at a few nodes and of u: extrapolated to the
next node, found there, interpolated back, and (PECE) found again from what that gives. The weights are those of polynomials in lam, or fitted
to one sample (`fit_interpolation`). The gradient in conditioning and weights is

    sum_i q_i^T dp_i/dtheta = sum_k Omega_k u_k^T dp_k/dtheta,    Omega_k = sum_i S_i l_ik,                            (3)

l the interpolation from the nodes k to step i, for polynomials that of F of the frame. A continuous adjoint ends where its gradient is that of
the ODE; this one tends to that of the sampler: with a node at every step it is `DiscreteAdjoint`.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import is_concrete, varying_like, zeros_like
from ._at_nodes import Network, check_reads_once, checked_keep, network_of, run_forward_keeping
from ._base import AbstractSamplerAdjoint
from ._computation import Computation, add_to_value, first, parts, run_forward, saved, value_of
from ._interpolation import Fitted, Plan, Rule, Way, polynomials
from ._sweep import Scales, Sweep, scales
from .discrete import accumulator, add


class InterpolatedAdjoint(AbstractSamplerAdjoint):
    """The sampler's own adjoint, the network linearised at `steps` of its N steps, equations (1) to (3). Approximate; exact for steps = N.

    Cost: the sampler, then a forward (none with `keep`) and a backward evaluation a node; a second backward one in PECE where the next node is
    not the next step. Memory: the states at the nodes, or their linearisations. Differentiable: x_T, all states of a saved trajectory, args,
    the network, per-step leaves, injected noise. Not the grid.

    On the flow ViT (48 steps of DPM-Solver++(2M), 8 images) order 3 errs by 3.5e-2, 1.1e-2 and 4.4e-3 in the median at 12, 16 and 24 nodes, on
    a mixture of Gaussians by 1e-2 at 12, where `AdjointDEIS` has 2e-3: what it gains is the floor that the latter has, not accuracy at few nodes.
    `aj.adjoints.fit_interpolation` makes one of these that errs by 3 times less at few nodes and by 1000 times less near N.

    Args:
        order: of the interpolation, 1 to 4.
        sigma_data: c of the frame, the standard deviation that the data are assumed to have, a positive number.
        steps: number M of nodes, at most the sampler's N; None is N, the exact gradient.
        nodes: "lam", "t", "index" or indices of steps, as `AdjointDEIS`; the first and the last step are always nodes.
        mode: "PECE" or "PEC".
        keep: whether the nodes keep their linearisations, which saves M forward evaluations.
        fitted: what `fit_interpolation` found, in place of polynomials: it has order, sigma_data, steps and nodes of its own, and PEC.
    Raises:
        ValueError: for another order, mode or sigma_data, a solver with several evaluations a step, a traced grid, or a gradient in the grid.

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.adjoints.InterpolatedAdjoint(steps=12))))(x_T)
    """

    order: int = eqx.field(static=True)
    sigma_data: float = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    nodes: str | tuple[int, ...] = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    keep: bool = eqx.field(static=True)
    fitted: Fitted | None = eqx.field(static=True)

    def __init__(
        self,
        order: int = 3,
        sigma_data: float = 1.0,
        steps: int | None = None,
        nodes: str | Sequence[int] = "lam",
        mode: str = "PECE",
        keep: bool = False,
        fitted: Fitted | None = None,
    ):
        if order not in (1, 2, 3, 4) or not 0 < sigma_data < np.inf:
            raise ValueError(f"InterpolatedAdjoint has orders 1 to 4 and a finite positive sigma_data; got {order!r} and {sigma_data!r}.")
        if mode not in ("PECE", "PEC"):
            raise ValueError(f'mode={mode!r} is not known: use "PECE" or "PEC".')
        self.order, self.sigma_data, self.steps, self.mode, self.fitted = order, float(sigma_data), steps, mode, fitted
        self.keep = checked_keep(keep, "InterpolatedAdjoint")
        if fitted is not None:
            index = fitted.rule.nodes[::-1]
            self.order, self.sigma_data, self.steps, self.mode, nodes = fitted.order, fitted.sigma_data, len(index), "PEC", index.tolist()
        self.nodes = nodes if isinstance(nodes, str) else tuple(int(i) for i in nodes)

    def run(self, computation: Computation) -> tuple[Any, Any]:
        check_linear(computation)
        plan = Plan(computation, self.sigma_data, self.order, self.mode, self.keep, self.rule(computation))
        return _run(parts(computation), scales(computation, plan), plan)

    def rule(self, computation: Computation) -> Rule:
        """The nodes and the weights."""
        if self.fitted is None:
            return polynomials(computation, self.order, self.sigma_data, self.steps, self.nodes)
        self.fitted.check(computation)
        return self.fitted.rule


def check_linear(computation: Computation) -> None:
    """Raises where (1) is not what a step is."""
    check_reads_once(computation, "InterpolatedAdjoint")
    if np.ndim(computation.rows.of_x) != 2:
        raise ValueError("InterpolatedAdjoint takes splittings of one number, and sigma_data here is an array: use DiscreteAdjoint.")
    if not is_concrete(computation.ts):
        raise ValueError("InterpolatedAdjoint lays its nodes on a concrete grid, and this one is traced: use DiscreteAdjoint.")


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, scales: Scales, plan: Plan) -> tuple[Any, Any]:
    step, _, _, shared, carry, inputs = vjp_arg
    carry, states = run_forward(step, shared, carry, inputs, lambda _, following: saved(following, plan.save, plan.paired))
    return value_of(carry, plan.paired), states


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, scales: Scales, plan: Plan) -> tuple[Any, Any]:
    if any(jax.tree.leaves((perturbed[5].row, perturbed[5].t0, perturbed[5].t1))):
        raise ValueError("InterpolatedAdjoint gives no gradient in the grid or the process: use DiscreteAdjoint, or jax.lax.stop_gradient on them.")
    record = lambda following: saved(following, plan.save, plan.paired)  # noqa: E731
    carry, kept, states = run_forward_keeping(vjp_arg, perturbed, plan.rule.nodes, plan.keep, record)
    return (value_of(carry, plan.paired), states), (kept, perturbed)


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, scales: Scales, plan: Plan) -> Any:
    kept, perturbed = residuals
    step, _, linear, _, carry, inputs = vjp_arg
    cotangent, states = cotangents
    network, rule = network_of(vjp_arg, perturbed), plan.rule
    noisy = any(jax.tree.leaves(perturbed[5].noise))
    sweep = Sweep(linear, carry, inputs, states, noisy, varying_like(scales, carry[0]), plan.paired)
    spread = _spread(rule, scales, network)
    omega = jax.tree.map(lambda share: jnp.sum(share, axis=0), spread[0])

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        base, known, total, noises = acc
        way, k, omega = slices
        pull = kept.whole(first(kept.stacked, k)) if plan.keep else network.at(kept[k], way.index)[1]
        kappa, r, shares, noises = sweep.node(base, way, known, pull, noises, plan.twice)
        total = jax.tree.map(lambda sum_, share, weight: add(sum_, weight.astype(share.dtype) * share), total, shares[0], omega)
        base = jax.tree.map(lambda new, old: jnp.where(way.restart, new, old), kappa, base)
        return (base, jnp.concatenate([r[None], known[:-1]]), total, noises), shares[1]

    table = lambda values: varying_like(jnp.asarray(values, dtype) if values.dtype == np.float64 else jnp.asarray(values), carry[0])  # noqa: E731
    dtype, known = carry[0].dtype, varying_like(jnp.zeros((plan.order, *carry[0].shape), carry[0].dtype), carry[0])
    start = (
        add_to_value(sweep.zero, cotangent, plan.paired),
        known,
        jax.tree.map(accumulator, network.differentiated),
        zeros_like(inputs.noise) if noisy else None,
    )
    way = Way(*map(table, rule.way))
    (kappa, known, total, noises), by_node = jax.lax.scan(body, start, (way, jnp.arange(len(rule.nodes)), omega))
    if len(rule.tail):
        kappa, noises = sweep.along(kappa, len(rule.tail) - 1, len(rule.tail), table(rule.tail), known, noises)
    of_predict, of_shared = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, network.differentiated)
    of_per_step = jax.tree.map(lambda share, weights: jnp.tensordot(weights.astype(share.dtype), share, 1), by_node, spread[1])
    of_step, of_linear, of_inputs = jax.tree.map(lambda _: None, (step, linear, inputs))
    of_inputs = of_inputs._replace(per_step=of_per_step, **({"noise": noises} if noisy else {}))
    return of_step, of_predict, of_linear, of_shared, kappa, of_inputs


def _spread(rule: Rule, scales: Scales, network: Network) -> Any:
    """S_i l_ik of (3), `[N, M]`, for each leaf of what is differentiated."""
    weights = lambda gather: scales.s[:, None] * jnp.asarray(gather, scales.s.dtype)  # noqa: E731
    if isinstance(rule.gather, np.ndarray):
        alike = weights(rule.gather)
        return jax.tree.map(lambda _: alike, (network.differentiated, network.per_step))
    floats = network.whole
    if len(rule.gather) != len(jax.tree.leaves(floats)):
        raise ValueError("This adjoint was fitted to arguments or a network with other leaves: fit another one.")
    return eqx.filter(jax.tree.unflatten(jax.tree.structure(floats), map(weights, rule.gather)), network.wanted)
