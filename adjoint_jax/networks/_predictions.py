"""What a network predicts.

A prediction p of any kind is linear in (x0, eps), and so is x = alpha x0 + sigma eps; hence both are linear in (x, p):

    eps     eps = p                                      x0 = (x - sigma p) / alpha                                  (1)
    x0      x0 = p                                       eps = (x - alpha p) / sigma                                 (2)
    v       p = alpha eps - sigma x0                     x0 = (alpha x - sigma p)/(alpha^2 + sigma^2),
                                                         eps = (sigma x + alpha p)/(alpha^2 + sigma^2)              (3)
    score   p = -eps / sigma                             x0 = (x + sigma^2 p) / alpha                                (4)
    flow    p = alpha' x0 + sigma' eps, D = alpha sigma' - sigma alpha'
                                                         x0 = (sigma' x - sigma p)/D,  eps = (alpha p - alpha' x)/D   (5)
"""

from typing import Any, NamedTuple

import numpy as np

from .._numerics import namespace
from ..splitting import Level

PREDICTIONS = ("eps", "x0", "v", "score", "flow")


def known(prediction: str) -> str:
    """`prediction` itself. Raises ValueError where it is none."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r} is not known: use one of {', '.join(PREDICTIONS)}.")
    return prediction


class Linear(NamedTuple):
    """of_x * x + of_p * p."""

    of_x: Any
    of_p: Any

    def scaled(self, by: Any) -> "Linear":
        return Linear(by * self.of_x, by * self.of_p)

    def plus(self, other: "Linear") -> "Linear":
        return Linear(self.of_x + other.of_x, self.of_p + other.of_p)


def conversions(prediction: str, at: Level) -> tuple[Linear, Linear]:
    """(x0, eps) as linear functions of the state and the prediction, equations (1)-(5). Infinite or NaN where that kind does not determine them."""
    a, s = at.alpha, at.sigma
    xp = namespace(a)
    one, zero = xp.ones_like(a), xp.zeros_like(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        if prediction == "eps":
            return Linear(one / a, -s / a), Linear(zero, one)
        if prediction == "x0":
            return Linear(zero, one), Linear(one / s, -a / s)
        if prediction == "v":
            d = a**2 + s**2
            return Linear(a / d, -s / d), Linear(s / d, a / d)
        if prediction == "score":
            return Linear(one / a, s**2 / a), Linear(zero, -s)
        if prediction == "flow":
            d = a * at.sigma_rate - s * at.alpha_rate
            return Linear(at.sigma_rate / d, -s / d), Linear(-at.alpha_rate / d, a / d)
    raise ValueError(f"prediction={prediction!r} is not known: use one of {', '.join(PREDICTIONS)}.")


def target(prediction: str, at: Level, x0: Any, eps: Any) -> Any:
    """What a network of this kind is trained to predict from x = alpha x0 + sigma eps: the left sides of (1)-(5)."""
    targets = {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: at.alpha * eps - at.sigma * x0,
        "score": lambda: -eps / at.sigma,
        "flow": lambda: at.alpha_rate * x0 + at.sigma_rate * eps,
    }
    return targets[known(prediction)]()
