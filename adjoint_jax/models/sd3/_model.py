"""The multimodal diffusion transformer (MMDiT) of diffusers' `SD3Transformer2DModel`, in Flax linen and NHWC.

The patches of a latent and the tokens of a text are two streams. Each has its own layers; they meet in the attention alone, which runs over
both. With c the embedded time and pooled text, each stream of a block has six vectors W SiLU(c) + b and, for tokens x beside y,

    x <- x + a_1 Attention((1 + gamma_1) LN(x) + beta_1, the same of y)                                             (1)
    x <- x + a_2 MLP((1 + gamma_2) LN(x) + beta_2).                                                                 (2)

The last block reads the text and does not answer it. In the `dual_attention_layers` (3.5 medium) the image also attends to itself, with three
more vectors. Module names follow the original's state dict with `.N` written `_N`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._blocks import AdaptiveNorm, Block, Patches, TimeAndText, modulate, timestep_embedding

TEXT, POOLED = "encoder_hidden_states", "pooled_projections"


class SD3Transformer(nn.Module):
    """diffusers' `SD3Transformer2DModel`, of Stable Diffusion 3 and 3.5. Fields carry the names of its `config.json`.

    Args of the call:
        x: latents, `[B, H, W, in_channels]`; H and W multiples of `patch_size`, up to `pos_embed_max_size` patches a side.
        t: the training step as a number, scalar or `[B]`; 1000 times the time of the flow. Differentiable.
        cond: a dict of floats, both differentiable: "encoder_hidden_states", the embedded text, `[T, joint_attention_dim]` or `[B, T, ...]`, and
            "pooled_projections", its summary, `[pooled_projection_dim]` or `[B, ...]`.
        deterministic: without effect; nothing is drawn.

    Returns the prediction, `[B, H, W, out_channels]`.
    The table of positions, a buffer of the original that its files hold, is the parameter `pos_embed/pos_embed`: its gradient is zero, and a weight
    decay must leave it out. A fresh one holds the sinusoids.
    Raises ValueError for a shape, a qk_norm or a conditioning that does not fit.
    Reference: Esser et al., Scaling rectified flow transformers for high-resolution image synthesis (2024), section 4; names and options of
    diffusers' class.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: Sequence[int] = ()
    qk_norm: str | None = None
    remat: bool = False

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        shapes = {
            "x": (1, self.patch_size, self.patch_size, self.in_channels),
            "t": (),
            TEXT: (1, 1, self.joint_attention_dim),
            POOLED: (1, self.pooled_projection_dim),
        }
        x, t, text, pooled = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values())
        return x, t, {TEXT: text, POOLED: pooled}

    def _check(self, x: Array) -> None:
        p, most, dim = self.patch_size, self.pos_embed_max_size, self.num_attention_heads * self.attention_head_dim
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={self.qk_norm!r} is not known: use None or 'rms_norm'.")
        if dim % 4 or self.caption_projection_dim != dim:
            raise ValueError(
                f"num_attention_heads * attention_head_dim must be a multiple of 4 and equal caption_projection_dim; got {dim} and "
                f"{self.caption_projection_dim}."
            )
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % p or x.shape[2] % p or max(x.shape[1:3]) > p * most:
            expected = f"[B, H, W, {self.in_channels}], H and W multiples of {p} and at most {p * most}"
            raise ValueError(f"SD3Transformer takes x of shape {expected}; got {x.shape}.")

    def _conditioning(self, cond: Any, x: Array) -> tuple[Array, Array]:
        """The text `[B, T, ...]` and its summary `[B, ...]`, in the dtype of x."""
        if not isinstance(cond, Mapping) or set(cond) != {TEXT, POOLED}:
            given = sorted(map(str, cond)) if isinstance(cond, Mapping) else type(cond).__name__
            raise ValueError(f"SD3Transformer is conditional: give cond as a dict of {TEXT!r} and {POOLED!r}; got {given}.")
        batch, arrays = x.shape[0], []
        for name, rank, width in ((TEXT, 2, self.joint_attention_dim), (POOLED, 1, self.pooled_projection_dim)):
            array = jnp.asarray(cond[name])
            floats = jnp.issubdtype(array.dtype, jnp.floating)
            if not floats or array.shape[-1:] != (width,) or array.ndim not in (rank, rank + 1) or array.shape[:-rank] not in ((), (batch,)):
                tokens = "T, " * (rank - 1)
                raise ValueError(f"{name} are floats, [{tokens}{width}] or [{batch}, {tokens}{width}]; got {array.dtype} {array.shape}.")
            arrays.append(jnp.broadcast_to(array, (batch, *array.shape[-rank:])).astype(x.dtype))
        return arrays[0], arrays[1]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Num[Array, "..."], cond: Mapping[str, Any] | None = None, deterministic: bool = True
    ) -> Float[Array, "b h w e"]:
        self._check(x)
        context, pooled = self._conditioning(cond, x)
        (b, height, width, _), p, dim = x.shape, self.patch_size, self.caption_projection_dim
        # In float32 at least: half precision has no t = 999.5.
        t = jnp.broadcast_to(jnp.asarray(t), (b,)).astype(jnp.promote_types(x.dtype, jnp.float32))
        c = TimeAndText(dim, name="time_text_embed")(timestep_embedding(t).astype(x.dtype), pooled)
        x = Patches(p, dim, self.pos_embed_max_size, self.sample_size // p, name="pos_embed")(x)
        context = nn.Dense(dim, name="context_embedder")(context)

        block: Any = nn.remat(Block) if self.remat else Block
        sizes = {"heads": self.num_attention_heads, "head_dim": self.attention_head_dim, "norm": self.qk_norm is not None}
        for i in range(self.num_layers):
            options = {"dual": i in self.dual_attention_layers, "last": i == self.num_layers - 1}
            x, context = block(**sizes, **options, name=f"transformer_blocks_{i}")(x, context, c)

        h, (scale, shift) = AdaptiveNorm(2, name="norm_out")(x, c)
        channels = self.out_channels or self.in_channels
        y = nn.Dense(p * p * channels, name="proj_out")(modulate(h, shift, scale))
        y = y.reshape(b, height // p, width // p, p, p, channels)
        return jnp.swapaxes(y, 2, 3).reshape(b, height, width, channels)
