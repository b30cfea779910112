"""The computation that `sample` hands to an adjoint: a step, its initial carry, its rows and what may be differentiated.

    carry_{i+1} = step(shared, carry_i, inputs_i),      carry = (x, solver state),      i = 0 .. N-1                   (1)

`shared` are the arrays of the network and of `args`; `inputs_i` are the times, the row of weights and the per-step leaves of interval i.
An adjoint never changes the values of (1), only how they are differentiated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from .._numerics import varying_like
from .._traced import closed, in_order
from .._types import Args, State
from ..solvers import AbstractSampler, Paired
from ..terms import DiffusionTerm


class PerStep(eqx.Module):
    """A leaf of `args` with one value for each interval of the grid, `[steps, ...]`: every evaluation made for interval i sees `value[i]`."""

    value: Any


def _is_per_step(leaf: Any) -> bool:
    return isinstance(leaf, PerStep)


class Inputs(NamedTuple):
    """What step i is given."""

    t0: Any
    t1: Any
    row: Any
    per_step: Any
    noise: Any
    opaque: Any = None


class Computation(eqx.Module):
    """`sample` in parts. `ts` is numpy float64 where the grid is concrete; `rows` and `times` are arrays of the state's dtype.

    `noise` holds the draws of each step, `[steps, draws, *x]`, or the key of each, `[steps]`, from which they are drawn when they are needed.
    `paired`: the values are pairs (x, register "aux"); `aux` is what that register starts as, where it is given. `start`: the first carry,
    of the part of a computation that `after` gives. `opaque`, one for each step: where true, no gradient passes from the step to its carry.
    """

    term: DiffusionTerm
    solver: AbstractSampler
    x: State
    args: Args
    ts: Any
    rows: Any
    save: bool = eqx.field(static=True)
    noise: Any = None
    aux: Any = None
    paired: bool = eqx.field(static=True, default=False)
    start: Any = None
    opaque: Any = None

    @property
    def steps(self) -> int:
        return len(self.ts) - 1

    @property
    def times(self) -> Any:
        return jnp.asarray(self.ts, self.x.dtype)

    def after(self, i: int, carry: Any) -> "Computation":
        """The steps from i on, which start from `carry`."""
        cut = lambda tree: jax.tree.map(lambda leaf: leaf[i:], tree)  # noqa: E731
        args = jax.tree.map(lambda leaf: PerStep(cut(leaf.value)) if _is_per_step(leaf) else leaf, self.args, is_leaf=_is_per_step)
        cuts = {"ts": self.ts[i:], "rows": cut(self.rows), "noise": cut(self.noise), "opaque": cut(self.opaque)}
        return dataclasses.replace(self, x=carry[0], args=args, aux=None, start=carry, **cuts)

    def carry(self) -> Any:
        if self.start is not None:
            return varying_like(self.start, self.x)
        times = self.times
        state = self.solver.init(self.term, times[0], times[1], self.x, self.args)
        if self.aux is not None:
            state = eqx.tree_at(lambda state: state.registers["aux"], state, self.aux)
        return varying_like((self.x, state), self.x)

    def inputs(self) -> Inputs:
        per_step = jax.tree.map(lambda leaf: leaf.value if _is_per_step(leaf) else None, self.args, is_leaf=_is_per_step)
        for leaf in jax.tree.leaves(per_step):
            if jnp.shape(leaf)[:1] != (self.steps,):
                raise ValueError(f"A PerStep leaf needs one value for each of the {self.steps} steps; got shape {jnp.shape(leaf)}.")
        return varying_like(Inputs(self.times[:-1], self.times[1:], self.rows, per_step, self.noise, self.opaque), self.x)

    def _split(self) -> tuple[Any, Any]:
        constant = jax.tree.map(lambda leaf: None if _is_per_step(leaf) else leaf, self.args, is_leaf=_is_per_step)
        return eqx.partition((self.term.network, constant), eqx.is_array)

    def shared(self) -> tuple[Any, Any]:
        """The (arrays, rest) of (network, args without the per-step leaves)."""
        arrays, rest = self._split()
        return varying_like(arrays, self.x), rest

    def term_and_args(self, shared: Any, per_step: Any) -> tuple[DiffusionTerm, Args]:
        """The term and the arguments of one interval, with `shared` in place of their arrays."""
        network, args = eqx.combine(shared, self._split()[1])  # not `shared`: a step that marks the arrays again would close over them
        return eqx.tree_at(lambda term: term.network, self.term, network), eqx.combine(args, per_step)

    def step(self, shared: Any, carry: Any, inputs: Inputs) -> Any:
        """(1)."""
        if inputs.opaque is not None:
            carry = jax.tree.map(lambda leaf: jnp.where(inputs.opaque, jax.lax.stop_gradient(leaf), leaf), carry)
        return self.advance(*self.term_and_args(shared, inputs.per_step), carry, inputs)

    def advance(self, term: DiffusionTerm, args: Args, carry: Any, inputs: Inputs) -> Any:
        """One step of the solver on a term."""
        x, state = carry
        noise = noise_of(inputs, self.solver.draws, x)
        state = eqx.tree_at(_given, state, (inputs.row, noise), is_leaf=lambda leaf: leaf is None)
        x, _, _, state, _ = self.solver.step(term, inputs.t0, inputs.t1, x, args, state, False)
        return x, eqx.tree_at(_given, state, (None, None), is_leaf=lambda leaf: leaf is None or isinstance(leaf, type(inputs.row)))

    def predict(self, shared: Any, per_step: Any, t: Any, x: State) -> State:
        """The network's prediction at (x, t)."""
        term, args = self.term_and_args(shared, per_step)
        return term.predict(t, x, args)


