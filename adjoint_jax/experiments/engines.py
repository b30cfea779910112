"""How a sampler is differentiated, by name: the interchangeable choices of a comparison.

discrete      exact, every network call made anew                        kept         exact, linearisations kept: a third less work
direct        exact, plain autodiff                                      deis:M       AdjointDEIS at M nodes
published:M   AdjointDEIS-2M as published                                published-1:M  AdjointDEIS-1 as published
last-k:K      exact through the last K steps, blind to x_T (DRaFT-K)     greedy       of the network's clean state at x_T, no sampler
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import numpy as np

from ..adjoints import AdjointDEIS, DiscreteAdjoint, LastK

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
    GREEDY: (lambda: GREEDY, ()),
}
"""Constructors, and the options that they take."""


def engine(name: str) -> Any:
    """The adjoint named `name` or `name:number` of the table above, or GREEDY. Raises ValueError for another."""
    kind, _, number = name.partition(":")
    make, options = ADJOINTS.get(kind, (None, ()))
    if make is None or (number and (not options or not number.isdecimal())):
        forms = ", ".join(each + (f":{keys[0].upper()}" if keys else "") for each, (_, keys) in ADJOINTS.items())
        raise ValueError(f"The gradient {name} is not known: use one of {forms}, the capitals a whole number.")
    return make(**({options[0]: int(number)} if number else {}))
