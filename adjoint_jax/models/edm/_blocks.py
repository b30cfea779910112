"""The residual block of both networks, and its resampling by a filter.

A filter f of L taps, L even and sum_k f[k] = 1, resamples each axis by two, with p = L/2 - 1 zeros around the image:

    down    y[m] = sum_k f[k] x[2 m + k - p]                                                                            (1)
    up      y[j] = 2 sum_i f[j + p - 2 i] x[i]                                                                          (2)

[1, 1] is the mean of two going down and the nearest neighbour going up; [1, 3, 3, 1] is that of StyleGAN2 and NCSN++.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _weighted(parts: list[tuple[float, Array]]) -> Array:
    """The sum of weight times array."""
    first, *rest = (weight * x for weight, x in parts)
    return sum(rest, first)


def _along(x: Array, axis: int, start: int, stop: int, step: int = 1) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _padded(x: Array, axis: int, by: int) -> Array:
    return jnp.pad(x, [(by, by) if i == axis else (0, 0) for i in range(x.ndim)])


def downsample(x: Float[Array, "b h w c"], taps: tuple[float, ...], padding: int | None = None) -> Float[Array, "b h2 w2 c"]:
    """(1), with another number of zeros than p if given."""
    size = len(taps)
    for axis in (1, 2):
        x = _padded(x, axis, size // 2 - 1 if padding is None else padding)
        stop = x.shape[axis] - size + 1
        x = _weighted([(tap / sum(taps), _along(x, axis, k, k + stop, 2)) for k, tap in enumerate(taps)])
    return x


def upsample(x: Float[Array, "b h w c"], taps: tuple[float, ...]) -> Float[Array, "b h2 w2 c"]:
    """(2), the two phases j = 2 m and j = 2 m + 1 apart and then interleaved: i = m - s for the taps k = j + p - 2 i = phase + p + 2 s."""
    p = len(taps) // 2 - 1
    for axis in (1, 2):
        size, phases = x.shape[axis], []
        x = _padded(x, axis, p)  # |s| <= p, or 0 where p is 0
        for phase in (0, 1):
            shifts = {k: (k - phase - p) // 2 for k in range(len(taps)) if (k - phase - p) % 2 == 0}
            phases.append(_weighted([(2 * taps[k] / sum(taps), _along(x, axis, p - s, p - s + size)) for k, s in shifts.items()]))
        x = jnp.stack(phases, axis=axis + 1)
        x = x.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 2 :])
    return x


def conv(features: int, size: int, name: str, padding: int | None = None) -> nn.Conv:
    """A square convolution that keeps the resolution, unless padded by more."""
    return nn.Conv(features, (size, size), padding=size // 2 if padding is None else padding, name=name)


def norm(x: Float[Array, "b h w c"], eps: float, name: str) -> Float[Array, "b h w c"]:
    """Group norm in 32 groups, or fewer such that each has four channels."""
    groups = min(32, x.shape[-1] // 4)
    if groups == 0 or x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} channels do not split into min(32, channels / 4) groups: choose multiples of 4, above 128 of 32.")
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a group's mean is large; the original takes two passes.
    return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, name=name)(x)


class Style(NamedTuple):
    """How the blocks of DDPM++/NCSN++ and of ADM differ."""

    eps: float
    """Of the group norms."""
    skip_scale: float
    """Each sum with a residual is multiplied by it."""
    adaptive: bool
    """The embedding scales and shifts after the second norm, rather than being added before it."""
    taps: tuple[float, ...]
    projected: bool
    """A change of resolution alone puts a 1x1 convolution into the shortcut."""
    head_width: int | None
    """Channels of a head, so that fewer have no attention at all; None is one head."""
    dropout: float


class Block(nn.Module):
    """norm, SiLU, (resampled) conv, embedding, norm, SiLU, conv, plus a shortcut; then self-attention over pixels, if any."""

    features: int
    style: Style
    resample: str = ""
    attention: bool = False

    def _resampled(self, x: Array) -> Array:
        change = {"up": upsample, "down": downsample}.get(self.resample)
        return change(x, self.style.taps) if change else x

    def _attend(self, x: Array) -> Array:
        b, height, width, c = x.shape
        heads = 1 if self.style.head_width is None else c // self.style.head_width
        if not self.attention or heads == 0:
            return x
        if c % heads:
            raise ValueError(f"{c} channels do not split into the {heads} heads of {self.style.head_width}: choose a width that is a multiple.")
        # The original's channels of q, k and v alternate within each head: c = 3 * (channel of the head) + (0 for q, 1 for k, 2 for v).
        qkv = conv(3 * c, 1, "qkv")(norm(x, self.style.eps, "norm2")).reshape(b, height * width, heads, c // heads, 3)
        a = jax.nn.dot_product_attention(qkv[..., 0], qkv[..., 1], qkv[..., 2])  # softmax in float32 at least
        return (x + conv(c, 1, "proj")(a.reshape(x.shape))) * self.style.skip_scale

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b d"], deterministic: bool) -> Float[Array, "b h2 w2 e"]:
        style = self.style
        h = conv(self.features, 3, "conv0")(self._resampled(nn.silu(norm(x, style.eps, "norm0"))))
        emb = nn.Dense(self.features * (2 if style.adaptive else 1), name="affine")(emb)[:, None, None, :]
        if style.adaptive:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h, style.eps, "norm1") * (1 + scale) + shift
        else:
            h = norm(h + emb, style.eps, "norm1")
        h = nn.Dropout(style.dropout, deterministic=deterministic)(nn.silu(h))
        h = conv(self.features, 3, "conv1")(h)
        shortcut = self._resampled(x)
        if x.shape[-1] != self.features or (self.resample and style.projected):
            shortcut = conv(self.features, 1, "skip")(shortcut)
        return self._attend((shortcut + h) * style.skip_scale)
