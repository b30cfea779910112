"""A solver schedule: each step with an order, a splitting, a variable, a rule and a corrector of its own.

Step i is the multistep step of `adjoint_jax.solvers.multistep` in its splitting c_i, its end corrected as in `adjoint_jax.solvers.predictor`.
The output kept of a node is that of its own step, F = u eps + v x0 = A x + B p; a later step in another splitting, F' = u' eps + v' x0, needs
the state X at which the network was evaluated too, for with X = alpha x0 + sigma eps

    F' = ((u v' - v u') X + (alpha u' - sigma v') F) / (alpha u - sigma v).                                          (1)

So the registers are past outputs F_{i-j} and, only where a schedule mixes splittings, past states X_{i-j}.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._numerics import broadcasting, namespace
from ..processes import AbstractProcess
from ..splitting import Level, Splitting, level
from .linear import AbstractLinear, Pattern, Row, Sum
from .multistep import checked_variable
from .step import RULES, VARIABLES, Step, output, weights

WIDTHS = {"data": 0.0, "noise": np.inf}
MOST_NODES = 4


@dataclass(frozen=True)
class Schedule:
    """The unified sampling framework: what each step of a sampler does. `aj.sample(..., grid=schedule.times, solver=schedule)`.

    Every field but `orders` may be one value for all steps.

    Args:
        orders: nodes of each step's predictor, 1 to 4; the first steps use those that there are.
        splittings: "data" (x0 is predicted), "noise" (eps is), or an assumed standard deviation of the data, finite and positive.
        variables: "lam", "rho", "t" or "theta", in which the polynomial is fitted.
        rules: "exact", or for steps through two nodes "midpoint" (UniPC's bh2) or "bh1", or any other rule of `adjoint_jax.solvers.multistep`.
        correctors: nodes of the corrector at each step's end, the new one included: 0 (none) or 2 to 4.
        times: the grid that the schedule was made for, or None.
    Raises:
        ValueError: for lengths that differ, and unknown or impossible choices.
    Reference: Liu et al., A unified sampling framework for solver searching of diffusion probabilistic models (2023).

        schedule = aj.Schedule(orders=(1, 2, 3, 3, 2, 1), splittings=("noise", "noise", "data", "data", "data", "data"))
    """

    orders: Sequence[int]
    splittings: Any = "data"
    variables: Any = "lam"
    rules: Any = "exact"
    correctors: Any = 0
    times: Sequence[float] | None = None

    def __post_init__(self):
        steps = len(self.orders)
        for field in fields(self)[:-1]:
            given = getattr(self, field.name)
            given = (given,) * steps if isinstance(given, str | int | float) else tuple(given)
            if len(given) != steps or not steps:
                raise ValueError(f"A schedule has one choice a step: got {len(given)} {field.name} for {steps} orders.")
            object.__setattr__(self, field.name, given)
        if self.times is not None:
            object.__setattr__(self, "times", tuple(float(t) for t in self.times))
            if len(self.times) != steps + 1:
                raise ValueError(f"A schedule of {steps} steps has {steps + 1} times; got {len(self.times)}.")
        for i, choice in enumerate(zip(self.orders, self.splittings, self.variables, self.rules, self.correctors, strict=True)):
            _check(i, *choice)

    @property
    def steps(self) -> int:
        return len(self.orders)

    def methods(self) -> list[tuple[float, str, str]]:
        """(sigma_data, variable, rule) of each step."""
        return [(_width(s), v, r) for s, v, r in zip(self.splittings, self.variables, self.rules, strict=True)]

    def text(self) -> str:
        """It as json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes it as json."""
        Path(path).write_text(self.text())

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """What `save` wrote. Raises ValueError for another file."""
        data = json.loads(Path(path).read_text())
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) - names or "orders" not in data:
            raise ValueError(f"{path} holds no schedule: expected an object with {', '.join(sorted(names))}, written by Schedule.save.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def _check(step: int, order: Any, splitting: Any, variable: str, rule: str, corrector: Any) -> None:
    """Raises ValueError for a choice that cannot be."""
    if order not in range(1, MOST_NODES + 1) or corrector not in (0, *range(2, MOST_NODES + 1)):
        raise ValueError(f"Step {step}: orders are 1 to 4 and correctors 0 or 2 to 4; got {order!r} and {corrector!r}.")
    if rule not in RULES or variable not in VARIABLES:
        raise ValueError(f"Step {step}: rules are {', '.join(RULES)} and variables {', '.join(VARIABLES)}; got {rule!r} and {variable!r}.")
    if splitting not in WIDTHS and not (isinstance(splitting, int | float) and 0 < splitting < np.inf):
        raise ValueError(f"Step {step}: a splitting is 'data', 'noise' or a finite positive number; got {splitting!r}.")
    checked_variable(variable, Splitting(_width(splitting)))


def _width(splitting: Any) -> float:
    """sigma_data of a choice."""
    return WIDTHS[splitting] if splitting in WIDTHS else float(splitting)


class Scheduled(AbstractLinear):
    """The sampler of a `Schedule`; a schedule given as `solver=` stands for it. One network evaluation a step; order: the lowest that lasts.

    Args:
        schedule: what each step does; the grid has as many steps.
        wide: carry every register that any schedule could need, so that one compiled program serves all schedules of a length.
    Raises:
        ValueError: on a grid with another number of steps, and in `diffeqsolve`, which does not count steps.
    Reference: Liu et al. (2023), as `Schedule`.

        aj.sample(term, x_T, args, grid=ts, solver=aj.solvers.Scheduled(schedule))
    """

    schedule: Schedule = eqx.field(static=True)
    wide: bool = eqx.field(static=True, default=False)

    def order(self, terms: Any) -> int:
        return max(self.schedule.orders)

    @property
    def window(self) -> int:
        return MOST_NODES if self.wide else max(*self.schedule.orders, *self.schedule.correctors)

    @property
    def corrected(self) -> bool:
        return self.wide or any(self.schedule.correctors[:-1])  # nothing is evaluated at the last end

    @property
    def mixed(self) -> bool:
        return self.wide or len({width for width, *_ in self.schedule.methods()}) > 1

    @property
    def pattern(self) -> Pattern:
        outputs, states = [[f"{name}{j}" for j in range(1, self.window)] for name in ("f", "y")]
        registers: dict[str, Sum] = dict(zip(outputs, ["F0", *outputs[:-1]], strict=False))
        if self.mixed:
            registers |= dict(zip(states, ["x", *states[:-1]], strict=False))
        values = ("x", *(("base",) if self.corrected else ()), "F0", *registers)
        return Pattern(("x",), values, {**registers, "base": values} if self.corrected else registers, copies=("base",) if self.corrected else ())

    def use(self, valid: Any, steps: int) -> Any:
        """Which nodes the predictor uses, and which the corrector, of the step before: `[steps, 2, window]`."""
        if steps != self.schedule.steps:
            raise ValueError(f"The schedule has {self.schedule.steps} steps, the grid {steps}: give a grid of {self.schedule.steps + 1} times.")
        counts = np.array([self.schedule.orders, [0, *self.schedule.correctors[:-1]]])
        return valid[:, None] & (np.arange(self.window) < counts.T[..., None])

    @broadcasting
    def rows(self, process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
        if valid.ndim == nodes.ndim:
            raise ValueError("A schedule's steps are those of a grid, which only aj.sample knows: use aj.sample(..., solver=schedule).")
        xp, methods, index = namespace(nodes), self.schedule.methods(), np.arange(len(nodes))
        own = np.array([width for width, *_ in methods])
        owners = own[np.maximum(index[:, None] - np.arange(self.window), 0)]
        with np.errstate(divide="ignore", invalid="ignore"):
            levels, ends = level(process, nodes), level(process, t_end)

        def predict(method: Any, i: Any) -> tuple:
            splitting, at = Splitting(method[0]), levels.at(i)
            start, end = at.at((slice(None), 0)), ends.at(i)
            step = Step.of(splitting, method[1], process, end, nodes[i], valid[i, 0], at.lam)
            found = weights(step, splitting.step(start, end), method[2])
            shares = _shares(splitting, owners[i], at, valid[i, 0], found)
            return splitting.scale(end) / splitting.scale(start), *shares, *output(splitting, prediction, start)

        def correct(method: Any, i: Any) -> tuple:
            swapped, splitting = np.array([1, 0, *range(2, self.window)]), Splitting(method[0])
            at = levels.at(i)
            start, end = at.at((slice(None), 1)), at.at((slice(None), 0))
            there = valid[i, 1] & valid[i, 1, 1:2]
            step = Step.of(splitting, method[1], process, end, nodes[i][:, swapped], there[:, swapped], at.lam[:, swapped])
            found = xp.where(there[:, 1:2], weights(step, splitting.step(start, end), method[2])[:, swapped], 0)
            return _shares(splitting, owners[i], at, there, found)

        with np.errstate(divide="ignore", invalid="ignore"):
            ratio, of_outputs, of_states, of_x, of_p = _by_method(methods, predict, xp)
            shift: dict[str, Any] = dict.fromkeys(self.pattern.registers)
            ratio, one = ratio[:, None], xp.ones_like(nodes[:, :1])
            later = [of_states[:, 1:]] if self.mixed else []
            if self.corrected:
                back_outputs, back_states = _by_method([methods[max(i - 1, 0)] for i in index], correct, xp)
                some = xp.where((valid[:, 1] & valid[:, 1, 1:2]).any(axis=-1)[:, None], one, 0)
                back = [back_states[:, 1:]] if self.mixed else []
                base = ratio * xp.concatenate([1 - some + back_states[:, :1], some, back_outputs, *back], axis=-1)
                x = base + xp.concatenate([of_states[:, :1], 0 * one, of_outputs, *later], axis=-1)
                shift["base"] = base
            else:
                x = xp.concatenate([ratio + of_states[:, :1], of_outputs, *later], axis=-1)
        return Row(nodes[:, :1], of_x[:, None], of_p[:, None], (None,), x, shift)


def _by_method(methods: Sequence[Any], compute: Callable, xp: Any) -> Any:
    """compute(method, steps) for the steps of each distinct method, put back in the order of the steps."""
    groups = {method: np.array([i for i, other in enumerate(methods) if other == method]) for method in dict.fromkeys(methods)}
    found = [compute(method, steps) for method, steps in groups.items()]
    order = np.argsort(np.concatenate(list(groups.values())))
    return jax.tree.map(lambda *parts: xp.concatenate(parts)[order], *found)


def _shares(splitting: Splitting, owners: Any, at: Level, valid: Any, found: Any) -> tuple[Any, Any]:
    """The weights `[N, k]` of the kept outputs and of the states in sum_j found_j F'_j, (1); `owners` are the sigma_data of the kept."""
    xp = namespace(found)
    outputs, states = found, xp.zeros_like(found)
    for width in np.unique(owners[owners != float(splitting.sigma_data)]):
        here = valid & (owners == width)
        of_state, of_output = convert(Splitting(width), splitting, at)
        outputs = xp.where(here, found * of_output, outputs)
        states = xp.where(here, found * of_state, states)
    return outputs, states


def convert(source: Splitting, target: Splitting, at: Level) -> tuple[Any, Any]:
    """The weights of X and F in F', (1)."""
    xp = namespace(at.alpha)
    u, v, u_, v_ = (xp.zeros_like(at.alpha) if part is None else part for splitting in (source, target) for part in splitting.field(at))
    whole = at.alpha * u - at.sigma * v
    return (u * v_ - v * u_) / whole, (at.alpha * u_ - at.sigma * v_) / whole
