"""The UNet of ADM."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from . import _trunk
from ._layers import conv, norm


class ADM(nn.Module):
    """guided-diffusion's `UNetModel`: residual UNet with attention at several resolutions and class labels. Fields are its constructor's arguments.

    Going down, each level has `num_res_blocks` rows of a residual block and, at the downsampling rates named in `attention_resolutions`, attention;
    then a change of resolution, a residual block itself with `resblock_updown`. A residual block, attention and another make the middle; going up,
    each level has one row more, and every row takes the output of its counterpart beside its input. Time and class enter each residual block as a
    shift of h, or as norm(h) (1 + scale) + shift with `use_scale_shift_norm`. The first six arguments, which have no defaults in the original's
    constructor, have those of its scripts.

    Args of the call:
        x: images, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1). `image_size` changes no number.
        t: the training step as a number, scalar or `[B]`.
        y: None without `num_classes`; else integer labels, scalar or `[B]`, or their embedding as floats, `[4 model_channels]` or
            `[B, 4 model_channels]`, which is what a gradient in the conditioning differentiates.

    Returns the prediction, `[B, H, W, out_channels]`: with a learned variance (`out_channels = 2 in_channels`) the noise comes first, and `aj.load`
        leaves out the rest.
    Raises ValueError for a shape, width, number of heads or label that does not fit.
    Reference: Dhariwal and Nichol, Diffusion models beat GANs on image synthesis (2021), section 3. The super-resolution models are an `ADM` whose
        `in_channels` count the upsampled image, concatenated behind x.
    """

    image_size: int = 64
    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 3
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (4, 8)
    dropout: float = 0.0
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    conv_resample: bool = True
    num_classes: int | None = None
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    remat: bool = False

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        side = 2 ** (len(self.channel_mult) - 1)
        y = None if self.num_classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.ShapeDtypeStruct((1, side, side, self.in_channels), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32), y

    def _with_class(self, emb: Array, y: Any) -> Array:
        if (y is None) != (self.num_classes is None):
            raise ValueError(f"This ADM is {'unconditional: y must be None' if y is not None else 'conditional: give labels as y'}.")
        if y is None:
            return emb
        table, y = nn.Embed(self.num_classes or 0, emb.shape[-1], name="label_emb").embedding, jnp.asarray(y)
        y = y if jnp.issubdtype(y.dtype, jnp.floating) else jnp.take(table, y, axis=0)
        if y.shape not in (emb.shape, emb.shape[1:]):
            raise ValueError(
                f"y is integers, scalar or `[B]`, or their embedding, floats `[{emb.shape[-1]}]` or `[B, {emb.shape[-1]}]`; got {y.shape}."
            )
        return emb + jnp.broadcast_to(y, emb.shape).astype(emb.dtype)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Num[Array, "..."], y: Num[Array, "..."] | int | None = None, deterministic: bool = True
    ) -> Float[Array, "b h w e"]:
        _trunk.check(self, x)
        emb = self._with_class(_trunk.time_embedding(self, t, x), y)
        h, skips = _trunk.encode(self, x, emb, deterministic)

        settings, channels = _trunk.settings(self), _trunk.widths(self)
        if self.num_heads_upsample != -1:
            settings = settings._replace(num_heads=self.num_heads_upsample)
        make = functools.partial(_trunk.block(self), settings=settings)
        rows = [(level, i) for level in reversed(range(len(channels))) for i in range(self.num_res_blocks + 1)]
        for number, (level, i) in enumerate(rows):
            up = ("up",) if level and i == self.num_res_blocks else ()
            layers = make((*_trunk.row(self, level), *up), channels[level], name=f"output_blocks_{number}")
            h = layers(jnp.concatenate([h, skips.pop()], axis=-1), emb, deterministic)
        return conv(self.out_channels, 3, "out_2")(nn.silu(norm("out_0")(h)))
