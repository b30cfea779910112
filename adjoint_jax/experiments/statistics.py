"""Statistics of a table: of successes and of means.

Wilson:  (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),    p = successes/n,  z = 1.96 at 95 %        (1)
t:       m +- t s/sqrt(n),    m and s^2 the mean and variance of n numbers,  t the quantile of Student's t with n - 1               (2)
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev

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


def mean(values: Sequence[float]) -> str:
    """The mean with its 95 % interval, for a table."""
    middle, low, high = interval(values)
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"
