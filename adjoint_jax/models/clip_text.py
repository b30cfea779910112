"""The text encoder of CLIP, transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`, in Flax linen.

Names of submodules follow the original's files, with `layers.N` written `layers_N`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(nn.gelu, approximate=False)}
LEGACY_EOS = 2


class CLIPTextOutput(NamedTuple):
    """What `CLIPText` returns, for B texts of T tokens.

    Fields:
        last_hidden_state: `[B, T, D]`, the final layer norm of `hidden_states[-1 - clip_skip]`. Stable Diffusion 1 and 2 condition on it.
        pooled: `[B, D]`, the final layer norm of `hidden_states[-1]` at the end-of-text token; before the projection.
        text_embeds: `[B, projection_dim]`, its projection; None without one.
        hidden_states: the embeddings and the output of each layer, before the final layer norm. SDXL and Stable Diffusion 3 condition on
            `hidden_states[-2]`, or with diffusers' `clip_skip=n` on `hidden_states[-2 - n]`.
    """

    last_hidden_state: Array
    pooled: Array
    text_embeds: Array | None
    hidden_states: tuple[Array, ...]


class Attention(nn.Module):
    """Self-attention; where it is causal, a token sees itself and those before it."""

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        q, k, v = (nn.Dense(d, name=name)(x).reshape(b, t, self.heads, d // self.heads) for name in ("q_proj", "k_proj", "v_proj"))
        return nn.Dense(d, name="out_proj")(jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(x.shape))


class MLP(nn.Module):
    """Two dense layers with an activation between."""

    features: int
    act: str

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return nn.Dense(x.shape[-1], name="fc2")(ACTIVATIONS[self.act](nn.Dense(self.features, name="fc1")(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    heads: int
    features: int
    act: str
    eps: float
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x + Attention(self.heads, self.causal, name="self_attn")(normed(self.eps, "layer_norm1")(x))
        return x + MLP(self.features, self.act, name="mlp")(normed(self.eps, "layer_norm2")(x))


def normed(eps: float, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


class Embeddings(nn.Module):
    """Token embeddings, looked up or given, plus those of the positions."""

    vocab_size: int
    positions: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], given: Float[Array, "b t d"] | None) -> Float[Array, "b t d"]:
        tokens = nn.Embed(self.vocab_size, self.features, name="token_embedding").embedding  # read: the parameter is always made
        places = nn.Embed(self.positions, self.features, name="position_embedding").embedding
        x = jnp.take(tokens, ids, axis=0) if given is None else given
        return x + places[None, : ids.shape[1]].astype(x.dtype)


class Encoder(nn.Module):
    """The layers. Returns the input and the output of each."""

    depth: int
    layer: Mapping[str, Any]
    remat: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Array, ...]:
        block, states = nn.remat(Layer) if self.remat else Layer, [x]
        for i in range(self.depth):
            states.append(block(**self.layer, name=f"layers_{i}")(states[-1]))
        return tuple(states)


class Transformer(nn.Module):
    """Embeddings, layers, final layer norm. Returns the last state and that before `clip_skip` layers, both normed, and all states."""

    embeddings: Mapping[str, Any]
    encoder: Mapping[str, Any]
    eps: float

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], given: Float[Array, "b t d"] | None, clip_skip: int) -> tuple[Array, ...]:
        states = Encoder(**self.encoder, name="encoder")(Embeddings(**self.embeddings, name="embeddings")(ids, given))
        norm = normed(self.eps, "final_layer_norm")
        last = norm(states[-1])
        return last, norm(states[-1 - clip_skip]) if clip_skip else last, *states


class CLIPText(nn.Module):
    """CLIP's text encoder: a causal pre-norm transformer over tokens. Fields carry the names of transformers' `CLIPTextConfig`.

    Args of the call:
        input_ids: token numbers `[B, T]`, T at most `max_position_embeddings`; one of a text is the end-of-text token. A number that is not in
            the vocabulary makes its text's numbers NaN.
        inputs_embeds: None; or floats `[B, T, hidden_size]` in the place of the tokens' embeddings, before the positions are added, in which
            a gradient can be taken. The embeddings of `input_ids` are
            `params["text_model"]["embeddings"]["token_embedding"]["embedding"][input_ids]`; the ids then only say where to pool.
        clip_skip: how many of the last layers `last_hidden_state` leaves out, a static number; diffusers' option for Stable Diffusion 1.

    Returns `CLIPTextOutput`. It is pooled at the first token that is `eos_token_id`, and at the first token of all where there is none; where
    `eos_token_id` is 2, which is how the files of Stable Diffusion say it, at the first of the highest number (49407 in CLIP's vocabulary).
    `with_projection` is the difference of the original's two classes, and no entry of the configuration. No mask of paddings: no diffusion
    model hands one over. `remat`: each layer is computed again in the backward pass.

    Raises ValueError for a shape, dtype or option that does not fit.
    Reference: Radford et al., Learning transferable visual models from natural language supervision (2021), section 2.4; names and options of
    transformers' `CLIPTextModel`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: Any = 49407
    with_projection: bool = False
    remat: bool = False

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)

    def _check(self, ids: Array, given: Array | None, clip_skip: int) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not known: use one of {list(ACTIVATIONS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: choose a divisor.")
        if not isinstance(self.eos_token_id, int):
            raise ValueError(f"eos_token_id={self.eos_token_id!r} is not one number: give that of the end-of-text token.")
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or not 0 < ids.shape[1] <= self.max_position_embeddings:
            raise ValueError(f"CLIPText takes integer tokens [B, T] with T from 1 to {self.max_position_embeddings}; got {ids.dtype} {ids.shape}.")
        if given is not None and (given.shape != (*ids.shape, self.hidden_size) or not jnp.issubdtype(given.dtype, jnp.floating)):
            raise ValueError(f"inputs_embeds are floats {(*ids.shape, self.hidden_size)} beside these input_ids; got {given.dtype} {given.shape}.")
        if not 0 <= clip_skip <= self.num_hidden_layers:
            raise ValueError(f"clip_skip={clip_skip} leaves out more layers than there are, or fewer than none: give 0 to {self.num_hidden_layers}.")

    @nn.compact
    def __call__(self, input_ids: Array, inputs_embeds: Array | None = None, clip_skip: int = 0) -> CLIPTextOutput:
        self._check(input_ids, inputs_embeds, clip_skip)
        eps = self.layer_norm_eps
        layer = {"heads": self.num_attention_heads, "features": self.intermediate_size, "act": self.hidden_act, "eps": eps}
        encoder = {"depth": self.num_hidden_layers, "layer": layer, "remat": self.remat}
        embeddings = {"vocab_size": self.vocab_size, "positions": self.max_position_embeddings, "features": self.hidden_size}
        final, last, *states = Transformer(embeddings, encoder, eps, name="text_model")(input_ids, inputs_embeds, clip_skip)
        # argmax of booleans is the first that is true
        place = jnp.argmax(input_ids if self.eos_token_id == LEGACY_EOS else input_ids == self.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(final, place[:, None, None], axis=1)[:, 0]
        projected = nn.Dense(self.projection_dim, use_bias=False, name="text_projection")(pooled) if self.with_projection else None
        return CLIPTextOutput(last, pooled, projected, tuple(states))
