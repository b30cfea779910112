"""What the UNet and the classifier share: the embedding of time, and the blocks down to the middle. `net` is one of the two."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._layers import GROUPS, Block, Settings


def timestep_embedding(t: Float[Array, " b"], dim: int) -> Float[Array, "b {dim}"]:
    """Cosines, then sines, of t at the frequencies 1e4^(-k / half), k < half = dim // 2; a zero after them where dim is odd."""
    half = dim // 2
    angles = t[:, None] * jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=t.dtype) / half)[None]
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, dim % 2)))


def time_embedding(net: Any, t: Num[Array, "..."], x: Array) -> Array:
    """A row for each of x and of its dtype; the sinusoids are computed in float32 at least: half precision has no t = 999.5."""
    t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1]).astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    emb = nn.Dense(4 * net.model_channels, name="time_embed_0")(timestep_embedding(t, net.model_channels).astype(x.dtype))
    return nn.Dense(4 * net.model_channels, name="time_embed_2")(nn.silu(emb))


def widths(net: Any) -> list[int]:
    """The channels of each level."""
    return [int(mult * net.model_channels) for mult in net.channel_mult]


def check(net: Any, x: Array) -> None:
    """Raises ValueError for an image or widths that do not fit."""
    multiple = 2 ** (len(net.channel_mult) - 1)
    if x.ndim != 4 or x.shape[3] != net.in_channels or x.shape[1] % multiple or x.shape[2] % multiple:
        raise ValueError(f"{type(net).__name__} takes x of shape [B, H, W, {net.in_channels}], H and W multiples of {multiple}; got {x.shape}.")
    if any(width % GROUPS for width in widths(net)):
        raise ValueError(f"The widths {widths(net)} do not split into {GROUPS} groups: model_channels times channel_mult must be multiples of it.")


def settings(net: Any) -> Settings:
    """What the layers of the network share."""
    options = (net.dropout, net.use_scale_shift_norm, net.conv_resample, net.resblock_updown, net.use_new_attention_order)
    return Settings(*options, net.num_heads, net.num_head_channels)


def block(net: Any) -> Callable[..., Block]:
    """The class of the blocks: recomputed in the backward pass where the network asks for it."""
    return nn.remat(Block, static_argnums=(3,)) if net.remat else Block


def row(net: Any, level: int) -> tuple[str, ...]:
    """The layers of one block of a level."""
    return ("res", "attention") if 2**level in net.attention_resolutions else ("res",)


def encode(net: Any, x: Array, emb: Array, deterministic: bool) -> tuple[Array, list[Array]]:
    """The answer of the middle, and those of all input blocks."""
    make, channels = functools.partial(block(net), settings=settings(net)), widths(net)
    outputs = [make(("conv",), channels[0], name="input_blocks_0")(x, emb, deterministic)]
    for level, features in enumerate(channels):
        down = [("down",)] if level + 1 < len(channels) else []
        for kinds in [row(net, level)] * net.num_res_blocks + down:
            outputs.append(make(kinds, features, name=f"input_blocks_{len(outputs)}")(outputs[-1], emb, deterministic))
    return make(("res", "attention", "res"), channels[-1], name="middle_block")(outputs[-1], emb, deterministic), outputs
