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
from jaxtyping import Array, Float, Num

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


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
        h = nn.silu(_norm(self.groups, self.eps, "norm1")(x))
        h = _conv(self.features, 3, "conv1")(h)
        time = nn.Dense(self.features * (2 if self.scale_shift else 1), name="time_emb_proj")(nn.silu(temb))[:, None, None, :]
        norm2 = _norm(self.groups, self.eps, "norm2")
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
            return _conv(self.features, 3, "conv")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return _conv(self.features, 3, "conv", stride=2, padding=(side, side))(x)


class Stage(nn.Module):
    """One resolution: residual blocks, each after a skip (going up) and before attention (but for the last `bare`), then a change of resolution."""

    layers: int
    resnet: dict[str, Any]
    attention: dict[str, Any] | None
    resize: str = ""
    padding: int = 1
    bare: int = 0

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool, skips: list[Array] | None = None) -> tuple[Array, list[Array]]:
        outputs = []
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = ResnetBlock(**self.resnet, name=f"resnets_{i}")(x, temb, deterministic)
            if self.attention is not None and i < self.layers - self.bare:
                x = Attention(**self.attention, name=f"attentions_{i}")(x)
            outputs.append(x)
        if self.resize == "down":
            x = Resize(self.resnet["features"], up=False, padding=self.padding, name="downsamplers_0")(x)
            outputs.append(x)
        elif self.resize == "up":
            x = Resize(self.resnet["features"], up=True, name="upsamplers_0")(x)
        return x, outputs


class UNet2D(nn.Module):
    """diffusers' `UNet2DModel`: residual UNet over images with optional attention and class embedding. Fields carry the names of its `config.json`.

    Args of the call:
        x: images, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1).
        t: the training step as a number, scalar or `[B]`.
        class_labels: None; integer labels, scalar or `[B]`, looked up in the class embedding; or the embedding itself as
            floats, `[4 C_0]` or `[B, 4 C_0]`, which is what a gradient in the conditioning differentiates. With
            `class_embed_type="timestep"` a number, scalar or `[B]`; with `"identity"` always the embedding.

    Returns the prediction, `[B, H, W, out_channels]`.
    Raises ValueError for a shape, block type, embedding type or label that does not fit.
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

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        side = 2 ** (len(self.block_out_channels) - 1)
        labels = None if self.num_class_embeds is None else jax.ShapeDtypeStruct((1,), jnp.int32)
        kinds = {"timestep": jax.ShapeDtypeStruct((1,), jnp.float32), "identity": jax.ShapeDtypeStruct((1, self.embedding_dim), jnp.float32)}
        x = jax.ShapeDtypeStruct((1, side, side, self.in_channels), jnp.float32)
        return x, jax.ShapeDtypeStruct((), jnp.float32), kinds.get(str(self.class_embed_type), labels)

    def _check(self, x: Array) -> None:
        multiple = 2 ** (len(self.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(f"UNet2D takes x of shape [B, H, W, {self.in_channels}], H and W multiples of {multiple}; got {x.shape}.")
        for name, known in (("resnet_time_scale_shift", ("default", "scale_shift")), ("class_embed_type", (None, "timestep", "identity"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {list(known)}.")
        for kinds, known in ((self.down_block_types, DOWN_BLOCKS), (self.up_block_types, UP_BLOCKS)):
            if unknown := sorted(set(kinds) - set(known)):
                raise ValueError(f"UNet2D does not know the block types {unknown}: it knows {list(known)}.")
            if len(kinds) != len(self.block_out_channels):
                raise ValueError(f"{len(kinds)} block types {list(kinds)} for {len(self.block_out_channels)} block_out_channels: give one a level.")

    def _class_embedding(self, labels: Any, time: Array) -> Array:
        conditional = self.class_embed_type is not None or self.num_class_embeds is not None
        if labels is None and not conditional:
            return time
        if labels is None or not conditional:
            raise ValueError(f"This UNet2D is {'conditional: give class_labels' if conditional else 'unconditional: class_labels must be None'}.")
        labels = jnp.asarray(labels)
        if self.class_embed_type == "timestep":
            return time + TimestepEmbedding(self.embedding_dim, name="class_embedding")(self._sinusoids(labels, time))
        if self.class_embed_type is None:
            table = nn.Embed(self.num_class_embeds or 0, self.embedding_dim, name="class_embedding").embedding  # read: the parameter is always made
            labels = labels if jnp.issubdtype(labels.dtype, jnp.floating) else jnp.take(table, labels, axis=0)
        if not jnp.issubdtype(labels.dtype, jnp.floating) or labels.shape[-1:] != time.shape[-1:]:
            raise ValueError(f"A class embedding is floats `[{time.shape[-1]}]` or `[B, {time.shape[-1]}]`; got {labels.dtype} {labels.shape}.")
        return time + jnp.broadcast_to(labels, time.shape).astype(time.dtype)

    def _sinusoids(self, t: Array, like: Array) -> Array:
        """The embedding of t, a row for each of `like` and of its dtype, computed in float32 at least: half precision has no t = 999.5."""
        t = jnp.broadcast_to(jnp.asarray(t), like.shape[:1]).astype(jnp.float64 if like.dtype == jnp.float64 else jnp.float32)
        options = {"flip_sin_to_cos": self.flip_sin_to_cos, "freq_shift": self.freq_shift}
        return timestep_embedding(t, self.block_out_channels[0], **options).astype(like.dtype)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Num[Array, "..."], class_labels: Num[Array, "..."] | int | None = None, deterministic: bool = True
    ) -> Float[Array, "b h w e"]:
        self._check(x)
        channels = self.block_out_channels
        shared = {"eps": self.norm_eps, "scale_shift": self.resnet_time_scale_shift == "scale_shift", "dropout": self.dropout}

        def parts(features: int, attention: bool, scale: float = 1.0, groups: int | None = self.norm_num_groups):
            resnet = {**shared, "groups": self.norm_num_groups, "features": features, "output_scale": scale}
            return resnet, {"head_dim": self.attention_head_dim, "groups": groups, "eps": self.norm_eps, "output_scale": scale} if attention else None

        x = 2 * x - 1 if self.center_input_sample else x
        temb = TimestepEmbedding(self.embedding_dim, name="time_embedding")(self._sinusoids(t, x))
        temb = self._class_embedding(class_labels, temb)
        x = _conv(channels[0], 3, "conv_in")(x)
        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            resize = "down" if i + 1 < len(channels) else ""
            stage = Stage(self.layers_per_block, *parts(channels[i], "Attn" in kind), resize, self.downsample_padding, name=f"down_blocks_{i}")
            x, outputs = stage(x, temb, deterministic)
            skips += outputs

        # Where time scales and shifts, the middle's attention has no group norm unless asked for: so does the original.
        mid_groups = self.attn_norm_num_groups or (None if shared["scale_shift"] else self.norm_num_groups)
        mid = parts(channels[-1], self.add_attention, self.mid_block_scale_factor, mid_groups)
        x, _ = Stage(2, *mid, bare=1, name="mid_block")(x, temb, deterministic)

        for i, kind in enumerate(self.up_block_types):
            resize = "up" if i + 1 < len(channels) else ""
            stage = Stage(self.layers_per_block + 1, *parts(channels[-1 - i], "Attn" in kind), resize, name=f"up_blocks_{i}")
            x, _ = stage(x, temb, deterministic, skips)

        return _conv(self.out_channels, 3, "conv_out")(nn.silu(_norm(self.norm_num_groups, self.norm_eps, "conv_norm_out")(x)))
