"""The layers of the diffusion autoencoder, and rows of them. Group norms have 32 groups (of fewer channels, each one is a group) and epsilon 1e-5."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def conv(features: int, size: int, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(features, (size, size), (stride, stride), padding=size // 2, name=name)


def norm(x: Array, name: str) -> Array:
    if x.shape[-1] % min(32, x.shape[-1]):
        raise ValueError(f"{x.shape[-1]} channels do not split into 32 groups: model_channels times channel_mult must be multiples of 32.")
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a group's mean is large; the original takes two passes.
    return nn.GroupNorm(min(32, x.shape[-1]), epsilon=1e-5, use_fast_variance=False, name=name)(x)


def resize(x: Float[Array, "b h w c"], way: str) -> Float[Array, "b h2 w2 c"]:
    """The mean over 2 x 2 pixels ("down"), or nearest neighbour by two ("up")."""
    if way == "up":
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    b, height, width, c = x.shape
    return jnp.mean(x.reshape(b, height // 2, 2, width // 2, 2, c), axis=(2, 4))


class Settings(NamedTuple):
    """What the layers of one network share."""

    dropout: float
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
    """h = conv(resize(SiLU(norm(x)))), then, where there are a time and a z, conv(SiLU((norm(h) (1 + s_t) + b_t) (1 + s_z))); plus the resized input.

    The code conditions on z by a scale alone. A block of the encoder has neither time nor z, and ends after the first convolution.
    """

    features: int
    settings: Settings
    way: str = ""

    @nn.compact
    def __call__(self, x: Array, emb: Array | None, z: Array | None, deterministic: bool) -> Array:
        h = nn.silu(norm(x, "in_layers_0"))
        if self.way:
            h, x = resize(h, self.way), resize(x, self.way)
        h = conv(self.features, 3, "in_layers_2")(h)
        if emb is not None and z is not None:
            time = nn.Dense(2 * self.features, name="emb_layers_1")(nn.silu(emb))[:, None, None, :]
            style = nn.Dense(self.features, name="cond_emb_layers_1")(nn.silu(z))[:, None, None, :]
            scale, shift = jnp.split(time, 2, axis=-1)
            h = (norm(h, "out_layers_0") * (1 + scale) + shift) * (1 + style)
            h = nn.Dropout(self.settings.dropout, deterministic=deterministic)(nn.silu(h))
            h = conv(self.features, 3, "out_layers_3")(h)
        return h + (x if x.shape[-1] == self.features else conv(self.features, 1, "skip_connection")(x))


class Attention(nn.Module):
    """Self-attention over pixels with a residual. The channels of qkv count (3, heads, c) in the new order, (heads, 3, c) in the old one."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        n, heads, new = height * width, self.settings.heads(c), self.settings.new_order
        qkv = nn.Conv(3 * c, (1,), name="qkv")(norm(x, "norm").reshape(b, n, c))
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, *((3, heads) if new else (heads, 3)), c // heads), 2 if new else 3, 0)
        h = jax.nn.dot_product_attention(q, k, v).reshape(b, n, c)
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
    def __call__(self, x: Array, emb: Array | None, z: Array | None, deterministic: bool) -> Array:
        for i, kind in enumerate(self.kinds):
            if kind == "conv":
                x = conv(self.features, 3, str(i))(x)
            elif kind == "attention":
                x = Attention(self.settings, name=str(i))(x)
            elif kind == "res" or self.settings.resblock_updown:
                x = ResBlock(self.features, self.settings, "" if kind == "res" else kind, name=str(i))(x, emb, z, deterministic)
            else:
                x = Resample(kind, self.settings.conv_resample, name=str(i))(x)
        return x


class Column(NamedTuple):
    """One way through the resolutions: the layers of a row and the channels of each level, and the number of rows of a level."""

    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    repeats: int

    def blocks(self, make: Callable[..., Block], stem: int, x: Array, *inputs: Any) -> tuple[Array, list[list[Array]]]:
        """Down to the middle: its answer, and those of the input blocks of each level."""
        x, outputs, number = make(("conv",), stem, name="input_blocks_0")(x, *inputs), [], 0
        for level, (row, features) in enumerate(zip(self.rows, self.widths, strict=True)):
            outputs.append([x])
            for kinds in [row] * self.repeats + ([("down",)] if level + 1 < len(self.widths) else []):
                number += 1
                x = make(kinds, features, name=f"input_blocks_{number}")(x, *inputs)
                if kinds != ("down",):
                    outputs[-1].append(x)
        return make(("res", "attention", "res"), self.widths[-1], name="middle_block")(x, *inputs), outputs


def maker(settings: Settings, remat: bool) -> Callable[..., Block]:
    return functools.partial(nn.remat(Block, static_argnums=(4,)) if remat else Block, settings=settings)
