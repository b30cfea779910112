"""How far the states that an invertible solver's steps are undone to lie from those that were sampled, and how many segments keep them close."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._types import Args, ArrayLike
from ..solvers import AbstractPaired, Paired
from ..terms import DiffusionTerm
from ._prepare import prepare
from ._undoing import Plan, Slices, answer, arrays, distance, forward_pass, slices_of, undone
from .reversible import ReversibleAdjoint


def drift(
    term: DiffusionTerm,
    x_T: Any,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: AbstractPaired,
    segments: int = 1,
    key: Any = None,
    noise: Any = None,
) -> Any:
    """What undoing the steps of an invertible solver loses: |undone - sampled| / |sampled| at the start of each segment, maximum norm.

    Cost: N forward and N backward steps of the sampler, no gradient. Memory: segments + 1 pairs.

    Args:
        term, x_T, args, grid, solver, key, noise: as in `sample`.
        segments: as of `ReversibleAdjoint`.

    Returns:
        An array `[segments]`, from noise to data.

    Raises:
        ValueError: as `sample`, and for a solver that cannot be undone.

        aj.adjoints.drift(term, x_T, args, grid=ts, solver=aj.BDIA(), segments=2)
    """
    computation = prepare(term, x_T, args, grid, solver, key, noise, False)
    plan = Plan(computation, ReversibleAdjoint(segments).segments)
    (predict, shared, start, inputs), back = arrays(computation)
    borders = forward_pass((predict, shared, start, inputs), plan)[1]

    def body(pair: Paired, here: Slices) -> tuple[Any, Any]:
        pair = undone(pair, borders, here, plan, lambda s, x: answer(predict, shared, here.inputs, s, x))
        return pair, distance(pair, start, borders, here)

    return jax.lax.scan(body, start, slices_of(inputs, back, plan), reverse=True)[1][plan.first]


def segments_needed(
    term: DiffusionTerm,
    x_T: Any,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: AbstractPaired,
    tol: float,
    key: Any = None,
    noise: Any = None,
) -> int:
    """The smallest power of two (or N) of segments whose `drift` at this x_T stays within tol; each try costs a `drift`.

    Args:
        term, x_T, args, grid, solver, key, noise: as in `sample`; no tracers.
        tol: as of `ReversibleAdjoint`.
    Raises:
        ValueError: where even N segments drift by more; for a tol that is not positive.

        aj.ReversibleAdjoint(segments=aj.adjoints.segments_needed(term, x_T, args, grid=ts, solver=aj.BDIA(), tol=1e-3))
    """
    found = fewest_segments(term, x_T, args, grid=grid, solver=solver, tol=tol, key=key, noise=noise)
    if found is None:
        raise ValueError(f"Every step alone drifts by more than tol={tol:g}: use DiscreteAdjoint, a larger tol, or float64.")
    return found


def fewest_segments(term: DiffusionTerm, x_T: Any, args: Args, *, grid: ArrayLike, tol: float, **more: Any) -> int | None:
    """`segments_needed`, or None where no number is enough."""
    if not tol > 0:
        raise ValueError(f"tol={tol!r}: a positive relative distance.")
    steps, segments = np.size(grid) - 1, 1
    while not float(jnp.max(drift(term, x_T, args, grid=grid, segments=segments, **more))) <= tol:
        if segments >= steps:
            return None
        segments = min(2 * segments, steps)
    return segments
