"""What a case is run with, and the helpers that every peer needs."""

from typing import Any, NamedTuple

import numpy as np

import adjoint_jax as aj

from .cases import Case
from .networks import Golden

EXACT = (1e-10, 1e-8)
"""Relative tolerances of x_0 and of the gradients."""


class Missing(NamedTuple):
    """A solver, or a rule of one, that this version does not have."""

    what: str


class Run(NamedTuple):
    """`aj.sample` of a case: x_T = scale * the peer's.

    `adaptive`: what `aj.solvers.adaptive_grid` is told besides the ends, which are the `grid`; `through` the step sizes, too, goes the gradient.
    `encodes`: not a sample but `aj.solvers.encode_noise` is taken, and of its noises the last that is not zero.
    """

    network: Golden
    process: Any
    prediction: str
    grid: Any
    solver: Any
    noise: Any = None
    scale: float = 1.0
    reverse: bool = False
    encodes: bool = False
    adaptive: Any = None
    through: bool = False
    tolerance: tuple[float, float] = EXACT


def betas(name: str, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """The 1000 betas of a training schedule."""
    if name == "linear":
        return np.linspace(first, last, 1000)
    if name == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    angle = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - angle[1:] / angle[:-1], 0.999)


def table(name: str) -> aj.VPDiscrete:
    return aj.VPDiscrete(np.cumprod(1 - betas(name)))


def levels(process: Any, rho: Any) -> np.ndarray:
    """The times at which sigma/alpha is rho; the clean end where rho = 0."""
    rho = np.asarray(rho, np.float64)
    times = process.t_of_lam(-np.log(np.where(rho > 0, rho, 1.0)))
    return np.where(rho > 0, times, process.range[0])


def network(case: Case, process: Any, prediction: str = "eps", times: Any = None, lams: Any = None, **more: Any) -> Golden:
    if times is not None:
        times, lams = np.asarray(times, np.float64), np.asarray(lams, np.float64)
    return Golden(case.model, prediction, process, times, lams, **more)
