"""Step sizes of the published adaptive samplers, as a search for a grid.

A solver with an error estimate goes from lam to lam + h, giving x' and x'_low = x' - error. With x_low that of the step before,

    d = (x' - x'_low) / max(atol, rtol max(|x'_low|, |x_low|)),    E = RMS(d)                                       (1)
    f = s E^(-b_0) E_1^(-b_1) E_2^(-b_2),    b = (P + I + D, -(P + 2 D), D) / order                                (2)
    x' is accepted where L(f) >= a;    h <- min(L(f) h, lam_end - lam)   in either case                             (3)

with E_1, E_2 the errors of the last accepted steps. DPM-Solver takes L(f) = f, s = a = 0.9, that is E <= 1, I = 1 alone and in (1) the
largest RMS of the batch; k-diffusion L(f) = 1 + atan(f - 1), s = 1, a = 0.81 and the RMS of the whole.

As published, DPM-Solver rounds f / s to float32 and stops wherever |t - t_end| <= 1e-5, at t = 1e-3 of VPLinear up to 0.0054 in lam too early;
k-diffusion's h in (3) is not cut to lam_end - lam, only the step is, so that a rejected last step is tried again with almost the same length.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import at_least_float32, is_concrete
from .._traced import in_order
from .._types import Args, State
from ..terms import DiffusionTerm
from .linear import AbstractLinear

SLACK = 1e-5
"""The distance in lam within which the end is reached; a step that would stop there goes on to it."""


class StepController(NamedTuple):
    """Equations (1)-(3).

    Args:
        safety, accept: s and a.
        pcoeff, icoeff, dcoeff: P, I and D.
        limited: L(f) = 1 + atan(f - 1) rather than f.
        per_sample: E is the largest of the leading axis rather than one of all of x.
        floor: added to E; with E = 0 the step goes to the end.
        rounded, early, uncut: f / s rounded to float32; the |t - t_end| at which to stop; h not cut.
    """

    safety: float = 1.0
    accept: float = 0.81
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    limited: bool = True
    per_sample: bool = False
    floor: float = 1e-8
    rounded: bool = False
    early: float = 0.0
    uncut: bool = False

    def error(self, difference: State, scale: State) -> Any:
        """E of (1)."""
        squares = (difference / scale) ** 2
        if self.per_sample and squares.ndim:
            return jnp.sqrt(jnp.max(jnp.mean(squares.reshape(squares.shape[0], -1), axis=1)))
        return jnp.sqrt(jnp.mean(squares))

    def factor(self, error: Any, past: Any, order: int) -> Any:
        """L(f) of (2), (3)."""
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        growth = error ** (-(p + i + d) / order) * past[0] ** ((p + 2 * d) / order) * past[1] ** (-d / order)
        growth = growth.astype(jnp.float32).astype(error.dtype) if self.rounded else growth
        return 1 + jnp.arctan(self.safety * growth - 1) if self.limited else self.safety * growth


DPM_SOLVER = StepController(0.9, 0.9, limited=False, per_sample=True, floor=0.0)
CONTROLLERS = {
    ("dpm-solver", False): DPM_SOLVER,
    ("dpm-solver", True): DPM_SOLVER._replace(rounded=True, early=1e-5),
    ("k-diffusion", False): StepController(),
    ("k-diffusion", True): StepController(uncut=True),
}


class AdaptiveGrid(NamedTuple):
    """`ts` `[N + 1]`, what was accepted, and the `x` it ends at; `accepted`, whether each attempt was; the number of network evaluations."""

    ts: Any
    x: State
    accepted: tuple[bool, ...]
    evaluations: int

    @property
    def rejections(self) -> int:
        return self.accepted.count(False)


class _Search(NamedTuple):
    """Where the search is: time, h, x, x_low and E_1, E_2 (0: none yet)."""

    t: Any
    h: Any
    x: State
    low: State
    past: Any


def adaptive_grid(
    term: DiffusionTerm,
    x_T: State,
    args: Args = None,
    *,
    solver: AbstractLinear,
    controller: str | StepController = "dpm-solver",
    published: bool = False,
    t_start: float | None = None,
    t_end: float | None = None,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h: float = 0.05,
    most: int = 4096,
    like: AdaptiveGrid | None = None,
) -> AdaptiveGrid:
    """The grid that an adaptive sampler takes from x_T: adaptive steps and an exact gradient, in two calls.

    The search is not differentiated, as in k-diffusion. With `like`, an answer for the same start, it is repeated with as many attempts, and
    ts and x are traced and differentiable in x_T and args by plain autodiff: through the step sizes too, as in DPM-Solver's code.

    Args:
        term, x_T, args: as for `aj.sample`; x_T concrete unless `like` is given.
        solver: one that estimates its error: `ExponentialStages` of order 2 (DPM-Solver-12) or 3 (DPM-Solver-23), or an `ExponentialRK` of
            such a diffrax solver.
        controller, published: "dpm-solver" or "k-diffusion", as above or with their code's own details; or a `StepController`.
        t_start, t_end: both of finite lam; by default the process's span.
        rtol, atol, h: tolerances, and the first step in lam.
        most: attempts after which the search is given up.
    Returns:
        An `AdaptiveGrid`, its ts in numpy float64 unless `like` is given.
    Raises:
        TypeError: for a solver without an error estimate, or a traced x_T without `like`.
        ValueError: for another controller, an infinite lam, or a search that does not arrive.
    Reference: Lu et al., DPM-Solver (2022), adaptive step size; k-diffusion's `sample_dpm_adaptive`.

        solver = aj.solvers.ExponentialStages(3)
        ts = aj.solvers.adaptive_grid(term, x_T, args, solver=solver).ts
        x_0 = aj.sample(term, x_T, args, grid=ts, solver=solver)
    """
    rule = _checked(term, solver, controller, published)
    x = jnp.asarray(x_T)
    x = x.astype(at_least_float32(x.dtype))
    span = [float(given if given is not None else own) for given, own in zip((t_start, t_end), term.process.span, strict=True)]
    if not np.all(np.isfinite(term.process.lam(np.asarray(span)))):
        raise ValueError(f"Adaptive steps are steps in lam, which is infinite at t_start={span[0]:g} or t_end={span[1]:g}: give times between.")
    tolerances = np.asarray([rtol, atol, h, *span])  # one array: other tolerances do not compile anew
    if like is not None:
        times, x = _repeat(term, x, args, tolerances, solver, rule, len(like.accepted))
        return like._replace(ts=jnp.concatenate([jnp.asarray(span[:1], x.dtype), times[np.flatnonzero(like.accepted)]]), x=x)
    if not is_concrete(x, args, term):
        raise TypeError("adaptive_grid is not traced: call it outside of jit and grad, or with like=, its own earlier answer.")
    last, times, kept, attempts = _find(term, x, args, tolerances, solver, rule, most)
    kept = np.asarray(kept)[: int(attempts)]
    if not _arrived(last.t, tolerances, rule):
        raise ValueError(
            f"No grid in {attempts} attempts: at t = {float(last.t):g} the step in lam is {float(last.h):g}; loosen rtol={rtol:g}, atol={atol:g}."
        )
    ts = np.asarray(times, np.float64)[: int(attempts)][kept]
    ts = np.array([span[0], *ts[:-1], ts[-1] if rule.early else span[1]])
    return AdaptiveGrid(ts, last.x, tuple(map(bool, kept)), int(attempts) * len(solver.pattern.reads))


def _checked(term: Any, solver: Any, controller: Any, published: bool) -> StepController:
    if not isinstance(term, DiffusionTerm):
        raise TypeError(f"term must be an aj.DiffusionTerm(network, process, prediction); got {type(term).__name__}.")
    if not isinstance(solver, AbstractLinear) or solver.pattern.error is None or solver.pattern.registers:
        raise TypeError(f"adaptive_grid takes a one-step solver with an error estimate such as ExponentialStages(2); got {type(solver).__name__}.")
    if isinstance(controller, StepController):
        return controller
    if (controller, published) not in CONTROLLERS:
        raise ValueError(f"controller={controller!r} is not known: use 'dpm-solver', 'k-diffusion' or a StepController.")
    return CONTROLLERS[controller, published]


def _arrived(t: Any, tolerances: Any, rule: StepController) -> Any:
    return jnp.abs(t - jnp.asarray(tolerances[-1], t.dtype)) <= rule.early


def _start(x: State, tolerances: Any) -> _Search:
    _, _, h, t_start, _ = jnp.asarray(tolerances, x.dtype)
    return _Search(t_start, h, x, x, jnp.zeros(2, x.dtype))


def _attempt(term: Any, args: Args, tolerances: Any, solver: Any, rule: StepController, at: _Search) -> tuple[_Search, Any, Any]:
    """One step of (1)-(3): the search after it, the time it went to, and whether it was accepted."""
    rtol, atol, _, _, t_end = jnp.asarray(tolerances, at.x.dtype)
    process = term.process
    left = process.lam(t_end) - process.lam(at.t)
    t = jnp.where(at.h >= left - SLACK, t_end, process.t_of_lam(process.lam(at.t) + at.h))
    state = solver.init(term, at.t, t, at.x, args)
    x, difference = in_order(lambda x: solver.step(term, at.t, t, x, args, state, False)[:2])(at.x)
    low = x - difference
    error = rule.error(difference, jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(at.low)))) + rule.floor  # (1)
    past = jnp.where(at.past > 0, at.past, error)
    factor = rule.factor(error, past, solver.order(term))
    accepted = factor >= rule.accept
    h = factor * at.h  # (3)
    following = jax.tree.map(functools.partial(jnp.where, accepted), _Search(t, h, x, low, jnp.stack([error, past[0]])), at._replace(h=h))
    left = process.lam(t_end) - process.lam(following.t)
    return following._replace(h=h if rule.uncut else jnp.minimum(h, left)), t, accepted


@eqx.filter_jit
def _find(term: Any, x: State, args: Args, tolerances: Any, solver: Any, rule: StepController, most: int) -> Any:
    """The last point of the search, the times of all attempts and which were accepted, `[most]`, and the number of attempts."""

    def going(carry: Any) -> Any:
        at, _, _, n = carry
        return (n < most) & (at.h > 0) & ~_arrived(at.t, tolerances, rule)

    def body(carry: Any) -> Any:
        at, times, kept, n = carry
        at, t, accepted = _attempt(term, args, tolerances, solver, rule, at)
        return at, times.at[n].set(t), kept.at[n].set(accepted), n + 1

    return jax.lax.while_loop(going, body, (_start(x, tolerances), jnp.zeros(most, x.dtype), jnp.zeros(most, bool), jnp.zeros((), int)))


def _repeat(term: Any, x: State, args: Args, tolerances: Any, solver: Any, rule: StepController, attempts: int) -> Any:
    """The times of that many attempts and where they end, differentiable."""

    def body(at: _Search, _: None) -> tuple[_Search, Any]:
        at, t, _ = _attempt(term, args, tolerances, solver, rule, at)
        return at, t

    at, times = jax.lax.scan(body, _start(x, tolerances), length=attempts)
    return times, at.x
