"""AdjointDEIS: the adjoint ODE solved from data to noise along the sampler's own states.

The adjoint a = dL/dx of dx/dt obeys a linear ODE along the trajectory; in the frame of a splitting and in L = -lam it is not stiff
(equation (1) of `adjoint_jax.adjoints._nodes`). At node k, with one linearisation of the network at x_k (`jax.vjp`, applied once or twice):

    predict     w*_k = w_{k-1} + sum_j P_{k-1,j} g_{k-1-j}                          Adams-Bashforth
    evaluate    g*_k = f_k w*_k - m_k sigma_k J_eps^T (w*_k / m_k)
    correct     w_k = w_{k-1} + C_k0 g*_k + sum_{j>0} C_kj g_{k-j}                  Adams-Moulton
    evaluate    g_k from w_k                                                      (PECE; PEC keeps g*_k; AB stops at w*_k)
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import is_concrete, varying_like, zeros_like
from .._types import State
from ..solvers._base import fit
from ..splitting import Splitting
from ._base import AbstractSamplerAdjoint, check_ode
from ._computation import Computation
from ._continuous import Plan, run
from ._nodes import Nodes, choose, lay_out
from .discrete import DiscreteAdjoint, add, checked_unroll, constant

PUBLISHED_LIMITS = {1: 0.69, 2: 0.46}  # steps in lam above which the published rules amplify the adjoint where it should shrink


class AdjointDEIS(AbstractSamplerAdjoint):
    """The continuous adjoint on the sampler's states, at `steps` of its nodes. Approximate, for fewer network evaluations than the exact gradient.

    Cost: the sampler, then a forward and one (AB, PEC) or two (PECE) backward evaluations a node; memory: the states at the nodes. Its error
    has a floor, the difference between the continuous gradient and that of the sampler that ran: see the README, and `aj.audit`. The
    published rules (`sigma_data=inf, published=True`) are off by factors of ten to a million where steps in lam exceed 0.69 or 0.46.

    Differentiable: x_T and every float leaf of args and of the network that is the same for all steps. Not the grid, not per-step leaves,
    not the inner states of a saved trajectory: those raise and name DiscreteAdjoint. Intervals out of alpha = 0 and into sigma = 0 are
    differentiated exactly where the grid is concrete; on a traced grid (also in `diffeqsolve`) they give NaN.

    Args:
        order: 1 to 4 (published: 1 or 2).
        sigma_data: the frame, the standard deviation that the data are assumed to have: a positive number, 0, infinity, or an array.
        steps: number M of adjoint steps, at most the sampler's N; None is N.
        nodes: "lam" or "t": those of the sampler's times that lie nearest to M + 1 equidistant ones (needs a concrete grid); "index": every
            (N/M)-th; or indices of the grid. Both ends are always nodes, duplicates are merged.
        mode: "PECE", "PEC" or "AB".
        published: the rules of the paper, which are Adams-Bashforth ones ("PECE" then stands for "AB"); needs sigma_data infinite.
        unroll: nodes in one iteration of the backward loop, as `DiscreteAdjoint.unroll`.
    Raises:
        ValueError: for other orders, modes or nodes, and for `published` without sigma_data=inf.
    Reference: Blasingame & Liu, AdjointDEIS (NeurIPS 2024), AdjointDEIS-1 and -2M; Hairer, Norsett & Wanner, Solving ODEs I, III.1.

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.AdjointDEIS(steps=12))))(x_T)
    """

    order: int = eqx.field(static=True)
    splitting: Splitting
    steps: int | None = eqx.field(static=True)
    nodes: str | tuple[int, ...] = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    published: bool = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        order: int = 3,
        sigma_data: Any = 1.0,
        steps: int | None = None,
        nodes: str | Sequence[int] = "lam",
        mode: str = "PECE",
        published: bool = False,
        unroll: int = 1,
    ):
        self.order, self.splitting, self.steps = order, Splitting(sigma_data), steps
        self.published, self.unroll = published, checked_unroll(unroll)
        self.nodes = nodes if isinstance(nodes, str) else tuple(int(i) for i in nodes)
        self.mode = "AB" if published and mode == "PECE" else mode
        if order not in (1, 2) if published else order not in (1, 2, 3, 4):
            raise ValueError(f"AdjointDEIS has orders 1 to 4, and 1 or 2 where published=True; got order={order!r}.")
        if self.mode not in ("AB", "PEC", "PECE"):
            raise ValueError(f'mode={mode!r} is not known: use "PECE", "PEC" or "AB".')
        if published and (self.splitting.kind != "noise" or self.mode != "AB"):
            raise ValueError("The published AdjointDEIS has sigma_data=inf and no corrector: give sigma_data=numpy.inf and leave mode out.")

    @property
    def rule(self) -> "Rule":
        return Rule(self.mode, self.order - 1, 1.0 if self.published else -1.0, self.unroll)

    def run(self, computation: Computation) -> tuple[State, Any]:
        check_ode(self, computation)
        index = choose(computation.ts, computation.term.process.lam(computation.ts), self.steps, self.nodes)
        if not len(index):
            return DiscreteAdjoint(unroll=self.unroll).run(computation)
        visited = index[:-1] if self.mode == "AB" and len(index) > 1 else index  # AB never linearises at the last node
        sweep = lambda linearise, *rest: partial(adams, rule=self.rule)(lambda *at: linearise(*at)[1], *rest)  # noqa: E731
        plan = Plan(computation, "AdjointDEIS", index, visited, visited, sweep)
        return run(computation, self._nodes(computation, index), plan)

    def _nodes(self, computation: Computation, index: np.ndarray) -> Nodes:
        ts = computation.ts[index]
        if self.published and len(index) > 1 and is_concrete(ts):
            longest = float(np.abs(np.diff(computation.term.process.lam(ts))).max())
            if longest > PUBLISHED_LIMITS[self.order]:
                warnings.warn(
                    f"The published AdjointDEIS of order {self.order} is unstable for steps in lam above {PUBLISHED_LIMITS[self.order]}; "
                    f"the longest here is {longest:.2f}, and the gradient may be off by orders of magnitude: use sigma_data=1, published=False.",
                    stacklevel=2,
                )
        nodes = lay_out(computation.term, self.splitting, ts, self.order, self.mode == "AB", self.published)
        nodes = constant(Nodes(*(jnp.asarray(value, computation.x.dtype) for value in nodes)))
        # `gather` also multiplies cotangents of replicated arrays that the network closed over: marked, it would make them vary.
        return varying_like(nodes, computation.x)._replace(gather=nodes.gather)


class Rule(NamedTuple):
    """The mode, the number of past slopes that it uses, the sign of the network's part in g, and the nodes in one iteration of the loop."""

    mode: str
    past: int
    sign: float
    unroll: int = 1


