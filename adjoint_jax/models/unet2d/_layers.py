"""Embeddings of time, changes of resolution, residual blocks and attention."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "mish": jax.nn.mish, "gelu": partial(nn.gelu, approximate=False), "relu": nn.relu}


def timestep_embedding(t: Float[Array, " b"], dim: int, *, flip_sin_to_cos: bool, freq_shift: int) -> Float[Array, "b {dim}"]:
    """Sinusoids of a float t at frequencies exp(-log(1e4) k / (dim/2 - freq_shift)), sines first unless flipped (Vaswani et al., sec. 3.5)."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=t.dtype) / (half - freq_shift))
    angles = t[:, None] * frequencies[None]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def _conv(features: int, size: int, name: str, stride: int = 1, padding: Any = 1) -> nn.Conv:
    return nn.Conv(features, (size, size), (stride, stride), padding=padding, name=name)


def _norm(groups: int, eps: float, name: str) -> nn.GroupNorm:
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a group's mean is large; the original takes two passes.
    return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, name=name)


class TimeProjection(nn.Module):
    """The features of t that the dense layers of an embedding start from, one row for each entry, in float32 at least.

    `kind="positional"`: the `dim` sinusoids of `timestep_embedding`. `"fourier"`: sin and cos of 2 pi w log t with `dim` fixed frequencies w, which
    get no gradient; t > 0 (Song et al., Score-based generative modeling through SDEs, 2021). `"learned"`: row t of a table of
    `entries`; between two rows linear, so that t has a gradient; NaN outside 0 .. entries - 1.
    """

    kind: str
    dim: int
    flip_sin_to_cos: bool
    freq_shift: int
    entries: int

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        if self.kind == "positional":
            return timestep_embedding(t, self.dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        if self.kind == "fourier":
            w = jax.lax.stop_gradient(self.param("weight", nn.initializers.normal(16.0), (self.dim,))).astype(t.dtype)
            angles = 2 * math.pi * jnp.log(t)[:, None] * w[None]
            return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        table = self.param("embedding", nn.initializers.normal(1.0), (self.entries, self.dim)).astype(t.dtype)
        lower, last = jnp.floor(t), self.entries - 1
        part, index = (t - lower)[:, None], lower.astype(jnp.int32)
        upper = jnp.where(t > last, self.entries, jnp.minimum(index + 1, last))
        row = lambda i: table.at[i].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)  # noqa: E731
        return (1 - part) * row(index) + part * row(upper)


class TimestepEmbedding(nn.Module):
    """Two dense layers with a SiLU between."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return nn.Dense(self.features, name="linear_2")(nn.silu(nn.Dense(self.features, name="linear_1")(x)))


def _mean_of_four(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _neighbours(x: Array, axis: int) -> Array:
    return jnp.pad(x, [(int(i == axis), int(i == axis)) for i in range(x.ndim)])


def fir_down(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every second value after the filter (1, 3, 3, 1) / 8 along both axes: y_i = (x_{2i-1} + 3 x_{2i} + 3 x_{2i+1} + x_{2i+2}) / 8, zero outside."""
    for axis in (1, 2):
        n = x.shape[axis]
        a, b, c, d = (jax.lax.slice_in_dim(_neighbours(x, axis), k, k + n - 1, stride=2, axis=axis) for k in range(4))
        x = (a + d + 3 * (b + c)) / 8
    return x


def fir_up(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The filter (1, 3, 3, 1) / 4 of x with zeros between its values: y_{2i} = (x_{i-1} + 3 x_i) / 4, y_{2i+1} = (3 x_i + x_{i+1}) / 4."""
    for axis in (1, 2):
        n = x.shape[axis]
        before, after = (jax.lax.slice_in_dim(_neighbours(x, axis), k, k + n, axis=axis) for k in (0, 2))
        pairs = jnp.stack([before + 3 * x, 3 * x + after], axis=axis + 1) / 4
        x = pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


RESAMPLE = {"": lambda x: x, "down": _mean_of_four, "up": _nearest, "fir_down": fir_down, "fir_up": fir_up}


class ResnetBlock(nn.Module):
    """norm, activation, conv, time, norm, activation, conv; plus the input, by a 1x1 `shortcut` where that is asked for or the widths differ.

    `resample`, a key of `RESAMPLE`, changes the resolution before the first convolution, of the input too.
    """

    features: int
    groups: int
    eps: float
    scale_shift: bool
    dropout: float
    act_fn: str = "silu"
    output_scale: float = 1.0
    groups_out: int | None = None
    resample: str = ""
    shortcut: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], temb: Float[Array, "b d"], deterministic: bool) -> Float[Array, "b h2 w2 e"]:
        act, resample = ACTIVATIONS[self.act_fn.lower()], RESAMPLE[self.resample]
        h = act(_norm(self.groups, self.eps, "norm1")(x))
        x, h = resample(x), resample(h)
        h = _conv(self.features, 3, "conv1")(h)
        time = nn.Dense(self.features * (2 if self.scale_shift else 1), name="time_emb_proj")(act(temb))[:, None, None, :]
        norm2 = _norm(self.groups_out or self.groups, self.eps, "norm2")
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + time)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(act(h))
        h = _conv(self.features, 3, "conv2")(h)
        shortcut = _conv(self.features, 1, "conv_shortcut", padding=0)(x) if self.shortcut or x.shape[-1] != self.features else x
        return (shortcut + h) / self.output_scale


class Attention(nn.Module):
    """Self-attention over pixels with a residual; `head_dim=None` is one head. `groups=None` is no norm."""

    head_dim: int | None
    groups: int | None
    eps: float
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        head_dim = self.head_dim or c
        if c % head_dim:
            raise ValueError(f"attention_head_dim={head_dim} does not divide the {c} channels: choose a divisor, or None for one head.")
        h = x if self.groups is None else _norm(self.groups, self.eps, "group_norm")(x)
        q, k, v = (nn.Dense(c, name=name)(h).reshape(b, height * width, c // head_dim, head_dim) for name in ("to_q", "to_k", "to_v"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return (x + nn.Dense(c, name="to_out_0")(h)) / self.output_scale


class Resize(nn.Module):
    """3x3 convolution of stride 2 (`padding=0` pads right and bottom only, as the original does); going up, nearest neighbour by two comes first."""

    features: int
    up: bool
    padding: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if self.up:
            return _conv(self.features, 3, "conv")(_nearest(x))
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return _conv(self.features, 3, "conv", stride=2, padding=(side, side))(x)
