"""Layers of `UNet2DCondition`: residual blocks, changes of resolution, transformers over pixels.

Arithmetic that differs between look-alike layers is spelt out where it happens: the epsilon of a norm (1e-6 before a transformer, 1e-5 inside
it, the configuration's in residual blocks), gelu by erf, the one-sided
padding of the stride-2 convolutions.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_GELU = functools.partial(nn.gelu, approximate=False)
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "mish": jax.nn.mish, "gelu": _GELU, "relu": nn.relu}


def conv(features: int, size: int, name: str, stride: int = 1, padding: Any = None) -> nn.Conv:
    """A square convolution that keeps the size of an image, unless told otherwise."""
    return nn.Conv(features, (size, size), (stride, stride), padding=(size - 1) // 2 if padding is None else padding, name=name)


def group_norm(groups: int, eps: float, name: str) -> nn.GroupNorm:
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a group's mean is large; the original takes two passes.
    return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, name=name)


def layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """The image of the given size whose pixel i is pixel floor(i old / new)."""
    for axis, new in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        x = jnp.repeat(x, 2, axis=axis) if new == 2 * old else jnp.take(x, np.arange(new) * old // new, axis=axis)
    return x


class ResnetBlock(nn.Module):
    """norm, activation, conv, time, norm, activation, conv; plus a 1x1 shortcut where the widths differ.

    `resample` is "up" (nearest) or "down" (mean of 2x2), of both paths, before the first convolution.
    """

    features: int
    groups: int
    eps: float
    act: str
    scale_shift: bool
    dropout: float
    deterministic: bool
    skip_time_act: bool = False
    output_scale: float = 1.0
    resample: str = ""

    def _resampled(self, x: Array) -> Array:
        b, height, width, c = x.shape
        if self.resample == "up":
            return nearest(x, (2 * height, 2 * width))
        return x.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4)) if self.resample == "down" else x

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], temb: Float[Array, "b d"]) -> Float[Array, "b h2 w2 e"]:
        act = ACTIVATIONS[self.act]
        h = self._resampled(act(group_norm(self.groups, self.eps, "norm1")(x)))
        x = self._resampled(x)
        h = conv(self.features, 3, "conv1")(h)
        time = nn.Dense(self.features * (2 if self.scale_shift else 1), name="time_emb_proj")(temb if self.skip_time_act else act(temb))
        time = time[:, None, None, :]
        norm2 = group_norm(self.groups, self.eps, "norm2")
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + time)
        h = nn.Dropout(self.dropout, deterministic=self.deterministic)(act(h))
        h = conv(self.features, 3, "conv2")(h)
        shortcut = x if x.shape[-1] == self.features else conv(self.features, 1, "conv_shortcut")(x)
        return (shortcut + h) / self.output_scale


class Resize(nn.Module):
    """3x3 convolution: of stride 2 (`padding=0` pads right and bottom only, as the original does), or after a resize to the given size."""

    features: int
    padding: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        if size is not None:
            return conv(self.features, 3, "conv")(nearest(x, size))
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return conv(self.features, 3, "conv", stride=2, padding=(side, side))(x)


def attend(q: Array, k: Array, v: Array, heads: int, bias: Array | None = None) -> Float[Array, "b s d"]:
    """Softmax attention in `heads` heads; logits and softmax in float32 at least. The bias, `[B, T]`, is one number a key."""
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, bias=None if bias is None else bias[:, None, None, :])
    return y.reshape(*y.shape[:2], -1)


class Attention(nn.Module):
    """Attention of x to a context, or to itself; no biases but the output's."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"], context: Float[Array, "b t d"], bias: Float[Array, "b t"] | None = None) -> Float[Array, "b s c"]:
        q, k, v = (nn.Dense(x.shape[-1], use_bias=False, name=name)(y) for name, y in (("to_q", x), ("to_k", context), ("to_v", context)))
        return nn.Dense(x.shape[-1], name="to_out_0")(attend(q, k, v, self.heads, bias))


class GEGLU(nn.Module):
    """a gelu(b), where (a, b) is a dense layer of x."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
        h, gate = jnp.split(nn.Dense(2 * self.features, name="proj")(x), 2, axis=-1)
        return h * _GELU(gate)


class FeedForward(nn.Module):
    """A gated layer of four times the width, and a dense one."""

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        c = x.shape[-1]
        return nn.Dense(c, name="net_2")(GEGLU(4 * c, name="net_0")(x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, and a gated feed-forward, each on a layer norm and with a residual."""

    heads: int
    only_cross: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"], text: Float[Array, "b t d"], bias: Float[Array, "b t"] | None) -> Float[Array, "b s c"]:
        h = layer_norm("norm1")(x)
        x = x + Attention(self.heads, name="attn1")(h, text if self.only_cross else h)  # the original has no mask here, even for text
        x = x + Attention(self.heads, name="attn2")(layer_norm("norm2")(x), text, bias)
        return x + FeedForward(name="ff")(layer_norm("norm3")(x))


class Transformer(nn.Module):
    """`depth` blocks over the sequence of pixels, between two projections (convolutions of 1x1, or dense: the same numbers), with a residual."""

    depth: int
    heads: int
    groups: int
    linear: bool
    only_cross: bool
    remat: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], text: Float[Array, "b t d"], bias: Float[Array, "b t"] | None = None) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        if not 0 < self.heads <= c:
            raise ValueError(f"attention_head_dim={self.heads} is a number of heads here, from 1 to the {c} channels: choose one of these.")
        inner = self.heads * (c // self.heads)
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock

        def project(features: int, name: str) -> nn.Module:
            return nn.Dense(features, name=name) if self.linear else conv(features, 1, name)

        h = project(inner, "proj_in")(group_norm(self.groups, 1e-6, "norm")(x)).reshape(b, height * width, inner)
        for i in range(self.depth):
            h = block(self.heads, self.only_cross, name=f"transformer_blocks_{i}")(h, text, bias)
        return x + project(c, "proj_out")(h.reshape(b, height, width, inner))


class AddedAttention(nn.Module):
    """Attention of pixels to the text and, unless `only_cross`, to themselves at once, with a residual (Imagen's, DeepFloyd IF's)."""

    head_dim: int
    groups: int
    only_cross: bool
    norm: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], text: Float[Array, "b t d"], bias: Float[Array, "b t"] | None = None) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        if c % self.head_dim:
            raise ValueError(f"attention_head_dim={self.head_dim} does not divide the {c} channels: choose a divisor.")
        text = group_norm(32, 1e-5, "norm_cross")(text) if self.norm else text
        h = group_norm(self.groups, 1e-5, "group_norm")(x).reshape(b, height * width, c)  # 1e-5 whatever norm_eps is
        q, k, v = (nn.Dense(c, name=name)(y) for name, y in (("to_q", h), ("add_k_proj", text), ("add_v_proj", text)))
        if not self.only_cross:
            k, v = (jnp.concatenate([y, nn.Dense(c, name=name)(h)], axis=1) for name, y in (("to_k", k), ("to_v", v)))
            bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, height * width)))
        return x + nn.Dense(c, name="to_out_0")(attend(q, k, v, c // self.head_dim, bias)).reshape(x.shape)
