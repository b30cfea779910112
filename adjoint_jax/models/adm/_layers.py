"""The layers of ADM: residual blocks, attention, changes of resolution, and rows of them. Every group norm has 32 groups and epsilon 1e-5."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GROUPS = 32


def conv(features: int, size: int, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(features, (size, size), (stride, stride), padding=size // 2, name=name)


def norm(name: str) -> nn.GroupNorm:
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a group's mean is large; the original takes two passes.
    return nn.GroupNorm(GROUPS, epsilon=1e-5, use_fast_variance=False, name=name)


def resize(x: Float[Array, "b h w c"], way: str) -> Float[Array, "b h2 w2 c"]:
    """The mean over 2 x 2 pixels ("down"), or nearest neighbour by two ("up")."""
    if way == "up":
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    b, height, width, c = x.shape
    return jnp.mean(x.reshape(b, height // 2, 2, width // 2, 2, c), axis=(2, 4))


def attend(qkv: Float[Array, "b n width"], heads: int, new_order: bool) -> Float[Array, "b n c"]:
    """Attention with the scale 1/sqrt(C / heads). The channels of qkv count (3, heads, c) in the new order, (heads, 3, c) in the old one."""
    b, n, width = qkv.shape
    parts = qkv.reshape(b, n, *((3, heads) if new_order else (heads, 3)), width // (3 * heads))
    q, k, v = jnp.moveaxis(parts, 2 if new_order else 3, 0)
    return jax.nn.dot_product_attention(q, k, v).reshape(b, n, width // 3)


class Settings(NamedTuple):
    """What the layers of one network share."""

    dropout: float
    scale_shift: bool
    conv_resample: bool
    resblock_updown: bool
    new_order: bool
    num_heads: int
    num_head_channels: int

    def heads(self, features: int) -> int:
        """The number of heads of attention over so many channels."""
        name, value = ("num_heads", self.num_heads) if self.num_head_channels == -1 else ("num_head_channels", self.num_head_channels)
        if value < 1 or features % value:
            raise ValueError(f"{name}={value} does not divide the {features} channels: choose a divisor.")
        return value if self.num_head_channels == -1 else features // value


class ResBlock(nn.Module):
    """norm, SiLU, resize, conv, time, norm, SiLU, conv; plus the resized input, through a 1x1 convolution where the widths differ."""

    features: int
    settings: Settings
    way: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b d"], deterministic: bool) -> Float[Array, "b h2 w2 e"]:
        h = nn.silu(norm("in_layers_0")(x))
        if self.way:
            h, x = resize(h, self.way), resize(x, self.way)
        h = conv(self.features, 3, "in_layers_2")(h)
        time = nn.Dense(self.features * (2 if self.settings.scale_shift else 1), name="emb_layers_1")(nn.silu(emb))[:, None, None, :]
        norm2 = norm("out_layers_0")
        if self.settings.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + time)
        h = nn.Dropout(self.settings.dropout, deterministic=deterministic)(nn.silu(h))
        h = conv(self.features, 3, "out_layers_3")(h)
        return h + (x if x.shape[-1] == self.features else conv(self.features, 1, "skip_connection")(x))


class Attention(nn.Module):
    """Self-attention over pixels with a residual."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        qkv = nn.Conv(3 * c, (1,), name="qkv")(norm("norm")(x).reshape(b, height * width, c))
        h = attend(qkv, self.settings.heads(c), self.settings.new_order)
        return x + nn.Conv(c, (1,), name="proj_out")(h).reshape(x.shape)


class Resample(nn.Module):
    """A change of resolution: without a convolution as in `resize`; with one, of stride 2 going down, after nearest neighbour going up."""

    way: str
    conv: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if not self.conv:
            return resize(x, self.way)
        return conv(x.shape[-1], 3, "op", stride=2)(x) if self.way == "down" else conv(x.shape[-1], 3, "conv")(resize(x, "up"))


class Block(nn.Module):
    """Layers one after the other, named by their numbers: "conv", "res", "attention", and the changes of resolution "down" and "up"."""

    kinds: tuple[str, ...]
    features: int
    settings: Settings

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b d"], deterministic: bool) -> Float[Array, "b h2 w2 e"]:
        for i, kind in enumerate(self.kinds):
            if kind == "conv":
                x = conv(self.features, 3, str(i))(x)
            elif kind == "attention":
                x = Attention(self.settings, name=str(i))(x)
            elif kind == "res" or self.settings.resblock_updown:
                x = ResBlock(self.features, self.settings, "" if kind == "res" else kind, name=str(i))(x, emb, deterministic)
            else:
                x = Resample(kind, self.settings.conv_resample, name=str(i))(x)
        return x
