"""Statistics of a table: of successes and of means.

Wilson:  (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),    p = successes/n,  z = 1.96 at 95 %        (1)
t:       m +- t s/sqrt(n),    m and s^2 the mean and variance of n numbers,  t the quantile of Student's t with n - 1               (2)
people:  quantiles of  sum w v / sum w,    w = c_a c_b of a pair (a, b),  c how often each person is among as many drawn with return  (3)
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval (1) of a probability. Raises ValueError unless 0 <= successes <= trials, trials > 0.

    Reference: Wilson, Probable inference, the law of succession, and statistical inference (JASA 1927).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"An interval needs 0 <= successes <= trials and a trial; got {successes} of {trials}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / trials
    centre, half = p + z**2 / (2 * trials), z * sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    low, high = ((centre + sign * half) / (1 + z**2 / trials) for sign in (-1, 1))
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def rate(successes: int, trials: int) -> str:
    """`successes/trials`, in per cent, with its 95 % interval, for a table."""
    low, high = wilson(successes, trials)
    return f"{100 * successes / trials:.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({successes}/{trials})"


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean and its interval (2); of differences of pairs, that of the paired t test. Raises ValueError for fewer than two values."""
    if len(values) < 2:
        raise ValueError(f"An interval of a mean needs two values; got {len(values)}.")
    mean, half = fmean(values), float(student.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return mean, mean - half, mean + half


def over_people(values: Any, pairs: Any, confidence: float = 0.95, draws: int = 4000) -> tuple[float, float, float]:
    """The mean of values `[N]` of pairs `[N, 2]` of people, which share people and so are dependent, and its interval (3), the same at each call.

    Reference: Snijders and Borgatti, Non-parametric standard errors and tests for network statistics (Connections 1999), the bootstrap of vertices.
    """
    people, members = np.unique(np.asarray(pairs), return_inverse=True)
    a, b = members.reshape(-1, 2).T
    counts = np.random.default_rng(0).multinomial(len(people), np.full(len(people), 1 / len(people)), size=draws)
    weights = counts[:, a] * counts[:, b]
    weights = weights[weights.sum(axis=1) > 0]
    low, high = np.quantile(weights @ np.asarray(values, np.float64) / weights.sum(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.mean(values)), float(low), float(high)


def mean(values: Sequence[float]) -> str:
    """The mean with its 95 % interval, for a table."""
    middle, low, high = interval(values)
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"
