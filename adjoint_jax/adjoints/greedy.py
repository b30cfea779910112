"""The gradient of a loss on the clean sample at a state on the way to it: from one network evaluation to the whole rest of the sampler.

    posterior     d/dx L(x0(x, t)),    x0 the network's clean state at (x, t)                                          (1)
    look-ahead    d/dx L(x0(x_{k-1}, s_{k-1})),    x_0 = x at s_0 = t, then k - 1 steps of a sampler to s_{k-1}             (2)

(2) with k = 1 is (1); with as many evaluations as the sampler has left it is the full gradient, where DDIM's last step goes to sigma = 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import is_concrete
from .._types import Args, ArrayLike, State
from ..terms import DiffusionTerm
from ._prepare import prepare
from .discrete import DiscreteAdjoint


def posterior_gradient(loss: Callable[[State], Any], term: DiffusionTerm, x: State, t: Any, args: Args = None) -> State:
    """dL/dx of the loss on the clean state that the network sees at (x, t), equation (1): the gradient of diffusion posterior sampling.

    One forward and one backward evaluation. Blind to all later steps: at large t, where x0 is a mean over many samples, it is off in
    direction as well as in length.

    Args:
        loss: maps a state, `[*x]`, to a scalar.
        term, args: as in `sample`.
        x: the state at time t, `[*x]`.
        t: a time of the process, also traced.
    Reference: Chung, Kim, McCann, Klasky & Ye, Diffusion posterior sampling for general noisy inverse problems (ICLR 2023).

        x = x - step * aj.adjoints.posterior_gradient(loss, term, x, t, args)
    """
    return jax.grad(lambda x: loss(term.x0_and_eps(t, x, args)[0]))(x)


def look_ahead(
    loss: Callable[[State], Any],
    term: DiffusionTerm,
    x: State,
    t: float,
    args: Args = None,
    *,
    grid: ArrayLike,
    steps: int,
    solver: Any = None,
    adjoint: Any = None,
) -> State:
    """dL/dx of the loss on the clean state that `steps` network evaluations reach from (x, t), equation (2): between greedy and full.

    Their times s_0 = t > s_1 > ... are every (n/steps)-th of t and the n times of `grid` below it, without the last, where the sampler ends.

    Args:
        loss, term, x, args: as of `posterior_gradient`.
        t: a time of the process, a number.
        grid: the sampler's decreasing times, numbers.
        steps: network evaluations, from 1 to n.
        solver: a deterministic solver, of one evaluation a step; `DPMSolverPP(order=2)` unless given.
        adjoint: how the steps are differentiated; `DiscreteAdjoint()` unless given.
    Raises:
        ValueError: for another number of steps, or a traced t or grid.

        x = x - step * aj.adjoints.look_ahead(loss, term, x, ts[i], args, grid=ts, steps=4)
    """
    if not is_concrete(t, grid):
        raise ValueError("look_ahead chooses its times on the host: give t and grid as numbers, not as traced arrays.")
    times = np.asarray(grid, np.float64)
    times = np.append(float(t), times[times < float(t)])
    n = len(times) - 1
    if not 1 <= steps <= n:
        raise ValueError(f"look_ahead takes from 1 to {n} steps, as many as the grid has below t = {float(t):g}; got {steps!r}.")
    times = times[np.arange(steps) * n // steps]

    def objective(x: State) -> Any:
        if steps > 1:
            x = (DiscreteAdjoint() if adjoint is None else adjoint).run(prepare(term, x, args, times, solver, None, None, False))[0]
        return loss(term.x0_and_eps(jnp.asarray(times[-1], x.dtype), x, args)[0])

    return jax.grad(objective)(x)
