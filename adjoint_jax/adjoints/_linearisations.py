"""The network's linearisations at the nodes of an adjoint: made when they are asked for, or kept from the sampler's own evaluations.

A linearisation is what `jax.vjp` stores of an evaluation: values that differ between steps, kept once a node, and values that do not (weights,
casts of them), kept once: those are found by following the evaluation's jaxpr from x and the step.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from ._computation import Inputs, first
from ._continuous import keeping


class Network:
    """The prediction p at step i as a function of x and of what is `wanted` of (predict, shared, per-step leaves); `whole`: all floats of these."""

    def __init__(self, predict: Any, shared: Any, inputs: Inputs, wanted: Any):
        self.wanted = ((wanted[0], wanted[1]), wanted[2])
        self.whole = eqx.filter(((predict, shared), inputs.per_step), eqx.is_inexact_array)
        self.differentiated, self._fixed = eqx.partition((predict, shared), self.wanted[0])
        self.per_step, self._per_step_fixed = eqx.partition(inputs.per_step, self.wanted[1])
        self._times = inputs.t0

    def linearise(self, x: Any, i: Any) -> tuple[Any, Callable]:
        """p and its transpose, to the cotangents of x, `differentiated` and the step's own leaves."""
        here, here_fixed = first((self.per_step, self._per_step_fixed), i)

        def answer(x: Any, differentiated: Any, here: Any) -> Any:
            predict, shared = eqx.combine(differentiated, self._fixed)
            return predict(shared, eqx.combine(here, here_fixed), self._times[i], x)

        return jax.vjp(answer, x, self.differentiated, here)

    def run_keeping(self, linear: Callable, carry: Any, inputs: Any, nodes: np.ndarray, record: Callable) -> tuple[Any, Any, Any]:
        """`keeping` of the linearisations at `nodes`, in two parts for `at`: what differs between steps, and the rest."""
        stored = lambda x, i: jax.tree.leaves(self.linearise(x, i)[1])  # noqa: E731
        traced = jax.make_jaxpr(stored)(carry[0], 0)
        differ = _following(traced.jaxpr)
        silent = traced.jaxpr.replace(eqns=[equation for equation in traced.jaxpr.eqns if equation.outvars])  # without what only prints
        live, _ = partial_eval.dce_jaxpr(silent, [not each for each in differ], instantiate=True)
        once = iter(eval_jaxpr(live, traced.consts, carry[0], 0))
        like = [leaf.aval if each else None for leaf, each in zip(traced.jaxpr.outvars, differ, strict=True)]
        structure: Any = None

        def advance(carry: Any, inputs: Inputs, i: Any) -> tuple[Any, Any]:
            nonlocal structure
            p, pull = self.linearise(carry[0], i)
            leaves, structure = jax.tree.flatten(pull)
            return linear(p, carry, inputs), [leaf if each else None for leaf, each in zip(leaves, differ, strict=True)]

        carry, stacked, states = keeping(advance, carry, inputs, nodes, like, record)
        fixed = [None if each else next(once) for each in differ]
        return carry, (jax.tree.unflatten(structure, stacked), jax.tree.unflatten(structure, fixed)), states


def at(kept: Any, k: Any) -> Callable:
    """The transpose at node k of what `Network.run_keeping` kept."""
    stacked, fixed = kept
    return eqx.combine(first(stacked, k), fixed)


def _following(jaxpr: Any) -> list[bool]:
    """Which outputs differ with the inputs."""
    differ = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(var, Literal) and var in differ for var in equation.invars):
            differ.update(equation.outvars)
    return [not isinstance(var, Literal) and var in differ for var in jaxpr.outvars]
