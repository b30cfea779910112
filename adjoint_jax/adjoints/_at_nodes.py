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
from .._traced import in_order
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


def run_forward_keeping(parts: Any, perturbed: Any, nodes: np.ndarray, keep: bool, record: Callable) -> tuple[Any, Any, Any]:
    """The sampler by the `parts` of its computation: its last carry; the states at `nodes` (last first), or with `keep` the `Linearisations`; and
    what `record` takes of the carry after each step."""
    step, _, linear, shared, carry, inputs = parts
    if keep:
        return network_of(parts, perturbed).kept(linear, carry, nodes, record)
    return states_kept(step, shared, carry, inputs, nodes, record)


def states_kept(step: Callable, shared: Any, carry: Any, inputs: Any, nodes: np.ndarray, record: Callable) -> tuple[Any, Any, Any]:
    """`run_forward_keeping` of the states."""
    advance = lambda carry, inputs, _: (step(shared, carry, inputs), carry[0])  # noqa: E731
    return _run(advance, lambda carry: carry[0], carry, inputs, nodes, carry[0], record)


def _run(advance: Callable, at_end: Callable, carry: Any, inputs: Any, nodes: np.ndarray, like: Any, record: Callable) -> tuple[Any, Any, Any]:
    """The sampler by advance(carry, inputs_i, i) -> (carry, what there is to keep, `like` it); at_end(carry) is what there is after the last step.
    What is at no node is written where the next node overwrites it.
    """
    steps, x = np.arange(len(inputs.t0)), jax.tree.leaves(carry)[0]
    slots = np.searchsorted(-nodes, -steps, side="right") - 1
    stacks = varying_like(jax.tree.map(lambda leaf: jnp.zeros((len(nodes), *leaf.shape), leaf.dtype), like), x)

    def body(acc: Any, slices: Any) -> tuple[Any, Any]:
        carry, stacks = acc
        inputs_i, i, slot = slices
        following, kept = advance(carry, inputs_i, i)
        return (following, _written(stacks, kept, slot)), record(following)

    (carry, stacks), states = jax.lax.scan(body, (carry, stacks), (inputs, jnp.asarray(steps), jnp.asarray(slots)))
    return carry, _written(stacks, at_end(carry), 0) if nodes[0] == len(steps) else stacks, states


def _written(stacks: Any, kept: Any, slot: Any) -> Any:
    return jax.tree.map(lambda stack, leaf: jax.lax.dynamic_update_index_in_dim(stack, leaf, slot, 0), stacks, kept)


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

        p, transpose = jax.vjp(answer, x, self.differentiated, here)
        return p, in_order(transpose)

    def at(self, x: Any, i: Any) -> tuple[Any, Callable]:
        """`linearise` at step i."""
        return self.linearise(x, self._inputs.t0[i], first(self._inputs.per_step, i))

    def kept(self, linear: Callable, carry: Any, nodes: np.ndarray, record: Callable) -> tuple[Any, Any, Any]:
        """`run_forward_keeping` of the linearisations; the sampler makes none after its last step."""
        given = self._inputs
        traced = jax.make_jaxpr(lambda x, i: jax.tree.leaves(self.at(x, i)[1]))(carry[0], 0)
        differ = _following(traced.jaxpr)
        silent = traced.jaxpr.replace(eqns=[equation for equation in traced.jaxpr.eqns if equation.outvars])  # without what only prints
        live, _ = partial_eval.dce_jaxpr(silent, [not each for each in differ], instantiate=True)
        once = iter(eval_jaxpr(live, traced.consts, carry[0], 0))
        like = [leaf.aval if each else None for leaf, each in zip(traced.jaxpr.outvars, differ, strict=True)]
        structure: Any = None

        def differing(pull: Callable) -> list:
            nonlocal structure
            leaves, structure = jax.tree.flatten(pull)
            return [leaf if each else None for leaf, each in zip(leaves, differ, strict=True)]

        def advance(acc: Any, inputs: Inputs, i: Any) -> tuple[Any, Any]:
            carry, _ = acc
            p, pull = self.at(carry[0], i)
            return (linear(p, carry, inputs), carry[0]), differing(pull)

        at_end = lambda acc: differing(self.linearise(acc[0][0], given.t1[-1], first(given.per_step, -1))[1])  # noqa: E731
        (carry, before), stacked, states = _run(advance, at_end, (carry, carry[0]), given, nodes, like, lambda acc: record(acc[0]))
        fixed = [None if each else next(once) for each in differ]
        stacked, fixed = (jax.tree.unflatten(structure, leaves) for leaves in (stacked, fixed))
        return carry, Linearisations(stacked, fixed, before), states


def network_of(parts: Any, perturbed: Any) -> Network:
    """Of the `parts` of a computation, of which `perturbed` says what is differentiated."""
    _, predict, _, shared, _, inputs = parts
    return Network(predict, shared, inputs, (perturbed[1], perturbed[3], perturbed[5].per_step))


class Linearisations(NamedTuple):
    """The network's transposes: what differs between steps, at each node, and once what does not; `before`: the state before the last step."""

    stacked: Any
    fixed: Any
    before: Any

    def whole(self, stacked: Any) -> Callable:
        """That of a node, of which `stacked` is given."""
        return eqx.combine(stacked, self.fixed)


def _following(jaxpr: Any) -> list[bool]:
    """Which outputs differ with the inputs."""
    differ = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(var, Literal) and var in differ for var in equation.invars):
            differ.update(equation.outvars)
    return [not isinstance(var, Literal) and var in differ for var in jaxpr.outvars]
