"""What is added to the time embedding of `UNet2DCondition`, and the conditions it is made of."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._layers import ACTIVATIONS, attend, layer_norm

Shapes = Mapping[str, tuple[int | None, ...] | None]
"""The shape that each condition has; None is any length, and no shape is checked elsewhere."""


def conditions(cond: Any, required: Shapes, optional: Shapes) -> dict[str, Array]:
    """The conditions of a call by name: a dict as it is, an array as `encoder_hidden_states`, None as none. Raises for what does not fit."""
    given = {} if cond is None else dict(cond) if isinstance(cond, Mapping) else {"encoder_hidden_states": cond}
    shapes = {**required, **optional}
    problems = [f"{name} is missing" for name in required if name not in given] + [f"{name} is unknown" for name in given if name not in shapes]
    if problems:
        kinds = ", ".join([*required, *(f"{name} (optional)" for name in optional)]) or "nothing"
        raise ValueError(f"The conditions of this UNet2DCondition are {kinds}, and {', '.join(problems)}: give a dict of these arrays.")
    arrays = {name: jnp.asarray(value) for name, value in given.items()}
    for name, array in arrays.items():
        shape = shapes[name]
        if shape is not None and (array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True))):
            expected = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"{name} has the shape {array.shape}, and [{expected}] was expected: reshape it, or repeat it for each image.")
    mask, text = arrays.get("encoder_attention_mask"), arrays.get("encoder_hidden_states")
    if mask is not None and text is not None and mask.shape[1] != text.shape[1]:
        raise ValueError(f"{mask.shape[1]} tokens of encoder_attention_mask for {text.shape[1]} of encoder_hidden_states: give a number for each.")
    return arrays


def each(name: str, value: Any, b: int) -> Num[Array, " {b}"]:
    """One number for each image, from a scalar or as many."""
    value = jnp.asarray(value)
    if value.shape not in ((), (1,), (b,)):
        raise ValueError(f"{name} has the shape {value.shape}, and a scalar or [{b}] was expected: give one number, or one for each image.")
    return jnp.broadcast_to(value, (b,))


def sinusoids(t: Float[Array, " b"], dim: int, *, flip_sin_to_cos: bool, freq_shift: int) -> Float[Array, "b {dim}"]:
    """Sinusoids of a float t at frequencies exp(-log(1e4) k / (dim/2 - freq_shift)), sines first unless flipped (Vaswani et al., sec. 3.5)."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=t.dtype) / (half - freq_shift))
    angles = t[:, None] * frequencies[None]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nn.Module):
    """Two dense layers with an activation between, and after where `post_act` is one; `cond_dim` numbers enter by a layer of their own."""

    features: int
    act: str = "silu"
    post_act: str | None = None
    cond_dim: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b c"], condition: Float[Array, "b k"] | None = None) -> Float[Array, "b d"]:
        if self.cond_dim is not None:  # called without a condition too: the parameter is always made
            condition = jnp.zeros((x.shape[0], self.cond_dim), x.dtype) if condition is None else condition
            x = x + nn.Dense(x.shape[-1], use_bias=False, name="cond_proj")(condition)
        x = nn.Dense(self.features, name="linear_2")(ACTIVATIONS[self.act](nn.Dense(self.features, name="linear_1")(x)))
        return x if self.post_act is None else ACTIVATIONS[self.post_act](x)


class AttentionPooling(nn.Module):
    """Attention of the mean token, moved by a learned embedding, to itself and all tokens."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        d = x.shape[-1]
        moved = self.param("positional_embedding", nn.initializers.normal(d**-0.5), (1, d), jnp.float32)
        token = x.mean(1, keepdims=True) + moved[None].astype(x.dtype)
        x = jnp.concatenate([token, x], axis=1)
        q, k, v = (nn.Dense(d, name=name)(y) for name, y in (("q_proj", token), ("k_proj", x), ("v_proj", x)))
        return attend(q, k, v, self.heads)[:, 0]


class TextTimeEmbedding(nn.Module):
    """The text pooled to one vector that is added to the time embedding."""

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b e"]:
        x = AttentionPooling(self.heads, name="pool")(layer_norm("norm1")(x))
        return layer_norm("norm2")(nn.Dense(self.features, name="proj")(x))