def adams(linearise: Callable, adjoint: State, total: Any, kept: Any, per_step: Any, nodes: Nodes, rule: Rule) -> tuple[State, Any]:
    """The Adams method of the module's docstring, from node 0 (data) to the last (noise)."""

    def combine(start: State, weights: Any, slopes: tuple) -> State:
        return sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), start)

    def body(acc: Any, slices: Any) -> tuple[Any, None]:
        predicted, base, past, total = acc
        x, per_step, node = slices
        transpose = linearise(x, node.t, per_step)
        scale, fraction = fit(node.scale, x), fit(node.fraction, x)

        def pull(w: State) -> tuple[State, Any]:
            a = node.reach * w / scale
            of_x, shares = transpose(node.of_p * a)
            return fraction * w + rule.sign * scale * (node.of_x * a + of_x), shares

        slope, shares = pull(predicted)
        w = predicted
        if rule.mode != "AB":
            w = combine(base, node.correct, (slope, *past))
        if rule.mode == "PECE":
            slope, shares = pull(w)
        weight = rule.sign * node.gather
        total = jax.tree.map(lambda sum_, share: add(sum_, weight.astype(share.dtype) * share), total, shares)
        base = jnp.where(node.anchored > 0, base, w)
        following = combine(base, node.predict, (slope, *past))
        return (following, base, (slope, *past)[: rule.past], total), None

    w = fit(nodes.scale[0], adjoint) * adjoint
    start = (w, w, (zeros_like(w),) * rule.past, total)
    visited = len(nodes.t) - (rule.mode == "AB")
    slices = jax.tree.map(lambda leaf: leaf[:visited], (kept, per_step, nodes))
    (predicted, base, _, total), _ = jax.lax.scan(body, start, slices, unroll=rule.unroll)
    w = predicted if rule.mode == "AB" else base
    return w / fit(nodes.scale[-1], w), total
