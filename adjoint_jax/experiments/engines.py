"""How a sampler is differentiated, by name: the interchangeable choices of a comparison; and what a gradient costs.

discrete      exact, every network call made anew                        kept         exact, linearisations kept: a third less work
direct        exact, plain autodiff                                      deis:M       AdjointDEIS at M nodes
published:M   AdjointDEIS-2M as published                                published-1:M  AdjointDEIS-1 as published
last-k:K      exact through the last K steps, blind to x_T (DRaFT-K)     greedy       of the network's clean state at x_T, no sampler
random-k:K    last-k of a random number of steps, at most K (AlignProp)  low-variance:K  through the last step, K new noisings (DRaFT-LV)

The last two draw: `drawn` gives an engine the key of an iterate, and `steady` refuses them where nothing does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np

from .._misfits import needed
from ..adjoints import AdjointDEIS, DiscreteAdjoint, LastK, LowVariance, RandomK
from ..adjoints._nodes import choose

GREEDY = "greedy"
"""In an adjoint's place: the gradient of the metric of the network's clean state at x_T, the sampler left out."""
_published = partial(AdjointDEIS, sigma_data=np.inf, published=True)
ADJOINTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "discrete": (DiscreteAdjoint, ()),
    "kept": (partial(DiscreteAdjoint, keep="all"), ()),
    "direct": (diffrax.DirectAdjoint, ()),
    "deis": (AdjointDEIS, ("steps", "order", "sigma_data")),
    "published": (partial(_published, order=2), ("steps", "order")),
    "published-1": (partial(_published, order=1), ("steps",)),
    "last-k": (LastK, ("k",)),
    "random-k": (lambda k=None: RandomK(jax.random.key(0), k), ("k",)),
    "low-variance": (lambda k=2: LowVariance(jax.random.key(0), k), ("k",)),
    GREEDY: (lambda: GREEDY, ()),
}
"""Constructors, and the options that they take."""


def engine(name: str) -> Any:
    """The adjoint named `name` or `name:number` of the table above, or GREEDY. Raises ValueError for another, or a last-k without K."""
    kind, _, number = name.partition(":")
    make, options = ADJOINTS.get(kind, (None, ()))
    if make is None or (number and (not options or not number.isdecimal())):
        forms = ", ".join(each + (f":{keys[0].upper()}" if keys else "") for each, (_, keys) in ADJOINTS.items())
        raise ValueError(f"The gradient {name} is not known: use one of {forms}, the capitals a whole number.")
    if needed(make) and not number:
        raise ValueError(f"The gradient {name} needs the number of steps that it differentiates: {name}:1, for instance.")
    return make(**{option: int(number) for option in options[:1] if number})


def steady(name: str) -> Any:
    """`engine(name)` where it serves every update. Raises ValueError for one that draws: it would be of the same draw each time."""
    if isinstance(found := engine(name), RandomK | LowVariance):
        raise ValueError(f"The gradient {name} draws anew at each update, which here none does: use another.")
    return found


def drawn(engine: Any, key: Any) -> Any:
    """The engine with another key, where it draws; itself where it does not."""
    return eqx.tree_at(lambda adjoint: adjoint.key, engine, key) if isinstance(engine, RandomK | LowVariance) else engine


def evaluations(sampler: Any, adjoint: diffrax.AbstractAdjoint | str, look: bool = True) -> tuple[int, int]:
    """(forward, backward) evaluations of the network for one gradient through a `guide.Sampler`, a batch counted as one and guidance as two.

    With those of the sample, which `GREEDY` needs only where one is to `look` at it.
    """
    solver = sampler.solver
    steps, rows = len(sampler.grid) - 1, solver.table(sampler.process, sampler.prediction, sampler.grid)
    stages = np.full(steps, len(solver.pattern.reads)) if rows.active is None else np.sum(rows.active, axis=1)
    once = int(stages.sum())
    forward, backward = 2 * once, once
    if isinstance(adjoint, diffrax.DirectAdjoint) or (isinstance(adjoint, DiscreteAdjoint) and adjoint.keep == "all"):
        forward = once
    if adjoint == GREEDY:
        forward, backward = once * look + 1, 1
    if isinstance(adjoint, LastK | RandomK):
        last = int(stages[-(adjoint.k if isinstance(adjoint, LastK) else adjoint.most or steps) :].sum())
        forward, backward = once + last, last
    if isinstance(adjoint, LowVariance):
        forward, backward = once + 2 * adjoint.samples, adjoint.samples
    if isinstance(adjoint, AdjointDEIS):
        index = choose(sampler.grid, sampler.process.lam(sampler.grid), adjoint.steps, adjoint.nodes)
        nodes = max(len(index) - (adjoint.mode == "AB"), 0)
        exact = int(stages[-1] * (index[0] < steps) + stages[0] * (index[-1] > 0)) if len(index) else once
        forward, backward = once + nodes + exact, nodes * (2 if adjoint.mode == "PECE" else 1) + exact
    times = 2 if sampler.guided else 1
    return times * forward, times * backward
