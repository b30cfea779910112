"""A step that is linear but for the network: the one machine that every solver here runs on.

A step reads the network at S points and then writes x and the registers that the solver carries along, each a sum over values v_b --
x, the registers, the Gaussian draws z0, z1, ... of the step, the constant `one`, the outputs F0, F1, ... of its stages so far:

    X_s = sum_b R_sb v_b,    F_s = A_s X_s + B_s p(X_s, t_s),    s = 0 .. S-1                                        (1)
    v'_r = sum_b W_rb v_b                                                                                         (2)

A solver is a *pattern*, which values enter which sum, and a function that gives the *weights* of a step: a multistep method carries
past outputs, a predictor-corrector also the corrected state, a Runge-Kutta method has several stages, an invertible one two states.

Only the registers that (1) reads have to be stored to transpose a step exactly; the step is linear in all others.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax import RESULTS

from .._numerics import is_concrete, past_nodes, zeros_like
from .._types import Args, State
from ..processes import AbstractProcess
from ._base import AbstractSampler, check_rows, dense_info, fit, unwrap

Sum = str | tuple[str, ...]
"""A value by its name, copied; or several, weighted and added."""


class Pattern(NamedTuple):
    """Which values enter which sum.

    `reads` are the X_s; `x` and `registers` are what (2) writes; `copies` are the registers that start as x, the others start as zero;
    `draws` is the number of Gaussian draws a step; `error` estimates the step's error, for adaptive control. `counted`: the weights
    depend on the step's number.
    """

    reads: tuple[Sum, ...]
    x: Sum
    registers: Mapping[str, Sum]
    copies: tuple[str, ...] = ()
    draws: int = 0
    error: Sum | None = None
    counted: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        """The registers that a stage reads."""
        read = {name for what in self.reads for name in ((what,) if isinstance(what, str) else what)}
        return tuple(name for name in self.registers if name in read)


def past_outputs(count: int, newest: Sum = "F0") -> dict[str, Sum]:
    """The registers f1, f2, ... of a method with memory: what `newest` was one step ago, two steps ago, ..."""
    names = [f"f{j}" for j in range(1, count + 1)]
    return dict(zip(names, [newest, *names[:-1]], strict=False))


class Row(NamedTuple):
    """The weights of one step: `times` `[S]`; A and B of (1), `[S, *c]`; for each sum its weights `[terms, *c]`, or None for a copy.

    `active` `[S]`, where given: a stage that is not is skipped, and its output is zero.
    """

    times: Any
    of_x: Any
    of_p: Any
    reads: tuple[Any, ...]
    x: Any
    registers: dict[str, Any]
    error: Any = None
    active: Any = None


class LinearState(eqx.Module):
    """`row` and `noise` `[draws, *x]` of this step or None, the registers, and the past times where no row is given (infinite: none yet)."""

    row: Row | None
    noise: Any
    registers: dict[str, State]
    times: Any


class AbstractLinear(AbstractSampler):
    """Equations (1), (2)."""

    @property
    @abc.abstractmethod
    def pattern(self) -> Pattern:
        """Which values enter which sum."""

    @property
    def window(self) -> int:
        """Number of times, the present one included, on which the weights of a step depend: 1 for a method without memory."""
        return 1

    @abc.abstractmethod
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        """The weights of steps from `nodes[..., 0]` to `t_end`, past times `nodes[..., 1:]`, of which `valid` exist or are to be used."""

    def use(self, valid: Any, steps: int) -> Any:
        """Which of the nodes that exist, `[steps, window]`, step i uses."""
        return valid

    @property
    def draws(self) -> int:
        return self.pattern.draws

    def table(self, process: AbstractProcess, prediction: str, ts: Any) -> Row:
        nodes, valid = past_nodes(ts, self.window)
        table = self.rows(process, prediction, nodes, ts[1:], self.use(valid, len(ts) - 1))
        if not is_concrete(table):
            return table
        check_rows(table, np.asarray(ts), f"{type(self).__name__} with prediction {prediction!r}")
        return table._replace(active=None) if table.active is not None and np.all(table.active) else table

    def init(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args) -> LinearState:
        pattern = self.pattern
        registers = {name: y0 if name in pattern.copies else zeros_like(y0) for name in pattern.registers}
        return LinearState(None, None, registers, jnp.full(self.window - 1, jnp.inf, y0.dtype))

    def step(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args, solver_state: LinearState, made_jump: Any) -> tuple:
        term, direction = unwrap(terms)
        pattern, row, times = self.pattern, solver_state.row, solver_state.times
        if row is None:
            if pattern.counted:
                raise ValueError(f"{type(self).__name__} counts its steps, which only aj.sample and our adjoints do: use one of these.")
            t0, t1 = (jnp.asarray(t * direction, y0.dtype) for t in (t0, t1))
            known = jnp.concatenate([t0[None], times])
            valid = jnp.isfinite(known)
            row = self.rows(term.process, term.prediction, jnp.where(valid, known, t0), t1, valid)
            times = known[:-1]
        if pattern.draws and solver_state.noise is None:
            raise ValueError(f"{type(self).__name__} draws noise, which only aj.sample gives it: use aj.sample(..., key=key).")
        predict = lambda s, x: term.predict(row.times[s], x, args)  # noqa: E731
        y1, registers, error = self.advance(row, y0, solver_state.registers, solver_state.noise, predict)
        return y1, error, dense_info(y0, y1), LinearState(solver_state.row, solver_state.noise, registers, times), RESULTS.successful

    def advance(self, row: Row, x: State, registers: dict[str, State], noise: Any, predict: Callable) -> tuple[State, dict[str, State], Any]:
        """x and the registers after the step `row`, and the estimate of its error; predict(s, X_s) is the network's answer at stage s."""
        pattern = self.pattern
        values = {"x": x, "one": zeros_like(x) + 1, **registers}
        values |= {f"z{k}": noise[k] for k in range(pattern.draws)}
        for s, (what, weights) in enumerate(zip(pattern.reads, row.reads, strict=True)):
            at = total(values, what, weights)
            ask = lambda x, s=s: predict(s, x)  # noqa: E731
            p = ask(at) if row.active is None else jax.lax.cond(row.active[s], ask, zeros_like, at)
            values[f"F{s}"] = fit(row.of_x[s], x) * at + fit(row.of_p[s], x) * p
        registers = {name: total(values, what, row.registers[name]) for name, what in pattern.registers.items()}
        return total(values, pattern.x, row.x), registers, None if pattern.error is None else total(values, pattern.error, row.error)

    def pull_back(self, row: Row, x: State, registers: dict[str, State], pull: Callable) -> dict[str, State]:
        """The transpose of `advance`: cotangents of all values from those of the new x and registers.

        pull(s, cotangent of p_s) is the network's share of the cotangent of X_s.
        """
        pattern, found = self.pattern, {}

        def give(what: Sum, weights: Any, cotangent: State) -> None:
            for k, name in enumerate((what,) if isinstance(what, str) else what):
                share = cotangent if isinstance(what, str) else fit(weights[k], cotangent) * cotangent
                found[name] = found[name] + share if name in found else share

        give(pattern.x, row.x, x)
        for name, what in pattern.registers.items():
            give(what, row.registers[name], registers[name])
        for s in reversed(range(len(pattern.reads))):
            of_output = found.get(f"F{s}", zeros_like(x))
            of_point = fit(row.of_x[s], x) * of_output + pull(s, fit(row.of_p[s], x) * of_output)
            give(pattern.reads[s], row.reads[s], of_point)
        return found

    def remember(self, x: State, state: LinearState) -> Any:
        stored = self.pattern.stored
        return (x, {name: state.registers[name] for name in stored}) if stored else x

    def recall(self, memory: Any, state: LinearState) -> tuple[State, LinearState]:
        x, stored = memory if self.pattern.stored else (memory, {})
        registers = {name: stored.get(name, zeros_like(x)) for name in self.pattern.registers}
        return x, eqx.tree_at(lambda s: s.registers, state, registers)


def total(values: dict[str, State], what: Sum, weights: Any) -> State:
    """One sum of (1) or (2)."""
    if isinstance(what, str):
        return values[what]
    found = fit(weights[0], values[what[0]]) * values[what[0]]
    for k, name in enumerate(what[1:], 1):
        found = found + fit(weights[k], values[name]) * values[name]
    return found
