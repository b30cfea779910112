"""Recognising faces: a second recogniser without a network, verification rates, and the success of morphs.

Local binary patterns: at each pixel c, P = 8 points p_k on a circle of radius 2 about it,

    code = sum_k 2^k [p_k >= c],   kept where the circle has at most two changes of sign (58 codes), else counted together      (1)

Histograms of (1) over the cells of a grid, and  -chi^2(u, v) = -sum (u - v)^2/(u + v)  as similarity                     (2)
(Ahonen, Hadid & Pietikainen, PAMI 2006). Similarities s, larger is more alike, of pairs of one person (genuine) and of two (impostors):

    FMR(tau) = share of impostor pairs with s > tau,        tau the smallest with FMR(tau) <= a given rate                         (3)

A morph m of the people a and b has similarities s_p^i to the images i of each p, and with N morphs

    MMPMR = 1/N sum_m [min_p max_i s_p^i > tau],            each person is matched by at least one image (MinMax)                    (4)
    ProdAvg = 1/N sum_m prod_p mean_i [s_p^i > tau],        a guard holds one image of each                                     (5)

(Scherhag et al., Biometric systems under morphing attacks, BIOSIG 2017, where (4) with one image a person is the definition.)
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

POINTS, RADIUS = 8, 2


def binary_patterns(images: Any) -> np.ndarray:
    """The codes (1) of grey images `[B, H, W]`, as numbers 0 .. 58, edges repeated; points between pixels by bilinear interpolation."""
    images = np.asarray(images, np.float64)
    _, height, width = images.shape
    padded = np.pad(images, ((0, 0), *((RADIUS, RADIUS),) * 2), mode="edge")
    bits = []
    for k in range(POINTS):
        down, right = (round(RADIUS * part, 9) for part in (-np.cos(2 * np.pi * k / POINTS), np.sin(2 * np.pi * k / POINTS)))
        i, j = int(np.floor(down)), int(np.floor(right))
        value = np.zeros_like(images)
        for di, dj, weight in ((a, b, (1 - abs(down - i - a)) * (1 - abs(right - j - b))) for a in (0, 1) for b in (0, 1)):
            if weight:
                top, left = RADIUS + i + di, RADIUS + j + dj
                value += weight * padded[:, top : top + height, left : left + width]
        bits.append(value >= images - 1e-9)  # rounding must not decide on flat ground
    circle = np.stack(bits)
    uniform = np.sum(circle != np.roll(circle, 1, axis=0), axis=0) <= 2
    codes = np.sum(circle << np.arange(POINTS).reshape(-1, 1, 1, 1), axis=0)
    known = np.array([code for code in range(2**POINTS) if _changes(code) <= 2])
    return np.where(uniform, np.searchsorted(known, codes), len(known))


def _changes(code: int) -> int:
    return sum((code >> k & 1) != (code >> (k + 1) % POINTS & 1) for k in range(POINTS))


def histograms(images: Any, cells: int) -> np.ndarray:
    """Histograms of (1) in `cells` x `cells` cells, `[B, cells^2 59]`, each cell's of sum 1."""
    codes = binary_patterns(images)
    bins = POINTS * (POINTS - 1) + 3
    parts = [part for row in np.array_split(codes, cells, axis=1) for part in np.array_split(row, cells, axis=2)]
    counted = [np.stack([np.bincount(each.ravel(), minlength=bins) / each.size for each in part]) for part in parts]
    return np.concatenate(counted, axis=1)


def chi_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The similarity (2) of each of `u` `[A, D]` to each of `v` `[B, D]`, `[A, B]`."""
    return np.stack([-np.sum((each - v) ** 2 / np.maximum(each + v, 1e-12), axis=1) for each in u])


class Verification(NamedTuple):
    """How well a recogniser tells people apart: share of images whose nearest other image is of the same person, area under the ROC curve,
    mean similarities, the threshold (3) and the share of genuine pairs above it."""

    rank_1: float
    auc: float
    same: float
    different: float
    threshold: float
    true_match_rate: float


def verification(similarities: np.ndarray, people: np.ndarray, rate: float) -> Verification:
    """Of all pairs of images, similarities `[n, n]`, people `[n]`, the threshold at a false match rate."""
    same = people[:, None] == people[None]
    pairs = np.triu(np.ones_like(same), 1)
    genuine, impostor = similarities[same & pairs], similarities[~same & pairs]
    others = np.where(np.eye(len(people), dtype=bool), -np.inf, similarities)
    wins = rankdata(np.concatenate([genuine, impostor]))[: len(genuine)].sum() - len(genuine) * (len(genuine) + 1) / 2
    tau = threshold(impostor, rate)
    nearest = float(np.mean(people[others.argmax(axis=1)] == people))
    means = float(genuine.mean()), float(impostor.mean())
    return Verification(nearest, float(wins / (len(genuine) * len(impostor))), *means, tau, float(np.mean(genuine > tau)))


def threshold(impostor: np.ndarray, rate: float) -> float:
    """(3): at most `rate` of these similarities are above it."""
    allowed = int(np.floor(rate * len(impostor)))
    return float(np.sort(impostor)[len(impostor) - 1 - allowed])


def matched(similarities: np.ndarray, tau: float) -> np.ndarray:
    """The terms of (4), `[N]`, of similarities `[N, 2, images]`."""
    return similarities.max(axis=2).min(axis=1) > tau


def product_average(similarities: np.ndarray, tau: float) -> float:
    """(5)."""
    return float(np.mean(np.prod(np.mean(similarities > tau, axis=2), axis=1)))
