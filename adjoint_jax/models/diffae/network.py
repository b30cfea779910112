"""The encoder, and the network that denoises given its answer."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._layers import Column, Settings, conv, maker, norm


def timestep_embedding(t: Float[Array, " b"], dim: int) -> Float[Array, "b {dim}"]:
    """Cosines, then sines, of t at the frequencies 1e4^(-k / half), k < half = dim // 2; a zero after them where dim is odd."""
    half = dim // 2
    angles = t[:, None] * jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=t.dtype) / half)[None]
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, dim % 2)))


class Encoder(nn.Module):
    """The half of a UNet down to its middle, without time; then norm, SiLU, the mean over the pixels and a dense layer."""

    column: Column
    features: int
    settings: Settings
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], deterministic: bool = True) -> Float[Array, "b z"]:
        h, _ = self.column.blocks(maker(self.settings, self.remat), self.column.widths[0], x, None, None, deterministic)
        h = jnp.mean(nn.silu(norm(h, "out_0")), axis=(1, 2), keepdims=True)
        return conv(self.features, 1, "out_3")(h)[:, 0, 0]


class TimeEmbedding(nn.Module):
    """Two dense layers with a SiLU between."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return nn.Dense(self.features, name="time_embed_2")(nn.silu(nn.Dense(self.features, name="time_embed_0")(x)))


class DiffAE(nn.Module):
    """The diffusion autoencoder: an encoder of images into z_sem, and a UNet with attention that denoises x given z_sem. Fields are the original's.

    Every residual block of the UNet normalises, scales and shifts by the time, and scales by z_sem; those of the encoder do not.
    `attention_resolutions` are in pixels of an image of `image_size`. `enc_attn_resolutions`, `enc_channel_mult`, `input_channel_mult` and
    `num_input_res_blocks` are those of the UNet unless given.

    Args of the call:
        x: noisy images, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1).
        t: the training step as a number, scalar or `[B]`.
        cond: z_sem, `[Z]` or `[B, Z]` with Z = `resnet_cond_channels`, or else `embed_channels`: what `encode` gives.

    Returns the prediction, `[B, H, W, out_channels]`.
    Raises ValueError for a shape, number of heads or z that does not fit.
    Reference: Preechakul et al., Diffusion autoencoders: toward a meaningful and decodable representation (2022), section 3. z_sem comes from
        `module.apply({"params": params}, image, method="encode")`; the latent DPM that samples it is not part of this module.
    """

    image_size: int = 64
    in_channels: int = 3
    model_channels: int = 64
    out_channels: int = 3
    num_res_blocks: int = 2
    num_input_res_blocks: int | None = None
    embed_channels: int = 512
    attention_resolutions: Sequence[int] = (16,)
    dropout: float = 0.1
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    input_channel_mult: Sequence[float] | None = None
    conv_resample: bool = True
    num_heads: int = 1
    num_head_channels: int = -1
    resblock_updown: bool = True
    use_new_attention_order: bool = False
    resnet_cond_channels: int | None = None
    enc_out_channels: int = 512
    enc_attn_resolutions: Sequence[int] | None = None
    enc_num_res_block: int = 2
    enc_channel_mult: Sequence[float] | None = None
    remat: bool = False

    @property
    def style_dim(self) -> int:
        """The width of z_sem."""
        return self.resnet_cond_channels or self.embed_channels

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        side = 2 ** (max(len(self.channel_mult), len(self._enc_mult)) - 1)
        arrays = [(1, side, side, self.in_channels), (), (1, self.style_dim)]
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays)

    @property
    def _enc_mult(self) -> Sequence[float]:
        return self.enc_channel_mult or self.channel_mult

    def _column(self, mult: Sequence[float], resolutions: Sequence[int], repeats: int) -> Column:
        rows = tuple(("res", "attention") if self.image_size // 2**level in resolutions else ("res",) for level in range(len(mult)))
        return Column(rows, tuple(int(factor * self.model_channels) for factor in mult), repeats)

    def setup(self) -> None:
        options = (self.dropout, self.conv_resample, self.resblock_updown, self.use_new_attention_order, self.num_heads, self.num_head_channels)
        self.settings = Settings(*options)
        column = self._column(self._enc_mult, self.enc_attn_resolutions or self.attention_resolutions, self.enc_num_res_block)
        self.encoder = Encoder(column, self.enc_out_channels, self.settings, self.remat)

    def _check(self, x: Array, levels: int) -> None:
        multiple = 2 ** (levels - 1)
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(f"DiffAE takes images of shape [B, H, W, {self.in_channels}], H and W multiples of {multiple} here; got {x.shape}.")

    def encode(self, x: Float[Array, "b h w c"], deterministic: bool = True) -> Float[Array, "b z"]:
        """z_sem of images in [-1, 1], `[B, H, W, in_channels]` with H and W divisible by 2^(levels of the encoder - 1)."""
        self._check(x, len(self._enc_mult))
        return self.encoder(x, deterministic)

    def _inputs(self, x: Array, t: Any, cond: Any) -> tuple[Array, Array]:
        """The embedding of the time, its sinusoids computed in float32 at least, and z_sem: a row for each of x and of its dtype."""
        if cond is None or jnp.shape(cond) not in ((self.style_dim,), (x.shape[0], self.style_dim)):
            got = "None" if cond is None else jnp.shape(cond)
            raise ValueError(f"cond is z_sem, `[{self.style_dim}]` or `[B, {self.style_dim}]`, as the method encode gives it; got {got}.")
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1]).astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        emb = TimeEmbedding(self.embed_channels, name="time_embed")(timestep_embedding(t, self.model_channels).astype(x.dtype))
        return emb, jnp.broadcast_to(jnp.asarray(cond), (x.shape[0], self.style_dim)).astype(x.dtype)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Num[Array, "..."], cond: Float[Array, "..."] | None = None, deterministic: bool = True
    ) -> Float[Array, "b h w e"]:
        repeats = self.num_input_res_blocks or self.num_res_blocks
        mult, levels = self.input_channel_mult or self.channel_mult, len(self.channel_mult)
        self._check(x, levels)
        if len(mult) != levels or self.image_size % 2 ** (levels - 1):
            raise ValueError(f"channel_mult has {levels} levels: give input_channel_mult as many, and an image_size that halves as often.")
        if self.is_initializing():
            self.encoder(jnp.zeros(self.dummy_inputs[0].shape, x.dtype), deterministic)  # whose parameters are part of the network's
        inputs = (*self._inputs(x, t, cond), deterministic)
        make, column = maker(self.settings, self.remat), self._column(mult, self.attention_resolutions, repeats)
        h, skips = column.blocks(make, int(self.channel_mult[0] * self.model_channels), x, *inputs)

        rows = [(level, i) for level in reversed(range(levels)) for i in range(self.num_res_blocks + 1)]
        for number, (level, i) in enumerate(rows):
            # A level with more rows going up than down has no input block left for the last of them.
            h = jnp.concatenate([h, skips[level].pop()], axis=-1) if skips[level] else h
            up = ("up",) if level and i == self.num_res_blocks else ()
            h = make((*column.rows[level], *up), int(self.channel_mult[level] * self.model_channels), name=f"output_blocks_{number}")(h, *inputs)
        return conv(self.out_channels, 3, "out_2")(nn.silu(norm(h, "out_0")))
