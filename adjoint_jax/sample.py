"""The loop: a grid becomes rows of weights, one `lax.scan` of the solver's step runs through them, an adjoint differentiates it."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._numerics import is_concrete
from ._types import Args, ArrayLike, State
from .adjoints import AbstractSamplerAdjoint, DiscreteAdjoint
from .adjoints._computation import Computation, run_direct, value_of
from .adjoints._prepare import prepare as prepare
from .solvers import Paired, Schedule
from .terms import DiffusionTerm


class Trajectory(eqx.Module):
    """The states of a sample: times `ts` `[N + 1]` and states `xs` `[N + 1, *x]`, or a `Paired` of them; xs[0] is x_T, xs[-1] the sample."""

    ts: Any
    xs: Any


def sample(
    term: DiffusionTerm,
    x_T: State | Paired,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: diffrax.AbstractSolver | Schedule | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    key: Any = None,
    noise: Any = None,
    save: bool = False,
) -> Any:
    """Solves dx/dt = alpha' x0 + sigma' eps from x_T along the grid: a sample, differentiable in everything.

    Args:
        term: network, process and prediction.
        x_T: the state at grid[0], any shape; a leading axis is a batch. The state's dtype is promote(x_T, float32). For an exactly
            invertible solver also `aj.Paired(x_T, aux)`, as `invert` returns it, or `aj.Paired(x_T)`: then the answer is a pair too.
        args: what the network is given; float leaves are differentiable; `aj.PerStep(v)` gives interval i its own v[i].
        grid: N + 1 strictly decreasing times of the process, N >= 1. Concrete: weights in float64 on the host. Traced: weights in the
            graph, the grid differentiable under exact adjoints, its order and range unchecked.
        solver: a solver of `aj.solvers`, `DPMSolverPP(order=2)` unless given; an explicit stock diffrax solver stands for
            `ExponentialRK(solver)`, an `aj.Schedule` for `aj.solvers.Scheduled(schedule)`.
        adjoint: `DiscreteAdjoint()` (exact) unless given; never changes the sample.
        key, noise: for stochastic solvers one of the two, for others neither. `noise` `[steps, *x]`, or `[steps, k, *x]` for a solver with k
            draws a step, standard normal and differentiable; a key means `normal(fold_in(key, i), noise.shape[1:])` for step i.
        save: return the whole trajectory.

    Returns:
        x_0 of the shape of x_T, or a `Trajectory` where `save`.

    Raises:
        ValueError: a grid that does not decrease or leaves the process's range, weights that are not finite on it, a network
            whose answer has another shape, `key` or `noise` missing, of another shape or given to a deterministic solver.
        TypeError: a term, solver or adjoint of another kind.
        FloatingPointError: outside of `jit` and `grad`, where x_T or a state is not finite; names the step. Traced computations return NaN.

        x_0 = aj.sample(term, x_T, args, grid=aj.grids.log_snr(term.process, 20))
    """
    return _solve(prepare(term, x_T, args, grid, solver, key, noise, save), adjoint)


def invert(
    term: DiffusionTerm,
    x_0: State | Paired,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: diffrax.AbstractSolver | Schedule | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    key: Any = None,
    noise: Any = None,
    save: bool = False,
) -> Any:
    """Solves the same ODE from data to noise along the same decreasing grid; returns x_T.

    The solver's own error is all that separates it from the exact inverse of `sample`: with DDIM this is DDIM inversion (error of order 1).
    BDIA, BELM, EDICT and Rex are inverted exactly: the answer is an `aj.Paired`, from which `sample` returns to x_0. Where x_0 is a
    state alone, its second one is the same (EDICT, Rex) or found by one step of inversion (BDIA, BELM).
    Arguments, return value and errors as `sample`, with x_0 the state at grid[-1]; the grid must end where the solver's splitting can start
    (sigma > 0 for sigma_data = 0). Of the stochastic solvers Rex alone can be inverted, along the path of the sample: key or noise are the
    sample's own, in its order.

        x_T = aj.invert(term, x_0, args, grid=ts, solver=aj.DEIS(order=3))
    """
    return _solve(prepare(term, x_0, args, grid, solver, key, noise, save, reverse=True), adjoint)


def _solve(computation: Computation, adjoint: Any) -> Any:
    x, states = _run(computation, DiscreteAdjoint() if adjoint is None else adjoint)
    _raise_if_not_finite(computation, x)
    if not computation.save:
        return x
    start = value_of(computation.carry(), computation.paired)
    return Trajectory(computation.ts, jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states))


def _run(computation: Computation, adjoint: Any) -> tuple[Any, Any]:
    if isinstance(adjoint, AbstractSamplerAdjoint):
        try:
            return adjoint.run(computation)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                f"{type(adjoint).__name__} has no forward mode (jvp, jacfwd, linearize): use adjoint=aj.DirectAdjoint(). "
                "Under jit JAX raises its own error instead. Derivatives of jax.grad, jvp(grad) and grad(grad), need no other adjoint."
            ) from error
    if type(adjoint) is diffrax.DirectAdjoint:
        return run_direct(computation)
    raise TypeError(
        f"aj.sample takes the adjoints of aj.adjoints; got {type(adjoint).__name__}: "
        "use it in diffrax.diffeqsolve(term, solver, ..., stepsize_controller=diffrax.StepTo(ts), adjoint=...)."
    )


def _raise_if_not_finite(computation: Computation, x: Any) -> None:
    """Names the first step after which a state is not finite; silent where x is traced."""
    if not is_concrete(x, computation) or all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(x)):
        return
    if not bool(jnp.isfinite(computation.x).all()):
        raise FloatingPointError("x_T holds NaN or infinity: start from finite numbers.")
    carry, inputs = computation.carry(), computation.inputs()
    shared, _ = computation.shared()
    for i in range(computation.steps):
        carry = computation.step(shared, carry, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
        if not bool(jnp.isfinite(carry[0]).all()):
            t = float(np.asarray(computation.ts)[i])
            raise FloatingPointError(
                f"The state is not finite after step {i} of {computation.steps} (t = {t:g}): the network's output is NaN, infinite or too large. "
                "Check its weights, its dtype and that t is in its units."
            )
