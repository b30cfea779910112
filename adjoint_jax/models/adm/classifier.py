"""The noisy classifier of ADM."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from . import _trunk
from ._layers import attend, conv, norm

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
HIDDEN = 2048


class AttentionPool(nn.Module):
    """The answer of attention at one further token, the mean over the pixels, which comes first (as CLIP pools)."""

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        b, height, width, c = x.shape
        tokens = x.reshape(b, height * width, c)
        tokens = jnp.concatenate([jnp.mean(tokens, axis=1, keepdims=True), tokens], axis=1)
        position = self.param("positional_embedding", nn.initializers.normal(c**-0.5), (c, tokens.shape[1]), jnp.float32)
        tokens = tokens + position.T[None].astype(x.dtype)
        h = attend(nn.Conv(3 * c, (1,), name="qkv_proj")(tokens), self.heads, new_order=True)
        return nn.Conv(self.features, (1,), name="c_proj")(h[:, :1])[:, 0]


class ADMClassifier(nn.Module):
    """guided-diffusion's `EncoderUNetModel`, a classifier of noisy images: the half of `ADM` down to its middle, pooled to logits.

    Fields are the arguments of the original's constructor; the first six, which have no defaults there, have those of its scripts. `pool` is
    "adaptive" (mean over the pixels, then a dense layer), "attention" (CLIP's pooling), "spatial" or "spatial_v2" (the means of every block's
    output, then two dense layers with a ReLU, or with a group norm and a SiLU, between).

    Args of the call:
        x: images, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1), and equal to `image_size` with attention pooling.
        t: the training step as a number, scalar or `[B]`.

    Returns logits, `[B, out_channels]`, whose log-softmax has the gradient of classifier guidance.
    Raises ValueError for a shape, width, number of heads or kind of pooling that does not fit.
    Reference: Dhariwal and Nichol, Diffusion models beat GANs on image synthesis (2021), section 4.
    """

    image_size: int = 64
    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 1000
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (2, 4, 8)
    dropout: float = 0.0
    channel_mult: Sequence[float] = (1, 2, 4, 8)
    conv_resample: bool = True
    num_heads: int = 1
    num_head_channels: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    pool: str = "adaptive"
    remat: bool = False

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call."""
        return jax.ShapeDtypeStruct((1, self.image_size, self.image_size, self.in_channels), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)

    def _check(self, x: Array) -> None:
        _trunk.check(self, x)
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is not known: use one of {list(POOLS)}.")
        if self.pool == "attention" and self.num_head_channels == -1:
            raise ValueError('pool="attention" counts its heads by num_head_channels: give it, 64 in the published classifiers.')
        if self.pool == "attention" and x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"Attention pooling has one position a pixel: x must be {self.image_size} pixels high and wide, not {x.shape[1:3]}.")

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Num[Array, "..."], deterministic: bool = True) -> Float[Array, "b classes"]:
        self._check(x)
        h, outputs = _trunk.encode(self, x, _trunk.time_embedding(self, t, x), deterministic)
        if self.pool.startswith("spatial"):
            h = nn.Dense(HIDDEN, name="out_0")(jnp.concatenate([jnp.mean(output, axis=(1, 2)) for output in [*outputs, h]], axis=-1))
            v2 = self.pool == "spatial_v2"
            h = nn.silu(norm("out_1")(h)) if v2 else nn.relu(h)
            return nn.Dense(self.out_channels, name="out_3" if v2 else "out_2")(h)
        h = nn.silu(norm("out_0")(h))
        if self.pool == "attention":
            return AttentionPool(self.out_channels, _trunk.settings(self).heads(h.shape[-1]), name="out_2")(h)
        return conv(self.out_channels, 1, "out_3")(jnp.mean(h, axis=(1, 2), keepdims=True))[:, 0, 0]
