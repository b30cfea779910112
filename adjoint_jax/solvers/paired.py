"""Solvers that can be run backwards exactly: they carry a second state, and both together are a bijection.

    (x_i, y_i) -> (x_{i+1}, y_{i+1}),      solved for (x_i, y_i) in closed form by `inverse`, on the reversed grid      (1)

y is the register "aux": the second chain of EDICT and Rex, the neighbouring state of a two-step method, which its first step copies
where it is given (there is no step before it). An exact round trip therefore needs both states at either end: `Paired`.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ..processes import AbstractProcess
from .linear import AbstractLinear, Pattern, Row


class Paired(eqx.Module):
    """A state and the second one of an invertible solver: what `aj.invert` returns and `aj.sample` accepts and then returns.

    EDICT and Rex: x and the second chain, at the same time. BDIA and BELM: the state at the end and its neighbour, one step inside.

    Args:
        x: the state.
        aux: the second state; None where the solver is to start it itself.

        back = aj.invert(term, aj.sample(term, aj.Paired(x_T), args, grid=ts, solver=aj.BDIA()), args, grid=ts, solver=aj.BDIA())
    """

    x: Any
    aux: Any = None


class AbstractPaired(AbstractLinear):
    """Equation (1). A solver of this kind states its own rows and those of its inverse."""

    @property
    def follows_ode(self) -> bool:
        return False

    @property
    @abc.abstractmethod
    def inverse(self) -> "AbstractPaired":
        """The solver that undoes this one, step for step, on the reversed grid."""

    @abc.abstractmethod
    def resume(self, rows: Row) -> Row:
        """The rows of a run whose second state is given."""

    def undo_rows(self, process: AbstractProcess, prediction: str, ts: Any) -> Row | None:
        """The row by which `undo` goes back, for each step of `ts`."""
        return jax.tree.map(lambda leaf: leaf[::-1], self.inverse.table(process, prediction, ts[::-1]))

    def undo(self, row: Row, back: Row | None, after: Paired, noise: Any, predict: Callable) -> Paired:
        """The pair before the step `row`; predict(s, X) is asked at each of the step's own stages s, and answers 0 where one is not active.

        The inverse asks the network where the step asked it, the second half of the stages first.
        """
        assert back is not None
        stages = len(self.pattern.reads)
        stage = lambda k, x: predict((k + stages // 2) % stages, x)  # noqa: E731
        x, registers, _ = self.inverse.advance(back._replace(active=None), after.x, {"aux": after.aux}, noise, stage)
        return Paired(x, registers["aux"])


class AbstractInvertible(AbstractPaired):
    """A solver whose inverse is of another form: it states the rows of both."""

    @property
    @abc.abstractmethod
    def inverse_pattern(self) -> Pattern:
        """`pattern` of the inverse."""

    @abc.abstractmethod
    def inverse_rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        """`rows` of the inverse: from `nodes[..., 0]`, where the solver's step ended, to `t_end`, where it began."""

    @abc.abstractmethod
    def inverse_use(self, valid: Any, steps: int) -> Any:
        """`use` of the inverse."""

    @property
    def inverse(self) -> "AbstractPaired":
        return Inverse(self)

    def resume(self, rows: Row) -> Row:
        return rows


class Inverse(AbstractPaired):
    """The inverse of a solver, from data to noise."""

    solver: AbstractInvertible

    def order(self, terms: Any) -> int | None:
        return self.solver.order(terms)

    @property
    def window(self) -> int:
        return self.solver.window

    @property
    def pattern(self) -> Pattern:
        return self.solver.inverse_pattern

    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        return self.solver.inverse_rows(process, prediction, nodes, t_end, valid)

    def use(self, valid: Any, steps: int) -> Any:
        return self.solver.inverse_use(valid, steps)

    @property
    def inverse(self) -> AbstractPaired:
        return self.solver

    def resume(self, rows: Row) -> Row:
        return self.solver.resume(rows)
