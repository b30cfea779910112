"""The time that a network is given, where it is not the time of its state.

Time sharing, for boundaries t_0 < ... < t_n:

    f(t) = t_{i-1} for t in [t_{i-1}, t_i),    f(t) = t for t >= t_n,    f(t) = t_0 for t < t_0                              (1)

Rounding, in a unit in which the network counts, say 1000 for training steps of t in [0, 1]:

    f(t) = r(unit t) / unit                                                                                         (2)

Tables given as numpy arrays or lists are constants of the program, those given as JAX arrays are its arguments.

Both are constant in pieces: the state and the weights of the solver keep their own noise level, the gradient in t through the network is zero
(outside of the shared times of (1), where it is that of the network), and jumps have none.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._numerics import floating, is_concrete
from .._types import Args, Network, State
from ._wrapping import as_pytree, hosted, unhosted


class _Retimed(eqx.Module):
    network: Network
    time: Any

    def __call__(self, x: State, t: Any, args: Args) -> State:
        return self.network(x, self.time(floating(t, x)), args)


class _Shared(eqx.Module):
    boundaries: Any

    def __call__(self, t: Any) -> Any:
        starts = floating(unhosted(self.boundaries), t)
        shared = starts[jnp.clip(jnp.searchsorted(starts, t, side="right") - 1, 0, len(starts) - 1)]
        return jnp.where(t < starts[-1], shared, t)  # (1)


def time_sharing(network: Network, boundaries: Any, intervals: int = 1) -> Network:
    """E-TSDM: below t_n the network is given one time for each sub-interval, its left end, so that it cannot vary steeply in t there.

    It is for networks that were trained so. The state keeps its own noise level.

    Args:
        network: any network.
        boundaries: `[n + 1]` increasing times t_0 .. t_n, or a number t_n: then `intervals` equal sub-intervals of [0, t_n]. t_0 is a time that the
            network is given: where its own time is log sigma it must not be 0.
        intervals: their number, for a number t_n.

    Raises:
        ValueError: for boundaries that do not increase, or intervals < 1.
    Reference: Yang et al., Lipschitz singularities in diffusion models (ICLR 2024).

        shared = aj.networks.time_sharing(network, 100.0, intervals=5)  # 0, 20, 40, 60, 80 for t < 100
        x_0 = aj.sample(aj.DiffusionTerm(shared, process, "eps"), x_T, args, grid=ts)
    """
    if np.ndim(boundaries) == 0:
        if intervals < 1:
            raise ValueError(f"Time sharing needs at least one sub-interval; got intervals={intervals}.")
        boundaries = boundaries * floating(np.arange(intervals + 1), boundaries) / intervals
    if not hasattr(boundaries, "dtype"):
        boundaries = np.asarray(boundaries, np.float64)
    if is_concrete(boundaries) and (np.ndim(boundaries) != 1 or len(boundaries) < 2 or not np.all(np.diff(np.asarray(boundaries, np.float64)) > 0)):
        raise ValueError(f"boundaries must be at least two increasing times; got {boundaries}.")
    return _Retimed(as_pytree(network), _Shared(hosted(boundaries)))


def nearest(t: Any) -> Any:
    """The nearest integer, the even one of two: as numpy and torch round."""
    return jnp.round(t)


def truncate(t: Any) -> Any:
    """The integer towards zero, as a cast to int64. A time within 4 rounding errors of an integer is that integer: times come from inverses."""
    return jnp.trunc(t * (1 + 4 * jnp.finfo(t.dtype).eps))


class _Rule(eqx.Module):
    rule: Callable = eqx.field(static=True)
    unit: Any

    def __call__(self, t: Any) -> Any:
        unit = floating(self.unit, t)
        return self.rule(unit * t) / unit  # (2)


class Table(eqx.Module):
    """`given[j]` at the time nearest to `times[j]`."""

    times: Any
    given: Any

    def __call__(self, t: Any) -> Any:
        times, given = (floating(value, t) for value in unhosted((self.times, self.given)))
        return given[jnp.argmin(jnp.abs(times - t))]


RULES = {"nearest": nearest, "truncate": truncate}


def rounded_times(network: Network, rule: Any = "nearest", unit: Any = 1.0) -> Network:
    """The network at the time that a scheduler would give it, r(unit t) / unit, while the state stays at its own noise level.

    Schedulers that choose noise levels first and look up integer times for the network do this: diffusers rounds the times of its Karras and "lu"
    grids and truncates those of its exponential, beta and flow grids. It is their error, not a better sampler: for reproducing their numbers.

    Args:
        network: any network.
        rule: "nearest" (half to even), "truncate" (towards zero); or a function of unit t; or a pair (times, given) of vectors `[n]`: at the time
            nearest to times[j], the network is given given[j] (unit is not used) -- for DDIM, whose model times and states' times differ.
        unit: training steps in one unit of the process's time: 1 for `VPDiscrete`, 1000 for a flow trained in 1000 steps.

    Raises:
        ValueError: for an unknown rule, or vectors of unequal length.

        term = aj.DiffusionTerm(aj.networks.rounded_times(network), process, "eps")
        x_0 = aj.sample(term, x_T, args, grid=aj.grids.karras(process, 20))
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not known: use one of {', '.join(RULES)}, a function, or a pair (times, given).")
        rule = RULES[rule]
    if callable(rule):
        return _Retimed(as_pytree(network), _Rule(rule, unit))
    times, given = (value if hasattr(value, "dtype") else np.asarray(value, np.float64) for value in rule)
    if np.ndim(times) != 1 or np.shape(times) != np.shape(given) or not len(times):
        raise ValueError(f"A look-up needs two vectors of equal length, (times, given); got shapes {np.shape(times)} and {np.shape(given)}.")
    return _Retimed(as_pytree(network), Table(*hosted((times, given))))
