"""The exact gradient in memory that does not grow with the number of steps: states are undone, not stored.

Backwards from the stored pair after the last step of a segment, with the inverse Phi_i^-1 of each step of an invertible solver,

    (x_i, y_i) = Phi_i^-1(x_{i+1}, y_{i+1}),    lambda_i = [d Phi_i / d(x_i, y_i)]^T lambda_{i+1},    lambda = dL/d(x, y).       (1)

Phi_i^-1 asks the network at the points where Phi_i asked it (BDIA and BELM at x_i; EDICT and Rex at the stages from either chain), so one
linearisation at each serves both: with F_s = A_s X_s + B_s p_s the step is linear in (x_i, y_i) and in the answers p_s, and

    lambda_i = M^T (lambda_{i+1}, xi_0, xi_1, ...),    xi_s = [dp_s / dX_s]^T (the share of p_s),    s = S-1 .. 0,              (2)

M the linear map from pair and answers to the pair after the step and the points X_s. Cost: N forward, then N (forward + backward), for all
four. Rounding errors grow on the way back (by 1/gamma or m_0/m_1 a step), but not across the stored borders of the segments.
"""

import warnings
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import mesh_axes, zeros_like
from .._traced import in_order
from ..solvers import Paired
from ._base import AbstractSamplerAdjoint
from ._computation import Computation
from ._undoing import Plan, answer, arrays, distance, forward_pass, slices_of, step, undone
from .discrete import accumulator


