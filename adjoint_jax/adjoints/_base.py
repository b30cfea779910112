"""How an adjoint of ours serves both `sample` and `diffrax.diffeqsolve`: one core, `run`, and one adapter, `loop`."""

import abc
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._types import State
from ..solvers import AbstractSampler
from ..solvers._base import as_dtype, unwrap
from ._computation import Computation


class AbstractSamplerAdjoint(diffrax.AbstractAdjoint):
    """An adjoint whose core takes the computation and returns (final state, states or None), differentiable by `jax.custom_vjp`."""

    @abc.abstractmethod
    def run(self, computation: Computation) -> tuple[Any, Any]:
        """The values of the computation, with this adjoint's derivative."""

    def loop(self, *, args: Any, terms: Any, solver: Any, stepsize_controller: Any, event: Any, saveat: Any, init_state: Any, **kwargs: Any) -> Any:
        """What `diffeqsolve` calls. Its times arrive with their sign flipped where t0 > t1."""
        _check_supported(self, solver, stepsize_controller, event, saveat)
        term, direction = unwrap(terms)
        y0 = init_state.y
        ts = jnp.asarray(stepsize_controller.ts * direction, y0.dtype)
        rows = solver.table(term.process, term.prediction, ts)
        computation = Computation(term, solver, y0, args, ts, as_dtype(rows, y0.dtype), save=False)
        y1, _ = self.run(computation)
        return _final_state(init_state, saveat, stepsize_controller.ts, y1, args), {}


def followed(adjoint: Any, computation: Computation, stochastic: bool = False) -> float:
    """The stochasticity tau of the states; raises where a continuous adjoint, which follows the ODE (or an SDE), is not that of the computation."""
    name, solver, tau = type(adjoint).__name__, type(computation.solver).__name__, computation.solver.tau
    if computation.noise is not None and not stochastic:
        raise ValueError(f"{name} follows the ODE, and {solver} draws noise: use AdjointDEIS, or DiscreteAdjoint.")
    if tau is None or np.ndim(tau):
        raise ValueError(f"{name} follows the ODE, or an SDE of one stochasticity tau, and {solver} here has no such SDE: use DiscreteAdjoint.")
    if not computation.solver.follows_ode:
        raise ValueError(f"{name} follows the ODE from single states, and {solver} reflects them or carries a second one: use DiscreteAdjoint.")
    return tau


def _check_supported(adjoint: Any, solver: Any, controller: Any, event: Any, saveat: Any) -> None:
    name = type(adjoint).__name__
    if not isinstance(solver, AbstractSampler):
        raise ValueError(f"{name} takes solvers of adjoint_jax: wrap {type(solver).__name__} as aj.ExponentialRK, or use an adjoint of diffrax.")
    sub = saveat.subs
    plain = isinstance(sub, diffrax.SubSaveAt) and sub.t1 and not sub.t0 and sub.ts is None and sub.steps == 0 and not saveat.dense
    if not isinstance(controller, diffrax.StepTo) or event is not None or not plain:
        raise ValueError(
            f"{name} in diffeqsolve needs stepsize_controller=diffrax.StepTo(ts), saveat=diffrax.SaveAt(t1=True) and no event: "
            "use an adjoint of diffrax (diffrax.RecursiveCheckpointAdjoint()) for anything else."
        )


def _final_state(init_state: Any, saveat: Any, ts: Any, y1: State, args: Any) -> Any:
    """diffrax's own state after the last step."""
    steps = len(ts) - 1
    saved = saveat.subs.fn(ts[-1], y1, args)
    changes = {
        "y": y1,
        "tprev": ts[-1],
        "tnext": ts[-1],
        "num_steps": jnp.asarray(steps),
        "num_accepted_steps": jnp.asarray(steps),
    }
    names = tuple(changes)
    state = eqx.tree_at(lambda s: tuple(getattr(s, name) for name in names), init_state, tuple(changes.values()))
    return eqx.tree_at(
        lambda s: (s.save_state.ts, s.save_state.ys, s.save_state.save_index),
        state,
        (ts[-1:], jax.tree.map(lambda leaf: leaf[None], saved), jnp.asarray(1)),
    )
