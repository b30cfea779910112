"""The exact gradient of the sampler: states stored, the network recomputed step by step or its linearisations kept.

For x_{i+1} = step(x_i, history_i; shared, inputs_i) and lambda = dL/d(carry), backwards from i = N - 1,

    lambda_i = [d step / d carry]^T lambda_{i+1},    dL/dshared += [d step / d shared]^T lambda_{i+1}.                 (1)

A multistep method is linear in its history, so its transpose needs x_i alone: one stored state a step, one network linearisation alive
(and the history too where the weights are differentiated: a gradient in the grid).
Cost: N forward, then N (forward + backward), of which the K steps whose linearisations are kept save K forward.

The kept steps are the last ones. They are transposed first, so their linearisations are gone before the first step is recomputed, and the
most that is alive is K of them; of any other K steps it is K + 1, and the backward pass would no longer be two loops.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import at_least_float32, varying_like, zeros_like
from .._traced import closed, in_order
from ..solvers import AbstractSampler
from ._base import AbstractSamplerAdjoint
from ._computation import Computation, add_to_value, first, run_forward, value_of
from ._kept import Plan, dense, run_kept
from ._storage import HOST, Storage, cut, joined
from ._watch import no_probe, raise_if_not_finite, watch


class DiscreteAdjoint(AbstractSamplerAdjoint):
    """The exact gradient of what was sampled, equation (1), in memory of one state a step. The default.

    Differentiable: x_T, every state of a saved trajectory, every float leaf of args and of the term, per-step leaves, the grid.
    Parameter cotangents are accumulated in float32 at least, and only for leaves that the caller differentiates.
    Outside of jit, a gradient that is not finite raises FloatingPointError, which names the step and the input; a traced one is returned.

    Args:
        keep: how many of the last steps keep their linearisations, at most; "all", or 0: recompute the network at every step.
        remat: what a linearisation stores of the network. "none": everything; "block": what crosses between about sqrt(n) blocks of its n
            operations, for one more forward evaluation at most (the digits UNet with keep="all": 11 MiB for 29; with keep=0 the CPU's
            compiler does as well by itself); "full": its input alone, which is what keep=0 does: only with keep=0.
        states: where the states of the recomputed steps are stored. "device"; "host": in the host's memory, one transfer a step each way (on
            a CPU nothing is gained); "multilevel": checkpoints of `levels` levels, about levels N^(1/levels) carries in memory (the state and
            the solver's history) for levels - 1 more forward passes. All are exact.
        levels: for states="multilevel", at least 2.
        clip: limit for the norm of dL/dx_i at every i = 0 .. N, for each entry of the leading axis of x (for a vector: of all of it); longer
            ones are shortened, and the answer is no longer the exact gradient. None: no limit.
        probe: zeros `[N + 1]`, of which the gradient is the norm of dL/dx_i, i = 0 .. N: see `aj.adjoints.adjoint_norms`.
    Raises:
        ValueError: for other options, levels < 2.

        g = jax.grad(lambda x: loss(aj.sample(term, x, args, grid=ts, adjoint=aj.DiscreteAdjoint(keep=10))))(x_T)
    """

    keep: int | str = eqx.field(static=True)
    remat: str = eqx.field(static=True)
    states: str = eqx.field(static=True)
    levels: int = eqx.field(static=True)
    clip: float | None = eqx.field(static=True)
    probe: Any

    def __init__(
        self,
        keep: int | str = 0,
        remat: str = "none",
        states: str = "device",
        levels: int = 2,
        clip: float | None = None,
        probe: Any = None,
    ):
        if keep != "all" and not (isinstance(keep, int) and keep >= 0):
            raise ValueError(f'DiscreteAdjoint(keep={keep!r}): keep is a number of steps, at least 0, or "all".')
        if remat not in ("none", "block", "full") or (remat == "full" and keep != 0):
            raise ValueError(f'remat={remat!r}, keep={keep!r}: remat is "none", "block", or "full", which keeps nothing and so needs keep=0.')
        if states not in ("device", "host", "multilevel") or levels < 2:
            raise ValueError(f'states={states!r}, levels={levels!r}: states is "device", "host" or "multilevel"; levels is at least 2.')
        if states == "host" and HOST is None:
            raise ValueError('states="host" needs jax.memory, which this version of JAX does not have: use states="multilevel".')
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip!r}: a positive norm, or None.")
        self.keep, self.remat, self.states = keep, remat, states
        self.levels, self.clip, self.probe = int(levels), clip, probe

    def with_probe(self, probe: Any) -> "DiscreteAdjoint":
        """The same adjoint with another probe."""
        return DiscreteAdjoint(self.keep, self.remat, self.states, self.levels, self.clip, probe)

    def run(self, computation: Computation) -> tuple[Any, Any]:
        shared, _ = computation.shared()
        carry, inputs = computation.carry(), (computation.inputs(), self._probes(computation))

        def watched(shared: Any, carry: Any, inputs: Any) -> Any:
            (x, state), (inputs, probe) = carry, inputs
            return computation.step(shared, (self._watch(x, probe), state), inputs)

        step = closed(watched, shared, carry, first(inputs))
        plan = Plan(self.with_probe(None), computation.steps, computation.save, computation.paired)
        x, states = _run((step, shared, carry, inputs), constant(computation.solver), plan)
        last = None if self.probe is None else self.probe[-1]
        return (eqx.tree_at(lambda pair: pair.x, x, self._watch(x.x, last)) if computation.paired else self._watch(x, last)), states

    def _probes(self, computation: Computation) -> Any:
        if self.probe is not None and jnp.shape(self.probe) != (computation.steps + 1,):
            raise ValueError(f"probe is zeros of shape {(computation.steps + 1,)} for {computation.steps} steps; got {jnp.shape(self.probe)}.")
        return None if self.probe is None else varying_like(jnp.asarray(self.probe[:-1], computation.x.dtype), computation.x)

    def _watch(self, x: Any, probe: Any) -> Any:
        if self.clip is None and probe is None:
            return x
        return watch(self.clip, x, no_probe(x) if probe is None else jnp.asarray(probe, x.dtype))


@eqx.filter_custom_vjp
def _run(vjp_arg: Any, solver: AbstractSampler, plan: Plan) -> tuple[Any, Any]:
    step, shared, carry, inputs = vjp_arg
    carry, states = run_forward(step, shared, carry, inputs, lambda _, following: plan.saved(following))
    return value_of(carry, plan.paired), states


@_run.def_fwd
def _forward(perturbed: Any, vjp_arg: Any, solver: AbstractSampler, plan: Plan) -> tuple[Any, Any]:
    step, shared, carry, inputs = vjp_arg
    head, tail = cut(inputs, plan.recomputed)
    carry, stored, states = _storage(perturbed, solver, plan, step, shared, carry).store(carry, head)
    transpose = None
    if plan.recomputed < plan.steps:
        carry, transpose, more = run_kept(perturbed, plan, (step, shared, carry, tail))
        states = joined(states, more)
    return (value_of(carry, plan.paired), states), (stored, transpose, perturbed)


def _storage(perturbed: Any, solver: AbstractSampler, plan: Plan, step: Any, shared: Any, carry: Any) -> Storage:
    """How the recomputed steps are stored."""
    adjoint, state = plan.adjoint, carry[1]
    whole = _wants_rows(perturbed)
    remember, recall = ((lambda *carry: carry), (lambda memory: memory)) if whole else (solver.remember, lambda memory: solver.recall(memory, state))
    levels = adjoint.levels if adjoint.states == "multilevel" else 1
    return Storage(lambda carry, inputs: step(shared, carry, inputs), remember, recall, plan.saved, levels, adjoint.states == "host")


@_run.def_bwd
def _backward(residuals: Any, cotangents: Any, _: Any, vjp_arg: Any, solver: AbstractSampler, plan: Plan) -> Any:
    stored, transpose, perturbed = residuals
    step, shared, carry, inputs = vjp_arg
    differentiated, fixed = eqx.partition((step, shared), perturbed[:2])
    start = add_to_value(jax.tree.map(zeros_like, eqx.filter(carry, eqx.is_inexact_array)), cotangents[0], plan.paired)
    head, _ = cut(inputs, plan.recomputed)
    head_states, tail_states = cut(cotangents[1], plan.recomputed)
    cotangent, total, per_input = start, jax.tree.map(accumulator, differentiated), None
    if transpose is not None:
        cotangent, total, per_input = transpose((start, dense(tail_states, plan, carry)))

    def pull(memory: Any, inputs: Any, acc: Any, cotangent_state: Any) -> Any:
        cotangent, total = acc
        cotangent = add_to_value(cotangent, cotangent_state, plan.paired)
        carry_diff, carry_fixed = eqx.partition(memory, eqx.is_inexact_array)
        inputs_diff, inputs_fixed = eqx.partition(inputs, perturbed[3])

        def local(carry_diff: Any, differentiated: Any, inputs_diff: Any) -> Any:
            step, shared = eqx.combine(differentiated, fixed)
            given = eqx.combine(carry_diff, carry_fixed), eqx.combine(inputs_diff, inputs_fixed)
            return eqx.filter(plan.linearised(step)(shared, *given), eqx.is_inexact_array)

        cotangent, shares, per_input = in_order(jax.vjp(local, carry_diff, differentiated, inputs_diff)[1])(cotangent)
        return (cotangent, jax.tree.map(add, total, shares)), per_input

    storage = _storage(perturbed, solver, plan, step, shared, carry)
    (cotangent, total), earlier = storage.transpose(pull, stored, head, head_states, (cotangent, total))
    per_input = joined(earlier, per_input)
    raise_if_not_finite((cotangent, total, per_input), vjp_arg, start, cotangents[1], plan.paired)
    step_share, shared_share = jax.tree.map(lambda share, leaf: share.astype(leaf.dtype), total, differentiated)
    return step_share, shared_share, cotangent, per_input


def _wants_rows(perturbed: Any) -> bool:
    """Whether the weights themselves are differentiated: then the history that they multiply has to be stored as well."""
    return any(jax.tree.leaves(perturbed[3][0].row))


def constant(tree: Any) -> Any:
    """`tree` without derivative: what the weights took from it is differentiated through the rows."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def accumulator(leaf: Any) -> Any:
    """Zeros in float32 at least, to add up cotangents of `leaf`."""
    return zeros_like(leaf, at_least_float32(leaf.dtype))


def add(total: Any, share: Any) -> Any:
    """total + share in the dtype of total."""
    return total + share.astype(total.dtype)
