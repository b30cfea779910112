"""The network of diffusers' `UNet2DConditionModel`.

Module names follow the original's state dict with `.N` written `_N` (`down_blocks.0.attentions.1.proj_in` is `down_blocks_0/attentions_1/proj_in`),
so that a checkpoint converts by a rule table alone.
"""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._embeddings import TextTimeEmbedding, TimestepEmbedding, conditions, each, sinusoids
from ._layers import ACTIVATIONS, conv, group_norm
from ._options import check, stage, wanted
from ._stages import Stage


class UNet2DCondition(nn.Module):
    """diffusers' `UNet2DConditionModel`: a residual UNet with attention to a text. Fields carry the names of its `config.json`.

    Args of the call:
        x: latents or images, `[B, H, W, in_channels]`. H and W may be odd: going up, an image takes the size of its skip; with the block
            types Resnet... and Simple... they are divisible by 2^(levels - 1).
        t: the training step as a number, scalar or `[B]`.
        cond: the text as `encoder_hidden_states`, floats `[B, T, D]`, D being `encoder_hid_dim` or else `cross_attention_dim`; or a dict of
            `encoder_hidden_states`;
            `encoder_attention_mask`, `[B, T]`, one for the tokens to keep and zero for others (optional);
            `text_embeds`, `[B, E]`, and `time_ids`, `[B, N]`, where `addition_embed_type` is "text_time": the pooled text, and sizes in pixels;
            `class_labels`, where there is a class embedding: with `num_class_embeds` integers, scalar or `[B]`, or the embedding itself as floats,
            `[M]` or `[B, M]`, M the width of the time embedding; with `class_embed_type` "timestep" numbers, scalar or `[B]`; with "identity" the
            embedding; with "projection" and "simple_projection" floats `[B, projection_class_embeddings_input_dim]`;
            `timestep_cond`, `[B, time_cond_proj_dim]`, where that is set (optional).
        deterministic: False drops out and needs an rng named "dropout".

    As in the original, `attention_head_dim` is the *number* of heads in the blocks CrossAttn... and the width of one in SimpleCrossAttn...,
    and `resnet_skip_time_act` and `resnet_out_scale_factor` are of the blocks Resnet... and Simple... alone. `upcast_attention` changes nothing:
    logits and softmax are in float32 at least. `remat` recomputes each residual and transformer block in the backward pass.

    Returns the prediction, `[B, H, W, out_channels]`.
    Raises ValueError for a shape, an option or a condition that does not fit.
    Reference: Rombach et al., High-resolution image synthesis with latent diffusion models (2022); Podell et al., SDXL (2023).
    """

    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: Sequence[str] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Sequence[str] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    only_cross_attention: bool | Sequence[bool] = False
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int | Sequence[int] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | Sequence[int] = 1280
    transformer_layers_per_block: int | Sequence[int | Sequence[int]] = 1
    reverse_transformer_layers_per_block: Sequence[int | Sequence[int]] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | Sequence[int] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64
    remat: bool = False

    @property
    def embedding_dim(self) -> int:
        """Width of the time and class embeddings."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def hid_type(self) -> str | None:
        """How the text is projected: by a dense layer where its width alone is given."""
        return self.encoder_hid_dim_type or (None if self.encoder_hid_dim is None else "text_proj")

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""

        def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        side = 2 ** (len(self.block_out_channels) - 1)
        required, _ = wanted(self, 1)
        cond = {name: array(*(size or 1 for size in shape)) for name, shape in required.items() if shape is not None}
        if "text_embeds" in cond:
            cond["text_embeds"] = array(1, (self.projection_class_embeddings_input_dim or 0) - (self.addition_time_embed_dim or 0))
        if "class_labels" not in cond and "class_labels" in required:
            kinds = {"timestep": array(1), "identity": array(1, self.embedding_dim)}
            cond["class_labels"] = kinds.get(str(self.class_embed_type), array(1, dtype=jnp.int32))
        return array(1, side, side, self.in_channels), array(), cond

    def _sinusoids(self, t: Array, dim: int, dtype: Any) -> Array:
        """The embedding of t, computed in float32 at least: half precision has no t = 999.5."""
        t = t.astype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
        return sinusoids(t, dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift).astype(dtype)

    def _class_embedding(self, labels: Array, b: int, dtype: Any) -> Array:
        if self.class_embed_type == "simple_projection":
            return nn.Dense(self.embedding_dim, name="class_embedding")(labels.astype(dtype))
        if self.class_embed_type == "projection":  # by a SiLU, whatever act_fn is
            return TimestepEmbedding(self.embedding_dim, name="class_embedding")(labels.astype(dtype))
        if self.class_embed_type == "timestep":
            embed = TimestepEmbedding(self.embedding_dim, self.act_fn, name="class_embedding")
            return embed(self._sinusoids(each("class_labels", labels, b), self.block_out_channels[0], dtype))
        if self.class_embed_type is None:
            table = nn.Embed(self.num_class_embeds or 0, self.embedding_dim, name="class_embedding").embedding  # read: the parameter is always made
            labels = labels if jnp.issubdtype(labels.dtype, jnp.floating) else jnp.take(table, labels, axis=0)
        shapes = ((self.embedding_dim,), (1, self.embedding_dim), (b, self.embedding_dim))
        if not jnp.issubdtype(labels.dtype, jnp.floating) or labels.shape not in shapes:
            raise ValueError(
                f"class_labels are {labels.dtype} {labels.shape} where an embedding, floats [{shapes[0][0]}] or [{b}, {shapes[0][0]}], was expected, "
                "or with num_class_embeds integers, scalar or one for each image."
            )
        return jnp.broadcast_to(labels, shapes[2]).astype(dtype)

    def _added_embedding(self, given: dict[str, Array], dtype: Any) -> Array:
        if self.addition_embed_type == "text":
            embed = TextTimeEmbedding(self.embedding_dim, self.addition_embed_type_num_heads, name="add_embedding")
            return embed(given["encoder_hidden_states"].astype(dtype))
        ids = given["time_ids"]
        sizes = self._sinusoids(ids.reshape(-1), self.addition_time_embed_dim or 0, dtype).reshape(ids.shape[0], -1)
        both = jnp.concatenate([given["text_embeds"].astype(dtype), sizes], axis=1)
        if both.shape[1] != self.projection_class_embeddings_input_dim:
            raise ValueError(
                f"text_embeds {given['text_embeds'].shape} and time_ids {ids.shape}, each of these in {self.addition_time_embed_dim} numbers, make "
                f"{both.shape[1]} columns and not projection_class_embeddings_input_dim={self.projection_class_embeddings_input_dim}: give as many."
            )
        return TimestepEmbedding(self.embedding_dim, name="add_embedding")(both)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Num[Array, "..."], cond: Any = None, deterministic: bool = True) -> Float[Array, "b h w e"]:
        check(self, x.shape)
        b, dtype, channels = x.shape[0], x.dtype, self.block_out_channels
        t = each("t", t, b)
        given = conditions(cond, *wanted(self, b))
        x = 2 * x - 1 if self.center_input_sample else x

        time = TimestepEmbedding(self.embedding_dim, self.act_fn, self.timestep_post_act, self.time_cond_proj_dim, name="time_embedding")
        guidance = given["timestep_cond"].astype(dtype) if "timestep_cond" in given else None
        temb = time(self._sinusoids(t, channels[0], dtype), guidance)
        if "class_labels" in given:
            temb = temb + self._class_embedding(given["class_labels"], b, dtype)
        if self.addition_embed_type is not None:
            temb = temb + self._added_embedding(given, dtype)
        temb = temb if self.time_embedding_act_fn is None else ACTIVATIONS[self.time_embedding_act_fn](temb)

        text, bias = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        text = None if text is None else text.astype(dtype)
        if self.hid_type is not None and text is not None:
            text = nn.Dense(cast(int, self.cross_attention_dim), name="encoder_hid_proj")(text)
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        bias = None if bias is None else (bias.astype(wide) - 1) * 1e4  # the original's number

        x = conv(channels[0], self.conv_in_kernel, "conv_in")(x)
        skips = [x]
        for i in range(len(channels)):
            x, outputs = Stage(**stage(self, "down", i, deterministic), name=f"down_blocks_{i}")(x, temb, text, bias)
            skips += outputs
        if self.mid_block_type is not None:
            x, _ = Stage(**stage(self, "mid", 0, deterministic), name="mid_block")(x, temb, text, bias)
        for i in range(len(channels)):
            x, _ = Stage(**stage(self, "up", i, deterministic), name=f"up_blocks_{i}")(x, temb, text, bias, skips)
        x = ACTIVATIONS[self.act_fn](group_norm(self.norm_num_groups, self.norm_eps, "conv_norm_out")(x))
        return conv(self.out_channels, self.conv_out_kernel, "conv_out")(x)
