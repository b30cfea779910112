"""The network: embeddings, the way down, the middle, the way up."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._layers import ACTIVATIONS, TimeProjection, TimestepEmbedding, _conv, _norm
from ._stages import SkipDownStage, SkipUpStage, Stage

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")
VALUES = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}


class UNet2D(nn.Module):
    """diffusers' `UNet2DModel`: residual UNet over images with optional attention and class embedding. Fields carry the names of its `config.json`.

    Of the original's blocks it has those of DDPM (`DownBlock2D`, `AttnDownBlock2D`, ...), of ADM and the consistency models
    (`ResnetDownsampleBlock2D`, ...) and of NCSN++ (`SkipDownBlock2D`, ...). `remat=True` recomputes each residual block and each attention in
    the backward pass.

    Args of the call:
        x: images, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1).
        t: the training step as a number, scalar or `[B]`. With `time_embedding_type="fourier"` the noise level sigma > 0, by which the answer is
            divided; with `"learned"` from 0 to `num_train_timesteps - 1` (NaN outside), linear between whole steps.
        class_labels: None; integer labels, scalar or `[B]`, looked up in the class embedding; or the embedding itself as
            floats, `[D]` or `[B, D]`, D = 4 C_0 or `time_embedding_dim`, which is what a gradient in the conditioning differentiates. With
            `class_embed_type="timestep"` a number, scalar or `[B]`, in the unit of t; with `"identity"` always the embedding.

    Returns the prediction, `[B, H, W, out_channels]`.
    Raises ValueError for a shape, block type, embedding type, option or label that does not fit.
    Reference: Ho et al., Denoising diffusion probabilistic models (2020), appendix B; Dhariwal and Nichol, Diffusion models beat GANs (2021);
        Song et al., Score-based generative modeling through SDEs (2021), for NCSN++; names and options of diffusers' `UNet2DModel`.
    """

    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    add_attention: bool = True
    remat: bool = False

    @property
    def embedding_dim(self) -> int:
        """Width of the time and class embeddings."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

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
        for name, known in VALUES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {list(known)}.")
        if str(self.act_fn).lower() not in ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} is not known: use one of {list(ACTIVATIONS)}.")
        if self.time_embedding_type == "learned" and not self.num_train_timesteps:
            raise ValueError("time_embedding_type='learned' has a row for each training step: give num_train_timesteps.")
        for kinds, known in ((self.down_block_types, DOWN_BLOCKS), (self.up_block_types, UP_BLOCKS)):
            if unknown := sorted(set(kinds) - set(known)):
                raise ValueError(f"UNet2D does not know the block types {unknown}: it knows {list(known)}.")
            if len(kinds) != len(self.block_out_channels):
                raise ValueError(f"{len(kinds)} block types {list(kinds)} for {len(self.block_out_channels)} block_out_channels: give one a level.")
        self._check_groups()

    def _check_groups(self) -> None:
        down, up = ["Skip" in kind for kind in self.down_block_types], ["Skip" in kind for kind in self.up_block_types]
        # The image of a skip block keeps its resolution while other blocks change theirs; the last level changes nothing.
        if down[:-1] != sorted(down[:-1], reverse=True) or up != sorted(up):
            kinds = f"{list(self.down_block_types)} and {list(self.up_block_types)}"
            raise ValueError(f"Skip blocks come before all others going down and after them going up, unlike in {kinds}: reorder them.")
        if any([*down, *up]) and (self.in_channels, self.out_channels) != (3, 3):
            raise ValueError(
                f"Skip blocks carry an image of 3 channels, not in_channels={self.in_channels}, out_channels={self.out_channels}: give 3."
            )
        levels = zip([*self.block_out_channels, *self.block_out_channels[::-1]], [*down, *up], strict=True)
        plain = [width for width, skip in levels if not skip]
        if self.norm_num_groups is None and plain:
            raise ValueError("norm_num_groups=None is for networks of skip blocks alone: give a number of groups.")
        widths = {*plain, self.block_out_channels[0], self.block_out_channels[-1]}
        if odd := sorted(width for width in widths if width % (self.norm_num_groups or 1)):
            raise ValueError(f"norm_num_groups={self.norm_num_groups} does not divide the widths {odd} of block_out_channels: choose a divisor.")

    def _class_embedding(self, labels: Any, time: Array, projection: TimeProjection) -> Array:
        conditional = self.class_embed_type is not None or self.num_class_embeds is not None
        if labels is None and not conditional:
            return time
        if labels is None or not conditional:
            raise ValueError(f"This UNet2D is {'conditional: give class_labels' if conditional else 'unconditional: class_labels must be None'}.")
        labels = jnp.asarray(labels)
        if self.class_embed_type == "timestep":
            return time + TimestepEmbedding(self.embedding_dim, name="class_embedding")(projection(_rows(labels, time)).astype(time.dtype))
        if self.class_embed_type is None:
            table = nn.Embed(self.num_class_embeds or 0, self.embedding_dim, name="class_embedding").embedding  # read: the parameter is always made
            labels = labels if jnp.issubdtype(labels.dtype, jnp.floating) else jnp.take(table, labels, axis=0)
        if not jnp.issubdtype(labels.dtype, jnp.floating) or labels.shape[-1:] != time.shape[-1:]:
            raise ValueError(f"A class embedding is floats `[{time.shape[-1]}]` or `[B, {time.shape[-1]}]`; got {labels.dtype} {labels.shape}.")
        return time + jnp.broadcast_to(labels, time.shape).astype(time.dtype)

    def _parts(self, features: int, attention: bool, groups: int, attention_groups: int | None, scale: float) -> dict[str, Any]:
        """The options of a level's residual blocks and of its attention."""
        resnet = {"features": features, "groups": groups, "eps": self.norm_eps, "scale_shift": self.resnet_time_scale_shift == "scale_shift"}
        resnet |= {"dropout": self.dropout, "act_fn": self.act_fn, "output_scale": scale}
        attend = {"head_dim": self.attention_head_dim, "groups": attention_groups, "eps": self.norm_eps, "output_scale": scale}
        return {"resnet": resnet, "attention": attend if attention else None, "remat": self.remat}

    def _stage(self, kind: str, features: int, way: str, level: int) -> Any:
        skip, attention, up = "Skip" in kind, "Attn" in kind, way == "up"
        groups = 32 if skip or self.norm_num_groups is None else self.norm_num_groups  # of a skip block: its attention's alone
        common = self._parts(features, attention, groups, groups, math.sqrt(2.0) if skip else 1.0)
        resize = way if level + 1 < len(self.block_out_channels) else ""
        common |= {"layers": self.layers_per_block + up, "resize": resize, "name": f"{way}_blocks_{level}"}
        if skip:
            return (SkipUpStage if up else SkipDownStage)(**common)
        by_resnet = "sample" in kind or (attention and (self.upsample_type if up else self.downsample_type) == "resnet")
        return Stage(**common, by_resnet=by_resnet, padding=self.downsample_padding)

    def _middle(self, features: int) -> Stage:
        groups = self.norm_num_groups or min(features // 4, 32)
        # Where time scales and shifts, the attention has no group norm unless asked for: so does the original.
        attention_groups = self.attn_norm_num_groups or (None if self.resnet_time_scale_shift == "scale_shift" else groups)
        parts = self._parts(features, self.add_attention, groups, attention_groups, self.mid_block_scale_factor)
        return Stage(**parts, layers=2, bare=1, name="mid_block")

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Num[Array, "..."], class_labels: Num[Array, "..."] | int | None = None, deterministic: bool = True
    ) -> Float[Array, "b h w e"]:
        self._check(x)
        channels, dtype, t = self.block_out_channels, x.dtype, _rows(t, x)
        options = (self.time_embedding_type, channels[0], self.flip_sin_to_cos, self.freq_shift, self.num_train_timesteps or 0)
        projection = TimeProjection(*options, name="time_proj")
        temb = TimestepEmbedding(self.embedding_dim, name="time_embedding")(projection(t).astype(dtype))
        temb = self._class_embedding(class_labels, temb, projection)

        image = x = 2 * x - 1 if self.center_input_sample else x
        x = _conv(channels[0], 3, "conv_in")(x)
        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            x, image, outputs = self._stage(kind, channels[i], "down", i)(x, image, temb, deterministic)
            skips += outputs

        if self.mid_block_type is not None:
            x, _, _ = self._middle(channels[-1])(x, None, temb, deterministic)

        image, layers = None, self.layers_per_block + 1
        for i, kind in enumerate(self.up_block_types):
            skips, taken = skips[:-layers], skips[: -layers - 1 : -1]
            x, image, _ = self._stage(kind, channels[-1 - i], "up", i)(x, image, temb, deterministic, taken)

        groups = self.norm_num_groups or min(channels[0] // 4, 32)
        y = _conv(self.out_channels, 3, "conv_out")(nn.silu(_norm(groups, self.norm_eps, "conv_norm_out")(x)))
        y = y if image is None else y + image
        return y / t[:, None, None, None].astype(dtype) if self.time_embedding_type == "fourier" else y


def _rows(t: Array, like: Array) -> Float[Array, " b"]:
    """t for each row of `like`, in float32 at least: half precision has no t = 999.5."""
    return jnp.broadcast_to(jnp.asarray(t), like.shape[:1]).astype(jnp.float64 if like.dtype == jnp.float64 else jnp.float32)
