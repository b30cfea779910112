"""The blocks of the encoder and of the decoder. Every group norm has epsilon 1e-6, and no block has a time."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "mish": jax.nn.mish, "gelu": functools.partial(nn.gelu, approximate=False), "relu": nn.relu}


def _conv(features: int, size: int, name: str, stride: int = 1, padding: Any = 1) -> nn.Conv:
    return nn.Conv(features, (size, size), (stride, stride), padding=padding, name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a group's mean is large; the original takes two passes.
    return nn.GroupNorm(groups, epsilon=EPS, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
    """norm, activation, conv, twice, beside the input or, where the widths differ, its 1x1 convolution."""

    features: int
    groups: int
    act_fn: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        act, h = ACTIVATIONS[self.act_fn], x
        for i in (1, 2):
            h = _conv(self.features, 3, f"conv{i}")(act(_norm(self.groups, f"norm{i}")(h)))
        return h + (x if x.shape[-1] == self.features else _conv(self.features, 1, "conv_shortcut", padding=0)(x))


class Attention(nn.Module):
    """Self-attention over pixels with one head as wide as the channels, and a residual."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = _norm(self.groups, "group_norm")(x)
        q, k, v = (nn.Dense(c, name=name)(h).reshape(b, height * width, 1, c) for name in ("to_q", "to_k", "to_v"))
        return x + nn.Dense(c, name="to_out_0")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class Resize(nn.Module):
    """3x3 convolution: of stride 2 after one row and column of zeros at the right and bottom alone, or after nearest neighbour by two."""

    features: int
    up: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if self.up:
            return _conv(self.features, 3, "conv")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return _conv(self.features, 3, "conv", stride=2, padding=((0, 1), (0, 1)))(x)


class Stage(nn.Module):
    """One resolution: residual blocks, each before an attention but for the last `bare`, then a change of resolution."""

    features: int
    layers: int
    groups: int
    act_fn: str
    attention: bool
    resize: str = ""
    bare: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        wrap: Any = nn.remat if self.remat else lambda block: block
        resnet, attention = wrap(ResnetBlock), wrap(Attention)
        for i in range(self.layers):
            x = resnet(self.features, self.groups, self.act_fn, name=f"resnets_{i}")(x)
            if self.attention and i < self.layers - self.bare:
                x = attention(self.groups, name=f"attentions_{i}")(x)
        if self.resize:
            x = Resize(self.features, self.resize == "up", name=f"{self.resize}samplers_0")(x)
        return x


class Half(nn.Module):
    """The encoder, from fine to coarse with the middle at the end, or (`up`) the decoder, which begins with the middle.

    `widths` and `attention` are a level's, in the order in which the levels are computed. The last activation is SiLU whatever `act_fn` is.
    """

    out_channels: int
    widths: Sequence[int]
    attention: Sequence[bool]
    layers: int
    groups: int
    act_fn: str
    mid_attention: bool
    up: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        def middle(x: Array) -> Array:
            features = self.widths[0 if self.up else -1]
            return Stage(features, 2, self.groups, self.act_fn, self.mid_attention, bare=1, remat=self.remat, name="mid_block")(x)

        direction, last = "up" if self.up else "down", len(self.widths) - 1
        x = _conv(self.widths[0], 3, "conv_in")(x)
        x = middle(x) if self.up else x
        for i, (features, attention) in enumerate(zip(self.widths, self.attention, strict=True)):
            resize = direction if i < last else ""
            stage = Stage(features, self.layers, self.groups, self.act_fn, attention, resize, remat=self.remat, name=f"{direction}_blocks_{i}")
            x = stage(x)
        x = x if self.up else middle(x)
        return _conv(self.out_channels, 3, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))
