"""Predictions of the clean state kept within the range of the data.

    x0 <- clip(x0, low, high)                                                                                       (1)
    x0 <- clip(x0, -s, s) / s,    s = clip(quantile_p |x0|, low, high), one s for each sample                            (2)

Both answer with x0, and eps follows it, x = alpha x0 + sigma eps, in every solver: as in DPM-Solver++. diffusers' DDIM differs: it keeps the
eps of the x0 before (1) or (2) unless told `use_clipped_model_output=True`. Its step from s to t, with the weight w of eps, is that of a network
which knows the grid (`keep_eps`): with r = alpha_s w / (alpha_t sigma_s),

    x0 <- (c - r x0) / (1 - r),    c the x0 of (1) or (2).                                                              (3)
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._numerics import floating, is_concrete, namespace
from .._types import Args, Network, State
from ..processes import AbstractProcess
from ..splitting import level
from ._predictions import conversions, known
from ._wrapping import as_pytree, hosted, per_sample, predict, samples, unhosted
from .times import Table


class _Clean(eqx.Module):
    """The network's x0, which `correct` changes; `share` of t is r of (3), none for 0."""

    network: Network
    process: AbstractProcess
    prediction: str = eqx.field(static=True)
    correct: Any
    share: Any = None

    def __call__(self, x: State, t: Any, args: Args) -> State:
        of, _ = conversions(self.prediction, level(unhosted(self.process), floating(t, x)))
        x0 = of.of_x * x + of.of_p * predict(self.network, x, t, args)
        if self.share is None:
            return self.correct(x0)
        r = self.share(floating(t, x))
        return (self.correct(x0) - r * x0) / (1 - r)  # (3)


def keep_eps(clean: Any, times: np.ndarray, shares: np.ndarray) -> Network:
    """What `clip` or `threshold` gave, with the eps of the x0 before it, (3): r is `shares[i]` on the step from `times[i]`."""
    return _Clean(clean.network, clean.process, clean.prediction, clean.correct, Table(*hosted((times, shares))))


def _quantile(values: Any, ratio: Any) -> Any:
    """Of each row `[B, n]`, linear between order statistics. `jnp.quantile` would do but for its float64 constant (a NaN) where x64 is on."""
    ordered, last = jnp.sort(values, axis=1), values.shape[1] - 1
    position = last * (np.asarray(ratio, np.float64) if is_concrete(ratio) else ratio)
    xp = namespace(position)
    below = xp.clip(xp.floor(position), 0, max(last - 1, 0))
    low, high = (jnp.take(ordered, (below + k).astype(np.int32), axis=1) for k in (0, 1))
    return low + floating(position - below, values) * (high - low)


class _Clip(eqx.Module):
    low: Any
    high: Any

    def __call__(self, x0: State) -> State:
        return jnp.clip(x0, floating(self.low, x0), floating(self.high, x0))  # (1)


class _Threshold(eqx.Module):
    ratio: Any
    low: Any
    high: Any

    def __call__(self, x0: State) -> State:
        largest = _quantile(jnp.abs(samples(x0, "aj.networks.threshold")), self.ratio)
        s = per_sample(jnp.clip(largest, floating(self.low, x0), floating(self.high, x0)), x0)
        return jnp.clip(x0, -s, s) / s  # (2)


def clip(network: Network, process: AbstractProcess, prediction: str, low: Any = -1.0, high: Any = 1.0) -> Network:
    """The network as one that predicts "x0", clipped to [low, high]; the gradient is zero where it clips.

    Args:
        network: a network of this process and prediction.
        low, high: numbers, or arrays of x's rank; differentiable. diffusers' `clip_sample_range` r is (-r, r).

    Raises:
        ValueError: for an unknown prediction; where low < high does not hold.

        clipped = aj.networks.clip(network, process, "eps")
        x_0 = aj.sample(aj.DiffusionTerm(clipped, process, "x0"), x_T, args, grid=ts)
    """
    if is_concrete(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"The range of the data needs low < high; got low={low}, high={high}.")
    return _Clean(as_pytree(network), hosted(process), known(prediction), _Clip(low, high))


def threshold(network: Network, process: AbstractProcess, prediction: str, ratio: Any = 0.995, low: Any = 1.0, high: Any = np.inf) -> Network:
    """Dynamic thresholding: the network as one that predicts "x0", clipped to the `ratio` quantile s of |x0| and divided by s.

    s is that of each sample, linear between order statistics as torch's, kept in [low, high]; the answer lies in [-1, 1]. Differentiable, s
    included. For pixels; latents have no such range.

    Args:
        network: a network of this process and prediction.
        ratio: the share of |x0| that is not clipped, in [0, 1].
        low, high: the range of s. DPM-Solver: low is its `thresholding_max_val`, high infinite (diff-sampler always does so, with low = 1 and
            ratio = 0.995). diffusers: low = 1, high = `sample_max_value`, whose default 1 makes this a plain clip to [-1, 1].

    Raises:
        ValueError: for an unknown prediction; a concrete ratio outside [0, 1]; an x without a batch axis (under vmap give x[None]).
    Reference: Saharia et al., Photorealistic text-to-image diffusion models (2022), dynamic thresholding.

        bounded = aj.networks.threshold(aj.cfg(network, 7.5), process, "eps")
        x_0 = aj.sample(aj.DiffusionTerm(bounded, process, "x0"), x_T, args, grid=ts)
    """
    if is_concrete(ratio) and not 0 <= float(ratio) <= 1:
        raise ValueError(f"ratio is the share of values that are not clipped, between 0 and 1; got {ratio}.")
    return _Clean(as_pytree(network), hosted(process), known(prediction), _Threshold(ratio, low, high))
