"""Interpolated adjoints whose nodes and weights are fitted to one exact backward pass."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._types import Args
from ..splitting import level
from ..terms import DiffusionTerm
from ._at_nodes import Network, states_kept
from ._computation import Computation, add_to_value, parts
from ._fitting import Record, fitted_rule
from ._interpolation import Fitted, Plan, polynomials
from ._prepare import prepare
from ._sweep import Sweep, scales, whole
from .interpolated import InterpolatedAdjoint, check_linear

SKETCH = 1024
"""Entries of a leaf's gradient that are recorded."""


def fit_interpolation(
    term: DiffusionTerm,
    x_T: Any,
    args: Args = None,
    *,
    grid: Any,
    solver: Any = None,
    steps: int | None = None,
    tol: float = 5e-3,
    order: int = 3,
    sigma_data: float = 1.0,
    keep: bool = False,
    pilots: int = 4,
    key: Any = None,
    noise: Any = None,
    seed: int = 0,
) -> InterpolatedAdjoint:
    """An `InterpolatedAdjoint` whose nodes and weights are those of least squares on one sample, for use on others.

    A pilot differentiates <x_0, e> exactly for a few random e and records at every step what the adjoint would interpolate. What is fitted are
    a handful of numbers a step, so that one batch of 4 to 16 states serves other noise, conditions and losses, as long as term, grid
    and solver stay. Cost, once: N forward, N (forward + `pilots` backward) evaluations, in memory of 2 N `pilots` states.

    Args:
        term, x_T, args, grid, solver, key, noise: as `aj.sample`; the grid concrete.
        steps: number M of nodes; None: as few as the predicted relative error `tol` of dL/dx_T allows.
        order: nodes in a combination, 1 to 4; sigma_data: c of the frame.
        keep: as `InterpolatedAdjoint`.
        pilots: random cotangents; more of them only for gradients in a few numbers (a guidance scale).
        seed: of the cotangents.
    Returns:
        The adjoint; its `fitted.error` is the predicted relative error of dL/dx_T, and `fitted.save(path)` writes it:
        `InterpolatedAdjoint(fitted=Fitted.load(path))`.
    Raises:
        ValueError: as `InterpolatedAdjoint`, and for steps not from 1 to N.

        adjoint = aj.adjoints.fit_interpolation(term, x_T, args, grid=ts, solver=solver, tol=5e-3)
        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, solver=solver, adjoint=adjoint)))(other_x_T)
    """
    computation = prepare(term, x_T, args, grid, solver, key, noise, False)
    check_linear(computation)
    if steps is not None and not 1 <= steps <= computation.steps:
        raise ValueError(f"steps={steps}: choose between 1 and the sampler's {computation.steps}.")
    cotangents = jax.random.normal(jax.random.key(seed), (pilots, *computation.x.shape), computation.x.dtype)
    every = Plan(computation, sigma_data, order, "PEC", False, polynomials(computation, 1, sigma_data, None, "index"))
    s, (r, u, size, leaves) = eqx.filter_jit(_record)(computation, every, cotangents)
    at = level(term.process, np.asarray(computation.ts, np.float64)[:-1])
    record = Record(r, u, size, np.asarray(s, np.float64) / (every.table.sigma * every.table.of_p), at.lam, jax.tree.leaves(leaves))
    rule, error = fitted_rule(record, order, steps, tol)
    name = type(computation.solver).__name__
    return InterpolatedAdjoint(keep=keep, fitted=Fitted(rule, error, np.asarray(computation.ts, np.float64), name, order, float(sigma_data)))


def _record(computation: Computation, plan: Plan, cotangents: Any) -> tuple[Any, tuple]:
    """S `[N]`; then r and u `[N, pilots, images, size]`, the norms of dL/dx_i `[N, pilots, images]`, and a part of each leaf's g,
    `[N, pilots, size]`."""
    step, predict, linear, shared, carry, inputs = parts(computation)
    network = Network(predict, shared, inputs, jax.tree.map(eqx.is_inexact_array, (predict, shared, inputs.per_step)))
    _, kept, _ = states_kept(step, shared, carry, inputs, plan.rule.nodes, lambda _: None)
    sweep = Sweep(linear, carry, inputs, None, False, scales(computation, plan), computation.paired)
    x = computation.x
    images = lambda r: r.reshape(x.shape[0] if x.ndim > 1 else 1, -1)  # noqa: E731

    def body(kappas: Any, slices: Any) -> tuple[Any, Any]:
        x, i = slices
        pull = network.at(x, i)[1]

        def pilot(kappa: Any) -> Any:
            u = sweep.transposed(kappa, i)[1] / sweep.s[i]
            kappa, r, shares, _ = sweep.at(kappa, i, pull)
            part = jax.tree.map(lambda share: share.ravel()[:: max(share.size // SKETCH, 1)], shares)
            return kappa, (images(r), images(u), jnp.linalg.norm(images(whole(computation, kappa)), axis=-1), part)

        return jax.vmap(pilot)(kappas)

    start = jax.vmap(lambda e: add_to_value(sweep.zero, e, False))(cotangents)
    _, found = jax.lax.scan(body, start, (kept, jnp.asarray(plan.rule.nodes)))
    return sweep.s, jax.tree.map(lambda leaf: leaf[::-1], found)
