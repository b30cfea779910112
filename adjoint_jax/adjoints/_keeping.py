"""The states or the network's linearisations at the nodes of an adjoint, kept from the sampler's own run.

A linearisation is what `jax.vjp` stores of an evaluation: values that differ between steps, kept once a node, and values that do not (weights,
casts of them), kept once: those are found by following the evaluation's jaxpr from x and the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from .._numerics import varying_like
from ..solvers.linear import AbstractLinear
from ._computation import Computation, Inputs, first


def check_reads_once(computation: Computation, name: str) -> None:
    """Raises where a step's evaluation is not that at its state."""
    solver = computation.solver
    if not isinstance(solver, AbstractLinear) or solver.pattern.reads != ("x",):
        raise ValueError(f"{name} takes solvers that read the network once a step, at x; {type(solver).__name__} does not: use DiscreteAdjoint.")


def checked_keep(keep: Any, name: str) -> bool:
    if not isinstance(keep, bool):
        raise ValueError(f"keep={keep!r}: {name} keeps the linearisations of all its nodes or of none: use True or False.")
    return keep


def run_keeping(step: Callable, shared: Any, carry: Any, inputs: Any, nodes: np.ndarray, record: Callable) -> tuple[Any, Any, Any]:
    """The sampler: its last carry, the states at `nodes` (last first), and what `record` takes of the carry after each step."""
    advance = lambda carry, inputs, _: (step(shared, carry, inputs), carry[0])  # noqa: E731
    carry, states_at, states = keeping(advance, carry, inputs, nodes, carry[0], record)
    if len(nodes) and nodes[0] == len(inputs.t0):
        states_at = jax.lax.dynamic_update_index_in_dim(states_at, carry[0], 0, 0)
    return carry, states_at, states


def keeping(advance: Callable, carry: Any, inputs: Any, nodes: np.ndarray, like: Any, record: Callable) -> tuple[Any, Any, Any]:
    """The sampler by advance(carry, inputs_i, i) -> (carry, what there is to keep, `like` it): its last carry, what is kept at `nodes` (last
    first, of which no step comes after the first), and what `record` takes of the carry after each step. What is at no node is written where the
    next node overwrites it.
    """
    steps = np.arange(len(inputs.t0))
    slots = np.searchsorted(-nodes, -steps, side="right") - 1
    stacks = varying_like(jax.tree.map(lambda leaf: jnp.zeros((len(nodes), *leaf.shape), leaf.dtype), like), carry[0])

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        carry, stacks = acc
        inputs_i, i, slot = slices
        following, kept = advance(carry, inputs_i, i)
        if len(nodes):
            stacks = jax.tree.map(lambda stack, leaf: jax.lax.dynamic_update_index_in_dim(stack, leaf, slot, 0), stacks, kept)
        return (following, stacks), record(following)

    (carry, stacks), states = jax.lax.scan(body, (carry, stacks), (inputs, jnp.asarray(steps), jnp.asarray(slots)))
    return carry, stacks, states


class Network:
    """The prediction p as a function of x and of what is `wanted` of (predict, shared, per-step leaves); `whole`: all floats of these."""

    def __init__(self, predict: Any, shared: Any, inputs: Inputs, wanted: Any):
        self.wanted, self._inputs = ((wanted[0], wanted[1]), wanted[2]), inputs
        self.whole = eqx.filter(((predict, shared), inputs.per_step), eqx.is_inexact_array)
        self.differentiated, self.fixed = eqx.partition((predict, shared), self.wanted[0])
        self.per_step = eqx.filter(inputs.per_step, self.wanted[1])

    def linearise(self, x: Any, t: Any, per_step: Any) -> tuple[Any, Callable]:
        """p and its transpose, to the cotangents of x, `differentiated` and the step's own leaves."""
        here, here_fixed = eqx.partition(per_step, self.wanted[1])

        def answer(x: Any, differentiated: Any, here: Any) -> Any:
            predict, shared = eqx.combine(differentiated, self.fixed)
            return predict(shared, eqx.combine(here, here_fixed), t, x)

        return jax.vjp(answer, x, self.differentiated, here)

    def at(self, x: Any, i: Any) -> tuple[Any, Callable]:
        """`linearise` at step i; after the last step, at the end of the grid."""
        if isinstance(i, int) and i == len(self._inputs.t0):
            return self.linearise(x, self._inputs.t1[-1], first(self._inputs.per_step, -1))
        return self.linearise(x, self._inputs.t0[i], first(self._inputs.per_step, i))

    def run_keeping(self, linear: Callable, carry: Any, inputs: Any, nodes: np.ndarray, record: Callable) -> tuple[Any, Any, Any]:
        """`keeping` of the states and the linearisations at `nodes`, as a `Kept`; the sampler makes none of the latter after its last step."""
        traced = jax.make_jaxpr(lambda x, i: jax.tree.leaves(self.at(x, i)[1]))(carry[0], 0)
        differ = _following(traced.jaxpr)
        silent = traced.jaxpr.replace(eqns=[equation for equation in traced.jaxpr.eqns if equation.outvars])  # without what only prints
        live, _ = partial_eval.dce_jaxpr(silent, [not each for each in differ], instantiate=True)
        once = iter(eval_jaxpr(live, traced.consts, carry[0], 0))
        like = [leaf.aval if each else None for leaf, each in zip(traced.jaxpr.outvars, differ, strict=True)]
        structure: Any = None

        def kept_of(x: Any, pull: Callable) -> Any:
            nonlocal structure
            leaves, structure = jax.tree.flatten(pull)
            return x, [leaf if each else None for leaf, each in zip(leaves, differ, strict=True)]

        def advance(carry: Any, inputs: Inputs, i: Any) -> tuple[Any, Any]:
            p, pull = self.at(carry[0], i)
            return linear(p, carry, inputs), kept_of(carry[0], pull)

        carry, stacked, states = keeping(advance, carry, inputs, nodes, (carry[0], like), record)
        if len(nodes) and nodes[0] == len(inputs.t0):
            last = kept_of(carry[0], self.at(carry[0], int(nodes[0]))[1])
            stacked = jax.tree.map(lambda stack, leaf: jax.lax.dynamic_update_index_in_dim(stack, leaf, 0, 0), stacked, last)
        fixed = [None if each else next(once) for each in differ]
        pulls = (jax.tree.unflatten(structure, leaves) for leaves in (stacked[1], fixed))
        return carry, Kept(stacked[0], *pulls), states


def network_of(parts: Any, perturbed: Any) -> Network:
    """Of the `parts` of a computation, of which `perturbed` says what is differentiated."""
    _, predict, _, shared, _, inputs = parts
    return Network(predict, shared, inputs, (perturbed[1], perturbed[3], perturbed[5].per_step))


class Kept(NamedTuple):
    """At each node the state, of its linearisation what differs between steps, and once what does not."""

    states: Any
    stacked: Any
    fixed: Any


def _following(jaxpr: Any) -> list[bool]:
    """Which outputs differ with the inputs."""
    differ = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(var, Literal) and var in differ for var in equation.invars):
            differ.update(equation.outvars)
    return [not isinstance(var, Literal) and var in differ for var in jaxpr.outvars]
