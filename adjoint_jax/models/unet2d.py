"""The UNet of diffusers' `UNet2DModel`, in Flax linen and NHWC.

One self-contained file: it knows nothing of processes, solvers or adjoints. Module names follow the original's state dict with
`.N` written `_N` (`down_blocks.0.resnets.1.conv1` is `down_blocks_0/resnets_1/conv1`), so that a checkpoint converts by a rule
table alone (`adjoint_jax.checkpoints`). Arithmetic that differs between look-alike networks is spelt out where it happens:
the epsilon of the group norms, the one-sided padding of the stride-2 convolutions, the order of sine and cosine.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


def timestep_embedding(
    t: Num[Array, " b"], dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b {dim}"]:
    """Sinusoids of t at frequencies exp(-log(1e4) k / (dim/2 - freq_shift)), sines first unless flipped (Vaswani et al., sec. 3.5)."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def _conv(features: int, size: int, name: str, stride: int = 1, padding: Any = 1) -> nn.Conv:
    return nn.Conv(features, (size, size), (stride, stride), padding=padding, name=name)


class TimestepEmbedding(nn.Module):
    """Two dense layers with a SiLU between."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return nn.Dense(self.features, name="linear_2")(nn.silu(nn.Dense(self.features, name="linear_1")(x)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, conv; plus a 1x1 shortcut where the widths differ."""

    features: int
    groups: int
    eps: float
    scale_shift: bool
    dropout: float
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], temb: Float[Array, "b d"], deterministic: bool) -> Float[Array, "b h w e"]:
        h = nn.silu(nn.GroupNorm(self.groups, epsilon=self.eps, name="norm1")(x))
        h = _conv(self.features, 3, "conv1")(h)
        width = 2 * self.features if self.scale_shift else self.features
        time = nn.Dense(width, name="time_emb_proj")(nn.silu(temb))[:, None, None, :]
        norm2 = nn.GroupNorm(self.groups, epsilon=self.eps, name="norm2")
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + time)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(nn.silu(h))
        h = _conv(self.features, 3, "conv2")(h)
        shortcut = x if x.shape[-1] == self.features else _conv(self.features, 1, "conv_shortcut", padding=0)(x)
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
        h = x if self.groups is None else nn.GroupNorm(self.groups, epsilon=self.eps, name="group_norm")(x)
        h = h.reshape(b, height * width, c)
        q, k, v = (nn.Dense(c, name=name)(h).reshape(b, height * width, c // head_dim, head_dim) for name in ("to_q", "to_k", "to_v"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(b, height * width, c)
        h = nn.Dense(c, name="to_out_0")(h).reshape(x.shape)
        return (x + h) / self.output_scale


class Downsample(nn.Module):
    """3x3 convolution of stride 2. `padding=0` pads right and bottom only, as the original does."""

    features: int
    padding: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return _conv(self.features, 3, "conv", stride=2, padding=(side, side))(x)


class Upsample(nn.Module):
    """Nearest neighbour by two, then a 3x3 convolution."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return _conv(self.features, 3, "conv")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Stage(nn.Module):
    """One resolution: residual blocks, each after a skip (going up) and before attention (where asked), then a change of resolution."""

    layers: int
    resnet: dict[str, Any]
    attention: dict[str, Any] | None
    resize: str = ""
    padding: int = 1

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool, skips: list[Array] | None = None) -> tuple[Array, list[Array]]:
        outputs = []
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = ResnetBlock(**self.resnet, name=f"resnets_{i}")(x, temb, deterministic)
            if self.attention is not None:
                x = Attention(**self.attention, name=f"attentions_{i}")(x)
            outputs.append(x)
        if self.resize == "down":
            x = Downsample(self.resnet["features"], self.padding, name="downsamplers_0")(x)
            outputs.append(x)
        elif self.resize == "up":
            x = Upsample(self.resnet["features"], name="upsamplers_0")(x)
        return x, outputs


class MidBlock(nn.Module):
    """A residual block, then attention and another one. Without group norm in the attention where time scales and shifts (as the original)."""

    resnet: dict[str, Any]
    attention: dict[str, Any] | None

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool) -> Array:
        x = ResnetBlock(**self.resnet, name="resnets_0")(x, temb, deterministic)
        if self.attention is not None:
            x = Attention(**self.attention, name="attentions_0")(x)
        return ResnetBlock(**self.resnet, name="resnets_1")(x, temb, deterministic)


class UNet2D(nn.Module):
    """diffusers' `UNet2DModel`: residual UNet over images with optional attention and class embedding. Fields carry the names of its `config.json`.

    Args of the call:
        x: images, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1).
        t: the training step as a number, scalar or `[B]`.
        class_labels: None; integer labels, scalar or `[B]`, looked up in the class embedding; or the embedding itself as
            floats, `[4 C_0]` or `[B, 4 C_0]`, which is what a gradient in the conditioning differentiates.

    Returns the prediction, `[B, H, W, out_channels]`.
    Raises ValueError for a block type, embedding type or label that it does not know.
    Reference: Ho et al., Denoising diffusion probabilistic models (2020), appendix B; names and options of diffusers' `UNet2DModel`.
    """

    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    add_attention: bool = True

    @property
    def embedding_dim(self) -> int:
        """Width of the time and class embeddings."""
        return 4 * self.block_out_channels[0]

    def _check(self) -> None:
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(f"resnet_time_scale_shift={self.resnet_time_scale_shift!r} is not known: use 'default' or 'scale_shift'.")
        for kinds, known in ((self.down_block_types, DOWN_BLOCKS), (self.up_block_types, UP_BLOCKS)):
            if unknown := sorted(set(kinds) - set(known)):
                raise ValueError(f"UNet2D does not know the block types {unknown}: it knows {list(known)}.")
            if len(kinds) != len(self.block_out_channels):
                raise ValueError(f"{list(kinds)} are {len(kinds)} blocks for {len(self.block_out_channels)} block_out_channels: give one of each per level.")

    def _class_embedding(self, labels: Array | None, time: Array) -> Array:
        if self.class_embed_type is None and self.num_class_embeds is None:
            if labels is not None:
                raise ValueError("This UNet2D is unconditional: class_labels must be None.")
            return time
        if labels is None:
            raise ValueError("This UNet2D is class-conditional: give class_labels, integers or an embedding of floats.")
        labels = jnp.asarray(labels)
        if self.class_embed_type is None:
            table = nn.Embed(self.num_class_embeds or 0, self.embedding_dim, name="class_embedding")
            embedded = table(jnp.zeros((), jnp.int32)) * 0 + labels if jnp.issubdtype(labels.dtype, jnp.floating) else table(labels)
        elif self.class_embed_type == "timestep":
            angles = self._sinusoids(jnp.broadcast_to(labels, time.shape[:1]))
            embedded = TimestepEmbedding(self.embedding_dim, name="class_embedding")(angles)
        elif self.class_embed_type == "identity":
            embedded = labels
        else:
            raise ValueError(f"class_embed_type={self.class_embed_type!r} is not known: use None, 'timestep' or 'identity'.")
        return time + jnp.broadcast_to(embedded, time.shape)

    def _sinusoids(self, t: Array) -> Array:
        return timestep_embedding(t, self.block_out_channels[0], flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, ""] | Num[Array, " b"],
        class_labels: Int[Array, "..."] | Float[Array, "..."] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b h w e"]:
        self._check()
        channels = tuple(self.block_out_channels)
        shared = {"eps": self.norm_eps, "scale_shift": self.resnet_time_scale_shift == "scale_shift", "dropout": self.dropout}

        def parts(features: int, attention: bool, scale: float = 1.0, groups: int | None = self.norm_num_groups):
            resnet = {**shared, "groups": self.norm_num_groups, "features": features, "output_scale": scale}
            return resnet, {"head_dim": self.attention_head_dim, "groups": groups, "eps": self.norm_eps, "output_scale": scale} if attention else None

        x = 2 * x - 1 if self.center_input_sample else x
        temb = TimestepEmbedding(self.embedding_dim, name="time_embedding")(self._sinusoids(jnp.broadcast_to(t, x.shape[:1])))
        temb = self._class_embedding(class_labels, temb)

        x = _conv(channels[0], 3, "conv_in")(x)
        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            resize = "down" if i + 1 < len(channels) else ""
            stage = Stage(self.layers_per_block, *parts(channels[i], "Attn" in kind), resize, self.downsample_padding, name=f"down_blocks_{i}")
            x, outputs = stage(x, temb, deterministic)
            skips += outputs

        mid_groups = self.attn_norm_num_groups or (None if shared["scale_shift"] else self.norm_num_groups)
        mid = parts(channels[-1], self.add_attention, self.mid_block_scale_factor, mid_groups)
        x = MidBlock(*mid, name="mid_block")(x, temb, deterministic)

        for i, kind in enumerate(self.up_block_types):
            resize = "up" if i + 1 < len(channels) else ""
            stage = Stage(self.layers_per_block + 1, *parts(channels[-1 - i], "Attn" in kind), resize, name=f"up_blocks_{i}")
            x, _ = stage(x, temb, deterministic, skips)

        x = nn.silu(nn.GroupNorm(self.norm_num_groups, epsilon=self.norm_eps, name="conv_norm_out")(x))
        return _conv(self.out_channels, 3, "conv_out")(x)
