"""AdjointDEIS: the adjoint of the ODE or of the SDE solved from data to noise along the sampler's own states.

The adjoint a = dL/dx obeys a linear ODE along the trajectory, for the SDE too; in the frame of a splitting and in L = -lam it is not stiff
(equation (1) of `adjoint_jax.adjoints._nodes`). At node k, with one linearisation of the network at x_k (`jax.vjp`, applied once or twice):

    predict     w*_k = w_{k-1} + sum_j P_{k-1,j} g_{k-1-j}                          Adams-Bashforth (Heun: Euler)
    evaluate    g*_k = kappa (f_k w*_k - m_k sigma_k J_eps^T (w*_k / m_k))
    correct     w_k = w_{k-1} + C_k0 g*_k + sum_{j>0} C_kj g_{k-j}                  Adams-Moulton (Heun: the trapezoid)
    evaluate    g_k from w_k                                                      (PECE, Heun; PEC keeps g*_k; AB stops at w*_k)

m standing for m^kappa alpha^(1-kappa) where kappa = 1 + tau^2 is not 1. An SDE's path is rough, x moves by h^(1/2) in a step of h: the order is 1
whatever the method's. The states are those that the sampler kept: integrating them backwards is unstable.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import at_least_float32, is_concrete, varying_like, zeros_like
from .._types import State
from ..solvers._base import fit
from ..splitting import Splitting
from ._at_nodes import check_reads_once, checked_keep
from ._base import AbstractSamplerAdjoint, followed
from ._computation import Computation, Inputs
from ._continuous import Plan, run
from ._nodes import Intervals, Nodes, Rule, choose, lay_out
from .discrete import DiscreteAdjoint, add, constant

PUBLISHED_LIMITS = {1: 0.69, 2: 0.46}  # steps in lam above which the published rules amplify the adjoint where it should shrink


class AdjointDEIS(AbstractSamplerAdjoint):
    """The continuous adjoint on the sampler's states, at `steps` of its nodes. Approximate, for fewer network evaluations than the exact gradient.

    Cost: the sampler, then a forward and one (AB, PEC) or two (PECE, Heun) backward evaluations a node; memory: the states at the nodes, and
    two more a node where injected noise is differentiated. Its error has a floor, the difference between the continuous gradient and that of
    the sampler that ran: see the README, and `aj.audit`. The published rules (`sigma_data=inf, published=True`) are off by factors of ten to a
    million where steps in lam exceed 0.69 or 0.46 (divided by kappa, below).

    Of a stochastic solver it is the adjoint of the SDE of its tau (eta of DDIM and of ancestral steps): kappa = 1 + tau^2 on the whole right side,
    order 1 on each path.

    Differentiable: x_T, every float leaf of args and of the network, injected noise, and `aj.PerStep` leaves, of which interval i gets the
    integral over itself. Not the grid, not the inner states of a saved trajectory: those raise and name DiscreteAdjoint. Intervals out of
    alpha = 0 and into sigma = 0 are differentiated exactly where the grid is concrete; on a traced grid (also in `diffeqsolve`) they give NaN.

    A node sees the value of the interval that it starts. So the gradients by interval have their order for equal values and a one-step sampler;
    where values differ, order 1, in all inputs; and next to a jump that one interval's is wrong. A multistep sampler asks the network at the
    start of an interval alone, and its own gradient differs from the integral by order 1: `integral_order=1`, with all nodes, has these best.

    Args:
        order: 1 to 4 (published=True: 1 or 2; Heun: 2).
        sigma_data: the frame, the standard deviation that the data are assumed to have: a positive number, 0, infinity, or an array.
        steps: number M of adjoint steps, at most the sampler's N; None is N.
        nodes: "lam" or "t": those of the sampler's times that lie nearest to M + 1 equidistant ones (needs a concrete grid); "index": every
            (N/M)-th; or indices of the grid. Both ends are always nodes, duplicates are merged.
        mode: "PECE", "PEC", "AB" or "Heun".
        published: the rules of the paper, which are Adams-Bashforth ones ("PECE" then stands for "AB"); needs sigma_data infinite. "exact": the
            same method with the exact weights int e^L l_j(L) dL, L = -lam, in place of the ratio h / (2 h_prev) of its second order.
        integral_order: order of the integrals of args, network and per-step leaves, of the same range; None is `order`.
        keep: whether the nodes keep the linearisations that the sampler makes there: one forward evaluation (at its end) instead of one a node,
            in the memory of a linearisation a node. For solvers that read the network once a step, at x.
    Raises:
        ValueError: for other orders, modes or nodes, for `published` without sigma_data=inf, and for `keep` with another solver.
    Reference: Blasingame & Liu, AdjointDEIS (NeurIPS 2024), AdjointDEIS-1 and -2M; Hairer, Norsett & Wanner, Solving ODEs I, III.1.

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.AdjointDEIS(steps=12))))(x_T)
    """

    order: int = eqx.field(static=True)
    splitting: Splitting
    steps: int | None = eqx.field(static=True)
    nodes: str | tuple[int, ...] = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    published: bool | str = eqx.field(static=True)
    integral_order: int = eqx.field(static=True)
    keep: bool = eqx.field(static=True)

    def __init__(
        self,
        order: int = 3,
        sigma_data: Any = 1.0,
        steps: int | None = None,
        nodes: str | Sequence[int] = "lam",
        mode: str = "PECE",
        published: bool | str = False,
        integral_order: int | None = None,
        keep: bool = False,
    ):
        self.order, self.splitting, self.steps = order, Splitting(sigma_data), steps
        self.published, self.keep = published, checked_keep(keep, "AdjointDEIS")
        self.nodes = nodes if isinstance(nodes, str) else tuple(int(i) for i in nodes)
        self.mode = "AB" if published and mode == "PECE" else mode
        self.integral_order = order if integral_order is None else integral_order
        orders = (1, 2) if published is True else (1, 2, 3, 4)
        if order not in orders or self.integral_order not in orders:
            named = f"order={order!r}" if integral_order is None else f"order={order!r}, integral_order={integral_order!r}"
            raise ValueError(f"AdjointDEIS has orders 1 to 4, and 1 or 2 where published=True; got {named}.")
        if self.mode not in ("AB", "PEC", "PECE", "Heun"):
            raise ValueError(f'mode={mode!r} is not known: use "PECE", "PEC", "AB" or "Heun".')
        if self.mode == "Heun" and order != 2:
            raise ValueError(f'mode="Heun" is of order 2: give order=2; got order={order!r}.')
        if published not in (False, True, "exact"):
            raise ValueError(f'published={published!r} is not known: use True or "exact".')
        if published and (self.splitting.kind != "noise" or self.mode != "AB"):
            raise ValueError("The published AdjointDEIS has sigma_data=inf and no corrector: give sigma_data=numpy.inf and leave mode out.")

    @property
    def rule(self) -> Rule:
        return Rule(self.order, self.integral_order, self.mode, self.published)

    def run(self, computation: Computation) -> tuple[State, Any]:
        splitting = Splitting(self.splitting.sigma_data, followed(self, computation, stochastic=True))
        index = choose(computation.ts, computation.term.process.lam(computation.ts), self.steps, self.nodes)
        if not len(index):
            return DiscreteAdjoint().run(computation)
        if self.keep:
            check_reads_once(computation, "AdjointDEIS(keep=True)")
        visited = index[:-1] if self.mode == "AB" and len(index) > 1 else index  # AB never linearises at the last node

        def sweep(linearise: Callable, adjoint: State, total: Any, kept: Any, per_step: Any, nodes: Any, noisy: bool) -> tuple[State, Any, Any]:
            transposes = lambda *at: linearise(*at)[1]  # noqa: E731
            return adams(transposes, adjoint, total, kept, per_step, nodes[0], noisy, rule=self.rule)

        plan = Plan(computation, "AdjointDEIS", index, visited, visited, sweep, between, self.keep)
        return run(computation, self._nodes(computation, splitting, index), plan)

    def _nodes(self, computation: Computation, splitting: Splitting, index: np.ndarray) -> tuple[Nodes, Intervals]:
        ts, x = computation.ts, computation.x
        limit = PUBLISHED_LIMITS.get(self.order, np.inf) / (1 + splitting.tau**2)
        if self.published and len(index) > 1 and is_concrete(ts):
            longest = float(np.abs(np.diff(computation.term.process.lam(ts[index]))).max())
            if longest > limit:
                warnings.warn(
                    f"The published AdjointDEIS of order {self.order} is unstable for steps in lam above {limit:.2g}; "
                    f"the longest here is {longest:.2f}, and the gradient may be off by orders of magnitude: use sigma_data=1, published=False.",
                    stacklevel=2,
                )
        laid_out = lay_out(computation.term, splitting, ts, index, self.rule)
        nodes, intervals = constant(jax.tree.map(lambda value: jnp.asarray(value, None if value.dtype == int else x.dtype), laid_out))
        if not jax.tree.leaves(computation.inputs().per_step):
            intervals = intervals._replace(spread=None)  # [N, K], for per-step leaves alone
        # `gather` also multiplies cotangents of replicated arrays that the network closed over: marked, it would make them vary.
        return varying_like(nodes, x)._replace(gather=nodes.gather), varying_like(intervals, x)


def adams(
    linearise: Callable,
    adjoint: State,
    total: Any,
    kept: Any,
    per_step: Any,
    nodes: Nodes,
    noisy: bool = False,
    *,
    rule: Rule,
) -> tuple[State, Any, Any]:
    """The Adams method of the module's docstring, from node 0 (data) to the last (noise). Its trail: (w_k, g_k) if `noisy`, the per-step shares."""

    def combine(start: State, weights: Any, slopes: tuple) -> State:
        return sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), start)

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        predicted, base, past, total = acc
        here, per_step, node = slices
        transpose = linearise(here, node.t, per_step)
        scale, fraction = fit(node.scale, predicted), fit(node.fraction, predicted)

        def pull(w: State) -> tuple[State, Any, Any]:
            a = node.reach * w / scale
            of_x, *shares = transpose(node.of_p * a)
            return fraction * w + scale * (node.of_x * a + of_x), *shares

        slope, shares, own = pull(predicted)
        w = predicted
        if rule.mode != "AB":
            w = combine(base, node.correct, (slope, *past))
        if rule.mode in ("PECE", "Heun"):
            slope, shares, own = pull(w)
        total = jax.tree.map(lambda sum_, share: add(sum_, node.gather.astype(share.dtype) * share), total, shares)
        base = jnp.where(node.anchored > 0, base, w)
        following = combine(base, node.predict, (slope, *past))
        return (following, base, (slope, *past)[: rule.order - 1], total), ((w, slope) if noisy else None, own)

    w = fit(nodes.scale[0], adjoint) * adjoint
    start = (w, w, (zeros_like(w),) * (rule.order - 1), total)
    visited = len(nodes.t) - (rule.mode == "AB")
    slices = jax.tree.map(lambda leaf: leaf[:visited], (kept, per_step, nodes))
    (predicted, base, _, total), (along, own) = jax.lax.scan(body, start, slices)
    w = predicted if rule.mode == "AB" else base
    if noisy and rule.mode == "AB":
        along = jax.tree.map(lambda stack, last: jnp.concatenate([stack, last[None]]), along, (w, zeros_like(w)))
    return w / fit(nodes.scale[-1], w), total, (along, own)


def between(trail: Any, nodes: tuple[Nodes, Intervals], inner: tuple[Inputs, Inputs], noise_share: Callable) -> Inputs:
    """The gradients in the noise and the per-step leaves of the intervals between the nodes, (2) of `adjoint_jax.adjoints._nodes`."""
    (along, own), (_, intervals), (given, inputs) = trail, nodes, inner

    def of_leaf(share: Any) -> Any:
        wide = share.astype(at_least_float32(share.dtype))
        spread = intervals.spread[:, : len(share)].astype(wide.dtype)
        return jnp.tensordot(spread, wide, 1).astype(share.dtype)

    def of_noise(slices: Any) -> Any:
        inputs, top, near, scale = slices
        w, slopes = along
        here = jnp.tensordot(near, jnp.stack([w[top - 1], w[top], slopes[top - 1], slopes[top]]), 1)
        return noise_share(here / fit(scale, here), inputs)

    noise = None if along is None else jax.lax.map(of_noise, (inputs, intervals.top, intervals.near, intervals.scale))
    return given._replace(per_step=jax.tree.map(of_leaf, own), noise=noise)