class ReversibleAdjoint(AbstractSamplerAdjoint):
    """The exact gradient, equation (1), in memory of segments + 1 pairs of states whatever the number of steps. For BDIA, BELM, EDICT and Rex.

    Differentiable: all that `DiscreteAdjoint` differentiates, at its cost. Exact up to the drift, by which the states that are undone differ
    from those that were sampled: `aj.adjoints.drift` measures it, `aj.adjoints.segments_needed` finds the segments that keep it small. Largest
    drift in float32 on a Gaussian mixture on VPLinear, 50 steps even in lam, t from 1 to 1e-3 (the gradient errs by less: 5e-2 for BDIA(0.5)
    in one segment, 3e-6 for Rex):

        segments        BDIA    BDIA(0.5)   BELM    EDICT   Rex     Rex(Heun, tau=1)
        1               8e-7    3e7         3e-4    5e-7    1e-3    2e3
        4               3e-7    3e-4        4e-6    9e-7    1e-5    2e-3
        16              2e-7    7e-7        2e-7    2e-7    4e-7    2e-6
        1, in float64   8e-16   5e-2        2e-12   4e-16   2e-12   5e-6

    Args:
        segments: stretches of steps between stored pairs; at most the number of steps, which are then all stored.
        tol: largest drift, |undone - sampled| / |sampled| in the maximum norm at the start of any segment; above it every cotangent is NaN, and a
            warning names the number, from compiled programs too. None: not measured.
    Raises:
        ValueError: for segments < 1, a solver that cannot be undone, or one whose inverse is not defined on the grid.
    Reference: McCallum & Foster, Efficient, accurate and stable gradients for neural ODEs (2024); Blasingame & Liu, Rex (2025).

        rex, reversible = aj.Rex(diffrax.Midpoint()), aj.ReversibleAdjoint(segments=4, tol=1e-3)
        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, solver=rex, adjoint=reversible)))(x_T)
    """

    segments: int = eqx.field(static=True)
    tol: float | None = eqx.field(static=True)

    def __init__(self, segments: int = 1, tol: float | None = None):
        if segments < 1:
            raise ValueError(f"ReversibleAdjoint's segments are a number of stretches, at least 1; got {segments!r}.")
        self.segments, self.tol = int(segments), None if tol is None else float(tol)

    def run(self, computation: Computation) -> tuple[Any, Any]:
        vjp_arg, back = arrays(computation)
        return _run(vjp_arg, back, Plan(computation, self.segments, self.tol))


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, back: Any, plan: Plan) -> tuple[Any, Any]:
    return forward_pass(vjp_arg, plan)[0]


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, back: Any, plan: Plan) -> tuple[Any, Any]:
    out, borders = forward_pass(vjp_arg, plan)
    return out, (borders, perturbed)


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, back: Any, plan: Plan) -> Any:
    borders, perturbed = residuals
    predict, shared, start, inputs = vjp_arg
    differentiated, fixed = eqx.partition((predict, shared), perturbed[:2])
    cotangent_x, cotangent_states = cotangents

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        pair, cotangent, total = acc
        here, cotangent_state = slices
        cotangent = _plus(cotangent, cotangent_state)
        inputs_diff, inputs_fixed = eqx.partition(here.inputs, perturbed[3])
        answers, pulls = {}, {}

        def linearise(s: int, x: Any) -> Any:
            def local(x: Any, differentiated: Any, inputs_diff: Any) -> Any:
                predict, shared = eqx.combine(differentiated, fixed)
                return answer(predict, shared, eqx.combine(inputs_diff, inputs_fixed), s, x)

            answers[s], transpose = jax.vjp(local, x, differentiated, inputs_diff)
            pulls[s] = in_order(transpose)
            return answers[s]

        def linear(inputs_diff: Any) -> Any:
            points, inputs = {}, eqx.combine(inputs_diff, inputs_fixed)
            take = lambda s, x: points.update({s: x}) or answers[s]  # noqa: E731
            return step(plan.solver, pair, inputs, inputs.row._replace(active=None), take), points

        pair = undone(pair, borders, here, plan, linearise)
        xi, shares, inputs_shares = {}, [], []

        def pull(s: int, of_answer: Any) -> Any:
            xi[s], share, inputs_share = pulls[s](of_answer)
            shares.append(share)
            inputs_shares.append(inputs_share)
            return xi[s]

        found = plan.solver.pull_back(here.inputs.row, cotangent.x, {"aux": cotangent.aux}, pull)  # (2)
        if jax.tree.leaves(inputs_diff):
            inputs_shares += jax.vjp(linear, inputs_diff)[1]((cotangent, xi))
        cotangent = Paired(*(found.get(name, zeros_like(pair.x)) for name in ("x", "aux")))
        total = jax.tree.map(lambda sum_, *shares: sum(map(lambda share: share.astype(sum_.dtype), shares), sum_), total, *shares)
        drift = None if plan.tol is None else distance(pair, start, borders, here)
        return (pair, cotangent, total), (jax.tree.map(lambda *shares: sum(shares), *inputs_shares), drift)

    acc = (start, _plus(jax.tree.map(zeros_like, start), cotangent_x), jax.tree.map(accumulator, differentiated))
    slices = (slices_of(inputs, back, plan), cotangent_states)
    (_, cotangent, total), (per_input, drifts) = jax.lax.scan(body, acc, slices, reverse=True)
    shares = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, differentiated)
    return _guard((*shares, cotangent, per_input), drifts, plan)


def _plus(pair: Paired, share: Any) -> Paired:
    """The cotangent of a pair with that of its state, or of both, added, of which parts may be None."""
    share = share if isinstance(share, Paired) else Paired(share)
    return Paired(*(old if new is None else old + new for old, new in ((pair.x, share.x), (pair.aux, share.aux))))


def _guard(cotangents: Any, drifts: Any, plan: Plan) -> Any:
    """NaN in every cotangent, and a warning, where the drift is above tol or is NaN itself."""
    tol = plan.tol
    if tol is None:
        return cotangents
    drift = jnp.max(drifts)
    jax.debug.callback(partial(_warn, tol, plan.count), drift)

    def poison(leaf: Any) -> Any:
        axes = tuple(mesh_axes(drift) - mesh_axes(leaf))  # a replicated parameter's cotangent is poisoned on every device
        worst = jax.lax.pmax(drift, axes) if axes else drift
        return jnp.where(worst <= tol, leaf, jnp.full_like(leaf, jnp.nan))

    return jax.tree.map(poison, cotangents)


def _warn(tol: float, segments: int, drift: Any) -> None:
    if not drift <= tol:
        warnings.warn(
            f"ReversibleAdjoint: undoing {segments} segment(s) drifts by {float(drift):.1e}, more than tol={tol:g}, and the gradient is NaN: "
            f"use more segments, ReversibleAdjoint(segments={2 * segments}).",
            stacklevel=2,
        )