def _given(state: Any) -> tuple[Any, Any]:
    """What a step is given through the solver's state."""
    return state.row, state.noise


def draw(key: Any, draws: int, x: State) -> Any:
    """The Gaussian draws of one step, `[draws, *x]`: one is normal(key, x.shape), several are normal(key, (draws, *x.shape))."""
    shape = x.shape if draws == 1 else (draws, *x.shape)
    return jax.random.normal(key, shape, x.dtype).reshape(draws, *x.shape)


def noise_of(inputs: Inputs, draws: int, x: State) -> Any:
    """The draws of one step, drawn from its key where that is what was given; None for a deterministic solver."""
    noise = inputs.noise
    return draw(noise, draws, x) if noise is not None and jnp.issubdtype(noise.dtype, jax.dtypes.prng_key) else noise


def answering(term: DiffusionTerm, p: Any) -> DiffusionTerm:
    """The term whose network's answer is p, whatever it is asked: a step of the solvers here is linear in p and in its noise."""
    return DiffusionTerm(lambda x, t, args: p, term.process, term.prediction)


def first(inputs: Any, i: Any = 0) -> Any:
    """Entry i of every array of a stacked pytree."""
    return jax.tree.map(lambda leaf: leaf[i], inputs)


def parts(computation: Computation) -> tuple:
    """(step, predict, linear, shared, carry, inputs); linear(p, carry, inputs) is the step with the network's answer p given."""
    shared, _ = computation.shared()
    carry, inputs = computation.carry(), computation.inputs()
    step = closed(computation.step, shared, carry, first(inputs))
    predict = closed(computation.predict, shared, first(inputs).per_step, inputs.t0[0], computation.x)
    linear = closed(lambda p, carry, inputs: advanced(computation, p, carry, inputs), computation.x, carry, first(inputs))
    return step, predict, linear, shared, carry, inputs


def advanced(computation: Computation, p: Any, carry: Any, inputs: Inputs) -> Any:
    return computation.advance(answering(computation.term, p), None, carry, inputs)


def run_forward(step: Callable, shared: Any, carry: Any, inputs: Any, record: Callable) -> tuple[Any, Any]:
    """`lax.scan` of (1); record(carry_i, carry_{i+1}) is stacked."""

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        following = step(shared, carry, inputs)
        return following, record(carry, following)

    return jax.lax.scan(body, carry, inputs)


def run_direct(computation: Computation) -> tuple[Any, Any]:
    """The final state and, if asked, all states after the first: plain autodiff in either mode."""
    shared, _ = computation.shared()
    record = lambda _, following: saved(following, computation.save, computation.paired)  # noqa: E731
    carry, states = run_forward(in_order(computation.step), shared, computation.carry(), computation.inputs(), record)
    return value_of(carry, computation.paired), states


def saved(carry: Any, save: bool, paired: bool) -> Any:
    """What a trajectory keeps of a carry."""
    return value_of(carry, paired) if save else None


def value_of(carry: Any, paired: bool) -> Any:
    """The state of a carry, or the pair."""
    return Paired(carry[0], carry[1].registers["aux"]) if paired else carry[0]


def add_to_value(carry: Any, share: Any, paired: bool) -> Any:
    """The cotangent `carry` with that of its `value_of` added, of which parts may be None."""
    if share is None:
        return carry
    places = lambda carry: [value_of(carry, paired)] if not paired else [value_of(carry, paired).x, value_of(carry, paired).aux]  # noqa: E731
    shares = [share.x, share.aux] if paired else [share]
    return eqx.tree_at(places, carry, [old if new is None else old + new for old, new in zip(places(carry), shares, strict=True)])
