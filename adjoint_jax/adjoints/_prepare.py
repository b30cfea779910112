"""From the arguments of `sample` to its computation: what they are checked for, and the rows of weights of a grid."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp

from .. import grids
from .._numerics import at_least_float32, is_concrete
from .._types import Args, State
from ..solvers import AbstractPaired, AbstractSampler, DPMSolverPP, ExponentialRK, Paired, Schedule, Scheduled
from ..solvers._base import as_dtype
from ..terms import DiffusionTerm
from ._computation import Computation


def prepare(term: Any, x: Any, args: Args, grid: Any, solver: Any, key: Any, noise: Any, save: bool, reverse: bool = False) -> Computation:
    """Checks the arguments of `sample` and lays out its computation."""
    if not isinstance(term, DiffusionTerm):
        raise TypeError(f"term must be an aj.DiffusionTerm(network, process, prediction); got {type(term).__name__}.")
    sampler = _as_sampler(solver)
    x, aux, paired = _states(sampler, x)
    if reverse and isinstance(sampler, AbstractPaired):
        sampler, paired = sampler.inverse, True
    elif reverse and sampler.draws:
        raise ValueError(
            f"{type(sampler).__name__} draws noise and cannot be undone: use aj.Rex(tau=...), or aj.solvers.encode_noise for its noises."
        )
    if is_concrete(grid, term.process, sampler):
        ts = grids.check(term.process, grid)
    else:
        ts = jnp.asarray(grid, x.dtype)
        if ts.ndim != 1 or len(ts) < 2:
            raise ValueError(f"A grid is a vector of at least two times; got shape {ts.shape}.")
    ts = ts[::-1] if reverse else ts
    rows = sampler.table(term.process, term.prediction, ts)
    if aux is not None and isinstance(sampler, AbstractPaired):
        rows = sampler.resume(rows)
    draws = _noise(sampler, x, len(ts) - 1, key, noise)
    draws = draws[::-1] if reverse and draws is not None else draws
    return Computation(term, sampler, x, args, ts, as_dtype(rows, x.dtype), save, draws, aux, paired)


def _states(sampler: AbstractSampler, x: Any) -> tuple[State, Any, bool]:
    """The state, the second one or None, and whether it came as a pair."""
    paired = isinstance(x, Paired)
    if paired and not isinstance(sampler, AbstractPaired):
        raise TypeError(f"aj.Paired is for the exactly invertible solvers BDIA, BELM, EDICT and Rex; {type(sampler).__name__} takes an array.")
    x, aux = (x.x, x.aux) if paired else (x, None)
    states = [None if part is None else jnp.asarray(part) for part in (x, aux)]
    for state in states:
        if state is not None and not jnp.issubdtype(state.dtype, jnp.floating):
            raise ValueError(f"x_T must be an array of floats; got dtype {state.dtype}.")
    x, aux = states
    if aux is not None and aux.shape != x.shape:
        raise ValueError(f"The two states of aj.Paired have one shape; got {x.shape} and {aux.shape}.")
    x = x.astype(at_least_float32(x.dtype))
    return x, None if aux is None else aux.astype(x.dtype), paired


def _noise(sampler: AbstractSampler, x: State, steps: int, key: Any, noise: Any) -> Any:
    """The draws of each step, or its key; None for a deterministic solver."""
    name, draws = type(sampler).__name__, sampler.draws
    if not draws:
        if key is not None or noise is not None:
            raise ValueError(f"{name} is deterministic here and draws no noise: leave key and noise None.")
        return None
    if (key is None) == (noise is None):
        raise ValueError(f"{name} draws noise: give either key or noise, not {'both' if noise is not None else 'neither'}.")
    if noise is None:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(steps))
    noise, shape = jnp.asarray(noise), (steps, *(() if draws == 1 else (draws,)), *x.shape)
    if noise.shape != shape or not jnp.issubdtype(noise.dtype, jnp.floating):
        raise ValueError(f"noise for {name} on {steps} steps is an array of floats of shape {shape}; got {noise.dtype} of shape {noise.shape}.")
    return noise.astype(x.dtype).reshape(steps, draws, *x.shape)


def _as_sampler(solver: Any) -> AbstractSampler:
    if solver is None:
        return DPMSolverPP(order=2)
    if isinstance(solver, AbstractSampler):
        return solver
    if isinstance(solver, Schedule):
        return Scheduled(solver)
    if isinstance(solver, diffrax.AbstractSolver):
        return ExponentialRK(solver)
    raise TypeError(f"solver must be a solver of aj.solvers or an explicit diffrax solver; got {type(solver).__name__}.")
