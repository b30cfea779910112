"""What every solver here has beyond diffrax's `init` and `step`.

`table` turns a grid into rows of weights, `[N, ...]`, once: in numpy float64 where the grid is concrete, in the graph where it is traced.
`sample` puts row i into the solver's state before step i. `diffeqsolve` knows no rows: there the state's row is None, and the step
computes its own in the graph, by the same function.

`remember` names what an exact adjoint has to store of a step's starting point: the part in which the step is not linear. The rest
may be zero when the step is transposed, so a multistep method costs one state a step whatever its order.
"""

import abc
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from .._types import Args, State
from ..processes import AbstractProcess
from ..terms import DiffusionTerm


def unwrap(terms: Any) -> tuple[DiffusionTerm, Any]:
    """The term itself, and the sign by which diffrax multiplied its times where it integrates from a larger to a smaller one."""
    term, direction = (terms.term, terms.direction) if hasattr(terms, "direction") else (terms, 1)
    if not isinstance(term, DiffusionTerm):
        raise TypeError(f"This solver integrates an aj.DiffusionTerm; got {type(term).__name__}.")
    return term, direction


def fit(weight: Any, x: State) -> Any:
    """A weight with the trailing axes of x made to broadcast against x."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape) if weight.ndim else weight


class AbstractSampler(diffrax.AbstractSolver):
    """A diffrax solver whose weights come from a table of rows. Its state has the fields `row` and `noise`, which `sample` fills before each step."""

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Any] = diffrax.LocalLinearInterpolation

    @abc.abstractmethod
    def table(self, process: AbstractProcess, prediction: str, ts: Any) -> Any:
        """Rows of weights for the N steps of `ts`, a pytree with leading axis N."""

    @abc.abstractmethod
    def remember(self, x: State, state: Any) -> Any:
        """What to store of the carry (x, state)."""

    @abc.abstractmethod
    def recall(self, memory: Any, state: Any) -> tuple[State, Any]:
        """A carry (x, state) at which the step has the same transpose as at the one remembered; `state` gives the shapes."""

    @property
    def draws(self) -> int:
        """Gaussian draws a step."""
        return 0

    @property
    def tau(self) -> float | None:
        """The stochasticity of the SDE that the steps tend to as they get shorter, 0 for the ODE; None where they tend to no such SDE."""
        return None if self.draws else 0.0

    @property
    def follows_ode(self) -> bool:
        """Whether each state alone follows the ODE (the SDE), so that a continuous adjoint may visit it."""
        return True

    def func(self, terms: Any, t0: Any, y0: State, args: Args) -> State:
        return terms.vf(t0, y0, args)


def check_rows(rows: Any, ts: np.ndarray, what: str) -> None:
    """Raises ValueError where a concrete table holds a number that is not finite, naming the step."""
    for path, values in jax.tree_util.tree_leaves_with_path(rows):
        bad = ~np.isfinite(np.asarray(values).reshape(len(ts) - 1, -1)).all(axis=1)
        if bad.any():
            i, name = int(np.argmax(bad)), jax.tree_util.keystr(path)[1:]
            raise ValueError(
                f"{what} is not defined on step {i} of this grid, t = {ts[i]:g} -> {ts[i + 1]:g} ({name} is not finite there): "
                "a step from alpha = 0 needs a finite or zero sigma_data and a prediction other than eps, "
                "a step from sigma = 0 needs sigma_data > 0 and a prediction other than x0."
            )


def dense_info(y0: State, y1: State) -> dict[str, State]:
    return {"y0": y0, "y1": y1}


def as_dtype(rows: Any, dtype: Any) -> Any:
    """The rows cast once to the state's dtype."""
    return jax.tree.map(lambda row: jnp.asarray(row, None if row.dtype == bool else dtype), rows)
