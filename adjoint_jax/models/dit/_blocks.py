"""The parts of the diffusion transformer, named as in the original's state dict with `.N` written `_N`."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

SINUSOIDS = 256  # the width of the time's sinusoids, the original's constant
NORM_EPS = 1e-6  # of the norms without an entry in the configuration: a block's first, and the last


def timestep_embedding(t: Float[Array, " b"]) -> Float[Array, "b d"]:
    """Cosines, then sines, of t at frequencies exp(-log(1e4) k / 127), k = 0 .. 127."""
    half = SINUSOIDS // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=t.dtype) / (half - 1))
    angles = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _axis(size: int, base: int, width: int) -> np.ndarray:
    """Sines, then cosines, of `size` positions stretched over [0, base), `[size, width]`, in float64."""
    angles = (np.arange(size) * base / size)[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def position_embedding(height: int, width: int, base: int, dim: int, dtype: Any) -> Float[Array, "1 n {dim}"]:
    """The fixed embedding of height x width tokens, row by row: the column's in the first half of the channels, the row's in the second.

    A grid of any size spans the trained range [0, base) of positions, so that another resolution interpolates.
    """
    column, row = (jnp.asarray(_axis(size, base, dim // 2), dtype) for size in (width, height))
    shape = (height, width, dim // 2)
    parts = [jnp.broadcast_to(column[None], shape), jnp.broadcast_to(row[:, None], shape)]
    return jnp.concatenate(parts, axis=-1).reshape(1, height * width, dim)


def norm(eps: float, affine: bool, name: str) -> nn.LayerNorm:
    # Flax's fast variance E[x^2] - E[x]^2 cancels where a token's mean is large; the original takes two passes.
    return nn.LayerNorm(epsilon=eps, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name)


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedding(nn.Module):
    """Two dense layers with a SiLU between."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return nn.Dense(self.features, name="linear_2")(nn.silu(nn.Dense(self.features, name="linear_1")(x)))


class LabelEmbedding(nn.Module):
    """Labels looked up in a table; the embeddings themselves pass, and the table is made all the same."""

    classes: int
    features: int

    @nn.compact
    def __call__(self, labels: Num[Array, "..."]) -> Float[Array, "b d"]:
        table = nn.Embed(self.classes, self.features, name="embedding_table").embedding
        return labels if jnp.issubdtype(labels.dtype, jnp.floating) else jnp.take(table, labels, axis=0)


class TimeAndLabel(nn.Module):
    """c = e_t + e_y."""

    classes: int
    features: int

    @nn.compact
    def __call__(self, time: Float[Array, "b s"], labels: Num[Array, "..."]) -> Float[Array, "b d"]:
        time = TimestepEmbedding(self.features, name="timestep_embedder")(time)
        return time + LabelEmbedding(self.classes, self.features, name="class_embedder")(labels).astype(time.dtype)


class AdaptiveNorm(nn.Module):
    """The norm of (2) with the six vectors of (1), of which it uses two. Returns the other four and c too."""

    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b s"], labels: Num[Array, "..."]) -> tuple[Array, list[Array], Array]:
        c = TimeAndLabel(self.classes, x.shape[-1], name="emb")(time, labels)
        shift, scale, *rest = jnp.split(nn.Dense(6 * x.shape[-1], name="linear")(nn.silu(c)), 6, axis=-1)  # (1)
        return modulate(norm(NORM_EPS, False, "norm")(x), shift, scale), rest, c


class Attention(nn.Module):
    """Self-attention over tokens. `bias` is that of the queries, keys and values; the last layer always has one."""

    heads: int
    head_dim: int
    bias: bool
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], deterministic: bool) -> Float[Array, "b n d"]:
        features, shape = self.heads * self.head_dim, (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (nn.Dense(features, use_bias=self.bias, name=name)(x).reshape(shape) for name in ("to_q", "to_k", "to_v"))
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return nn.Dropout(self.dropout, deterministic=deterministic)(nn.Dense(x.shape[-1], name="to_out_0")(h))


class Projection(nn.Module):
    """A dense layer and its activation; "geglu" is h gelu(g) of two halves."""

    features: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        if self.activation == "geglu":
            h, gate = jnp.split(nn.Dense(2 * self.features, name="proj")(x), 2, axis=-1)
            return h * nn.gelu(gate, approximate=False)
        return nn.gelu(nn.Dense(self.features, name="proj")(x), approximate=self.activation == "gelu-approximate")


class FeedForward(nn.Module):
    """Four times as wide within."""

    activation: str
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], deterministic: bool) -> Float[Array, "b n d"]:
        h = Projection(4 * x.shape[-1], self.activation, name="net_0")(x)
        return nn.Dense(x.shape[-1], name="net_2")(nn.Dropout(self.dropout, deterministic=deterministic)(h))


class Block(nn.Module):
    """(1) to (3). Returns the tokens and c."""

    classes: int
    attention: Mapping[str, Any]
    feed_forward: Mapping[str, Any]
    affine: bool
    eps: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], time: Float[Array, "b s"], labels: Num[Array, "..."]) -> tuple[Array, Array]:
        h, (gate_1, shift, scale, gate_2), c = AdaptiveNorm(self.classes, name="norm1")(x, time, labels)
        x = x + gate_1[:, None] * Attention(**self.attention, name="attn1")(h, self.deterministic)  # (2)
        h = modulate(norm(self.eps, self.affine, "norm3")(x), shift, scale)
        return x + gate_2[:, None] * FeedForward(**self.feed_forward, name="ff")(h, self.deterministic), c  # (3)


class Patches(nn.Module):
    """Each patch a token, with its position; `base` patches a side are the trained resolution."""

    patch: int
    features: int
    base: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        side = (self.patch, self.patch)
        h = nn.Conv(self.features, side, side, padding="VALID", name="proj")(x)
        tokens = h.reshape(h.shape[0], -1, self.features)
        return tokens + position_embedding(h.shape[1], h.shape[2], self.base, self.features, h.dtype)
