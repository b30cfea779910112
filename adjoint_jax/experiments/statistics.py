"""Statistics of a table of successes.

Wilson:  (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),    p = successes/n,  z = 1.96 at 95 %        (1)
"""

from math import sqrt
from statistics import NormalDist


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
