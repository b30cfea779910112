"""Exponential multistep methods: one class, told apart by a splitting, a variable and an order.

With z and F of the splitting (`adjoint_jax.splitting`), integrate the polynomial through the last outputs exactly:

    x_{i+1} = (m_{i+1}/m_i) x_i + sum_{j<k} W_j F_{i-j},      W_j = m_{i+1} int_{u_i}^{u_{i+1}} l_j(w(u)) du,         (1)
    F_i = A_i x_i + B_i p_i                                   (the prediction p of any kind is linear in (x, F))      (2)

with l_j the Lagrange basis in the variable w = lam, rho, t or theta. c infinite: w = t is tAB-DEIS, w = rho is rhoAB-DEIS, w = lam is
diffusers' DEIS and DPM-Solver; c = 0: w = lam is DPM-Solver++. The published DPM-Solver++(2M) replaces W_1 by its midpoint value,

    W_1 = -(h_i / (2 h_{i-1})) sum_j W_j.                                                                            (3)

Order: k, where F varies little in the first steps (it does from noise with lam <= -4). Step i < k has order i + 1 only, which caps the
global order at 2 elsewhere. A step into sigma = 0 or out of alpha = 0 has infinite length in lam and is of first order.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from diffrax import RESULTS

from .._numerics import GAUSS_POINTS, GAUSS_WEIGHTS, broadcasting, floating, is_concrete, lagrange, namespace, past_nodes, trailing, zeros_like
from .._types import Args, State
from ..networks import conversions
from ..processes import AbstractProcess
from ..splitting import Level, Splitting, level
from ._base import AbstractSampler, check_rows, dense_info, fit, unwrap

VARIABLES = ("lam", "rho", "t", "theta")


class Row(NamedTuple):
    """One step of (1) and (2)."""

    of_x: Any
    of_p: Any
    ratio: Any
    weights: Any


class MultistepState(eqx.Module):
    """`row` of this step or None, the outputs F_{i-1}, F_{i-2}, ..., and their times where no row is given (infinite: none yet)."""

    row: Row | None
    history: tuple[State, ...]
    times: Any


def output(splitting: Splitting, prediction: str, at: Level) -> tuple[Any, Any]:
    """(A, B) of (2), with the axes of sigma_data behind those of the times."""
    of_eps, of_x0 = splitting.field(at)
    x0, eps = (kind._make(trailing(part, splitting.ndim) for part in kind) for kind in conversions(prediction, at))
    parts = [kind.scaled(by) for kind, by in ((eps, of_eps), (x0, of_x0)) if by is not None]
    return tuple(parts[0] if len(parts) == 1 else parts[0].plus(parts[1]))


def _coordinate(variable: str, splitting: Splitting, process: AbstractProcess, lam: Any, t: Any = None) -> Any:
    """The variable w at half log-SNR `lam` (or at time t, where that is known)."""
    xp = namespace(lam)
    if variable == "t":
        return process.t_of_lam(lam) if t is None else t
    if variable == "rho":
        return xp.exp(-lam)
    return lam if variable == "lam" else xp.arctan2(xp.exp(-lam), floating(splitting.sigma_data, lam))


def exact_weights(splitting: Splitting, variable: str, process: AbstractProcess, end: Level, nodes: Any, lams: Any, valid: Any) -> Any:
    """W_1, W_2, ... of (1) for nodes `[..., k]` at half log-SNR `lams`, by quadrature in lam (or rho, where that is w): `[..., k - 1, *c]`."""
    xp = namespace(nodes)
    points, weights = floating(GAUSS_POINTS, nodes), floating(GAUSS_WEIGHTS, nodes)
    first, last = lams[..., :1], end.lam[..., None]
    if variable == "rho":
        rho = xp.exp(-first) + points * (xp.exp(-last) - xp.exp(-first))
        lam, measure = -xp.log(rho), weights * (xp.exp(-first) - xp.exp(-last)) / rho
    else:
        lam, measure = first + points * (last - first), weights * (last - first)
    basis = lagrange(_coordinate(variable, splitting, process, lams, nodes), valid, _coordinate(variable, splitting, process, lam))
    c = splitting.ndim
    measure = trailing(measure, c) * splitting.density(lam, end)
    return xp.sum(trailing(basis[..., 1:, :], c) * xp.expand_dims(measure, -2 - c), axis=-1 - c)


@broadcasting
def rows(solver: "AbstractMultistep", process: AbstractProcess, prediction: str, nodes: Any, t_end: Any, valid: Any) -> Row:
    """The weights of steps from nodes[..., 0] to t_end with past nodes[..., 1:], of which `valid` exist."""
    xp, splitting, k = namespace(nodes), solver.splitting, nodes.shape[-1]
    start, end = level(process, nodes[..., 0]), level(process, t_end)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = splitting.step(start, end)
        ratio = splitting.scale(end) / splitting.scale(start)
        higher = None
        if k > 1:
            lams = process.lam(nodes)
            valid = valid & xp.isfinite(lams) & xp.isfinite(end.lam)[..., None] & xp.isfinite(lams[..., :1])
            lams = xp.where(xp.isfinite(lams), lams, 0)
            end = end._replace(lam=xp.where(xp.isfinite(end.lam), end.lam, 1))
            higher = exact_weights(splitting, solver.variable, process, end, nodes, lams, valid)
            if solver.midpoint:
                higher = _midpoint(higher, total, lams, end, valid, splitting.ndim)
    axis = -1 - splitting.ndim
    first = xp.expand_dims(total, axis)
    weights = first if higher is None else xp.concatenate([first - xp.sum(higher, axis=axis, keepdims=True), higher], axis=axis)
    return Row(*output(splitting, prediction, start), ratio, weights)


def _midpoint(higher: Any, total: Any, lams: Any, end: Level, valid: Any, c: int) -> Any:
    """The exact weights with those of second-order steps replaced by (3)."""
    xp = namespace(lams)
    second = xp.sum(valid, axis=-1) == 2
    gap = xp.where(second, lams[..., 0] - lams[..., 1], 1)
    w1 = -total * trailing((end.lam - lams[..., 0]) / (2 * gap), c)
    rule = xp.stack([w1] + [xp.zeros_like(w1)] * (valid.shape[-1] - 2), axis=-1 - c)
    return xp.where(trailing(second[..., None], c), rule, higher)


class AbstractMultistep(AbstractSampler):
    """Equations (1)-(3) with k = `steps_back`."""

    steps_back: eqx.AbstractVar[int]
    splitting: eqx.AbstractVar[Splitting]
    variable: eqx.AbstractVar[str]
    midpoint: eqx.AbstractVar[bool]

    def order(self, terms: Any) -> int:
        return self.steps_back

    def table(self, process: AbstractProcess, prediction: str, ts: Any) -> Row:
        nodes, valid = past_nodes(ts, self.steps_back)
        table = rows(self, process, prediction, nodes, ts[1:], valid)
        if is_concrete(table):
            check_rows(table, Row._fields, np.asarray(ts), f"{type(self).__name__} with prediction {prediction!r}")
        return table

    def init(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args) -> MultistepState:
        past = self.steps_back - 1
        return MultistepState(None, (zeros_like(y0),) * past, jnp.full(past, jnp.inf, y0.dtype))

    def step(self, terms: Any, t0: Any, t1: Any, y0: State, args: Args, solver_state: MultistepState, made_jump: Any) -> tuple:
        term, direction = unwrap(terms)
        t0, t1 = (jnp.asarray(t * direction, y0.dtype) for t in (t0, t1))
        row, times = solver_state.row, solver_state.times
        if row is None:
            known = jnp.concatenate([t0[None], times])
            valid = jnp.isfinite(known)
            row = rows(self, term.process, term.prediction, jnp.where(valid, known, t0), t1, valid)
            times = known[:-1]
        prediction = term.predict(t0, y0, args)
        outputs = (fit(row.of_x, y0) * y0 + fit(row.of_p, y0) * prediction, *solver_state.history)
        y1 = fit(row.ratio, y0) * y0
        for weight, past in zip(row.weights, outputs, strict=True):
            y1 = y1 + fit(weight, y0) * past
        return y1, None, dense_info(y0, y1), MultistepState(solver_state.row, outputs[:-1], times), RESULTS.successful

    def remember(self, x: State, state: MultistepState) -> State:
        return x

    def recall(self, memory: State, state: MultistepState) -> tuple[State, MultistepState]:
        return memory, eqx.tree_at(lambda s: s.history, state, tuple(zeros_like(memory) for _ in state.history))


def checked_order(order: int, most: int, name: str) -> int:
    if order not in range(1, most + 1):
        raise ValueError(f"{name} has orders 1 to {most}; got order={order!r}.")
    return int(order)


def checked_variable(variable: str, splitting: Splitting) -> str:
    if variable not in VARIABLES:
        raise ValueError(f"variable={variable!r} is not known: use one of {', '.join(VARIABLES)}.")
    if variable == "theta" and (splitting.kind != "finite" or splitting.ndim):
        raise ValueError("variable='theta' is the angle of one finite sigma_data: use 'rho' or 'lam' with 0, infinity or an array.")
    return variable
