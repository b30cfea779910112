"""The parts of the multimodal diffusion transformer, named as in the original's state dict with `.N` written `_N`."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SINUSOIDS = 256  # the width of the time's sinusoids, the original's constant
NORM_EPS = 1e-6  # of every norm


def timestep_embedding(t: Float[Array, " b"]) -> Float[Array, "b d"]:
    """Cosines, then sines, of t at frequencies exp(-log(1e4) k / 128), k = 0 .. 127."""
    half = SINUSOIDS // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=t.dtype) / half)
    angles = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(size: int, base: int, dim: int, dtype: Any) -> Float[Array, "1 n {dim}"]:
    """The embedding of size x size positions on [0, base), row by row: the column's in the first half of the channels, the row's in the second.

    Each half is sines, then cosines.
    """
    half = dim // 4
    angles = (np.arange(size) * base / size)[:, None] * 1e4 ** (-np.arange(half) / half)
    axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)
    parts = [jnp.broadcast_to(line, (size, size, dim // 2)) for line in (axis[None], axis[:, None])]
    return jnp.concatenate(parts, axis=-1).reshape(1, size * size, dim)


def _norm(name: str) -> nn.LayerNorm:
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a token's mean is large; the original takes two passes.
    return nn.LayerNorm(epsilon=NORM_EPS, use_bias=False, use_scale=False, use_fast_variance=False, name=name)


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    """A scale and a shift of each channel, from the conditioning."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaptiveNorm(nn.Module):
    """A norm without weights, and the vectors W SiLU(c) + b that modulate and gate what follows. Returns both, apart."""

    vectors: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> tuple[Array, list[Array]]:
        vectors = nn.Dense(self.vectors * x.shape[-1], name="linear")(nn.silu(c))
        return _norm("norm")(x), jnp.split(vectors, self.vectors, axis=-1)


class TwoLayers(nn.Module):
    """Two dense layers with a SiLU between."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return nn.Dense(self.features, name="linear_2")(nn.silu(nn.Dense(self.features, name="linear_1")(x)))


class TimeAndText(nn.Module):
    """The conditioning c: the time and the pooled text, each through two layers, added."""

    features: int

    @nn.compact
    def __call__(self, time: Float[Array, "b s"], pooled: Float[Array, "b p"]) -> Float[Array, "b d"]:
        return TwoLayers(self.features, name="timestep_embedder")(time) + TwoLayers(self.features, name="text_embedder")(pooled)


class Attention(nn.Module):
    """Attention over the image's tokens and, where there is a context, over both together, each with layers of its own.

    `norm` normalises every query and key by its root mean square. With `context_pre_only` the context is read and not answered.
    """

    heads: int
    head_dim: int
    norm: bool
    context_pre_only: bool = False

    def _tokens(self, x: Float[Array, "b n d"], layers: str, norms: str) -> list[Array]:
        """Queries, keys and values, `[B, N, heads, head_dim]`."""
        parts = []
        for name in "qkv":
            part = nn.Dense(self.heads * self.head_dim, name=layers.format(name))(x).reshape(*x.shape[:2], self.heads, self.head_dim)
            if self.norm and name != "v":
                part = nn.RMSNorm(epsilon=NORM_EPS, name=norms.format(name))(part)
            parts.append(part)
        return parts

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m d"] | None = None) -> tuple[Array, Array | None]:
        q, k, v = self._tokens(x, "to_{}", "norm_{}")
        if context is not None:
            of_context = self._tokens(context, "add_{}_proj", "norm_added_{}")
            k, v = (jnp.concatenate(pair, axis=1) for pair in ((k, of_context[1]), (v, of_context[2])))
            q = q if self.context_pre_only else jnp.concatenate([q, of_context[0]], axis=1)
        h = jax.nn.dot_product_attention(q, k, v).reshape(*q.shape[:2], -1)
        n, features = x.shape[1:]
        y = nn.Dense(features, name="to_out_0")(h[:, :n])
        return y, None if context is None or self.context_pre_only else nn.Dense(features, name="to_add_out")(h[:, n:])


class Projection(nn.Module):
    """A dense layer and GELU, by its tanh approximation."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        return nn.gelu(nn.Dense(self.features, name="proj")(x), approximate=True)


class FeedForward(nn.Module):
    """Four times as wide within."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return nn.Dense(x.shape[-1], name="net_2")(Projection(4 * x.shape[-1], name="net_0")(x))


class Block(nn.Module):
    """Joint attention, then a feed-forward net for the image and one for the text; `dual` adds an attention of the image to itself.

    The `last` block reads the text and leaves it: it returns None for it.
    """

    heads: int
    head_dim: int
    norm: bool
    dual: bool
    last: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m d"], c: Float[Array, "b d"]) -> tuple[Array, Array | None]:
        sizes = {"heads": self.heads, "head_dim": self.head_dim, "norm": self.norm}
        h, vectors = AdaptiveNorm(9 if self.dual else 6, name="norm1")(x, c)
        shift, scale, gate, feed_shift, feed_scale, feed_gate = vectors[:6]
        g, others = AdaptiveNorm(2 if self.last else 6, name="norm1_context")(context, c)
        g = modulate(g, others[1], others[0]) if self.last else modulate(g, others[0], others[1])  # the last block's two: scale, then shift
        answer, of_context = Attention(**sizes, context_pre_only=self.last, name="attn")(modulate(h, shift, scale), g)
        x = x + gate[:, None] * answer  # (1)
        if self.dual:  # of the tokens as they were normalised before the joint attention
            answer, _ = Attention(**sizes, name="attn2")(modulate(h, vectors[6], vectors[7]))
            x = x + vectors[8][:, None] * answer
        x = x + feed_gate[:, None] * FeedForward(name="ff")(modulate(_norm("norm2")(x), feed_shift, feed_scale))  # (2)
        if of_context is None:
            return x, None
        context = context + others[2][:, None] * of_context
        fed = FeedForward(name="ff_context")(modulate(_norm("norm2_context")(context), others[3], others[4]))
        return x, context + others[5][:, None] * fed


class Patches(nn.Module):
    """Each patch a token, with its position: the middle of a `size` x `size` table, which belongs to the file and is not trained."""

    patch: int
    features: int
    size: int
    base: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        side = (self.patch, self.patch)
        h = nn.Conv(self.features, side, side, padding="VALID", name="proj")(x)
        (b, height, width, _), size = h.shape, self.size

        def fresh(key: Array) -> Array:
            return position_table(size, self.base, self.features, jnp.float32)

        table = jax.lax.stop_gradient(self.param("pos_embed", fresh)).reshape(size, size, self.features)
        top, left = (size - height) // 2, (size - width) // 2
        middle = table[top : top + height, left : left + width].reshape(1, height * width, self.features)
        return h.reshape(b, height * width, self.features) + middle.astype(h.dtype)
