"""The image encoder of CLIP, transformers' `CLIPVisionModel` and `CLIPVisionModelWithProjection`, and both towers, `CLIPModel`, in Flax linen.

Its layers are those of `clip_text`. Names of submodules follow the original's files, with `layers.N` written `layers_N`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .clip_text import ACTIVATIONS, CLIPText, Encoder, normed

MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the data that OpenAI trained on, pixels in [0, 1]: mean and standard deviation of each channel."""


class CLIPVisionOutput(NamedTuple):
    """What `CLIPVision` returns, for B images of P patches.

    Fields:
        last_hidden_state: `[B, 1 + P, D]`, `hidden_states[-1]`, the class token first.
        pooled: `[B, D]`, the final layer norm of its class token; before the projection.
        image_embeds: `[B, projection_dim]`, its projection; None without one.
        hidden_states: the normed embeddings and the output of each layer.
    """

    last_hidden_state: Array
    pooled: Array
    image_embeds: Array | None
    hidden_states: tuple[Array, ...]


class CLIPOutput(NamedTuple):
    """What `CLIP` returns, for B texts and I images: the embeddings, of norm 1, and exp(logit_scale) times their cosines.

    Fields:
        text_embeds: `[B, projection_dim]`.
        image_embeds: `[I, projection_dim]`.
        logits_per_image: `[I, B]`.
    """

    text_embeds: Array
    image_embeds: Array
    logits_per_image: Array


class Patches(nn.Module):
    """A class token and the embeddings of the patches, plus those of the positions."""

    features: int
    patch: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        first = self.param("class_embedding", nn.initializers.normal(), (self.features,))
        size = (self.patch, self.patch)
        x = nn.Conv(self.features, size, size, padding="VALID", use_bias=False, name="patch_embedding")(pixels)
        x = x.reshape(len(x), -1, self.features)
        x = jnp.concatenate([jnp.broadcast_to(first.astype(x.dtype), (len(x), 1, self.features)), x], axis=1)
        places = nn.Embed(x.shape[1], self.features, name="position_embedding").embedding
        return x + places[None].astype(x.dtype)


class Tower(nn.Module):
    """Embeddings, a norm, layers. Returns all states, and the norm of the last one's class token."""

    embeddings: Mapping[str, Any]
    encoder: Mapping[str, Any]
    eps: float

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> tuple[tuple[Array, ...], Array]:
        x = normed(self.eps, "pre_layrnorm")(Patches(**self.embeddings, name="embeddings")(pixels))
        states = Encoder(**self.encoder, name="encoder")(x)
        return states, normed(self.eps, "post_layernorm")(states[-1][:, 0])


class CLIPVision(nn.Module):
    """CLIP's image encoder: a pre-norm transformer over patches. Fields carry the names of transformers' `CLIPVisionConfig`.

    The call maps pixels `[B, image_size, image_size, num_channels]`, of the mean 0 and standard deviation 1 of CLIP's data
    (`experiments.metrics.prepared`), to `CLIPVisionOutput`. `with_projection` is the difference of the original's two classes, and no entry of
    the configuration. `remat`: each layer is computed again in the backward pass.

    Raises ValueError for a shape, dtype or option that does not fit.
    Reference: Radford et al., Learning transferable visual models from natural language supervision (2021), section 2.4; names and options of
    transformers' `CLIPVisionModel`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    with_projection: bool = False
    remat: bool = False

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        return (jax.ShapeDtypeStruct((1, self.image_size, self.image_size, self.num_channels), jnp.float32),)

    def _check(self, pixels: Array) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not known: use one of {list(ACTIVATIONS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: choose a divisor.")
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size={self.patch_size} is not between 1 and image_size={self.image_size}: choose one that is.")
        wanted = self.dummy_inputs[0].shape[1:]
        if pixels.ndim != 4 or pixels.shape[1:] != wanted or not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ValueError(f"CLIPVision takes floats [B, {', '.join(map(str, wanted))}]; got {pixels.dtype} {pixels.shape}: resize the images.")

    @nn.compact
    def __call__(self, pixels: Array) -> CLIPVisionOutput:
        self._check(pixels)
        eps = self.layer_norm_eps
        layer = {"heads": self.num_attention_heads, "features": self.intermediate_size, "act": self.hidden_act, "eps": eps, "causal": False}
        encoder = {"depth": self.num_hidden_layers, "layer": layer, "remat": self.remat}
        states, pooled = Tower({"features": self.hidden_size, "patch": self.patch_size}, encoder, eps, name="vision_model")(pixels)
        projected = nn.Dense(self.projection_dim, use_bias=False, name="visual_projection")(pooled) if self.with_projection else None
        return CLIPVisionOutput(states[-1], pooled, projected, states)


class CLIP(nn.Module):
    """Both towers, transformers' `CLIPModel`; the fields `text` and `vision` are its `text_config` and `vision_config`, with projections.

    The call maps tokens `[B, T]` and pixels `[I, image_size, image_size, num_channels]` to `CLIPOutput`; of one tower alone,
    `method="encode_text"` gives `CLIPTextOutput` and `method="encode_image"` `CLIPVisionOutput`. Parameters lie where those of the towers lie,
    without a name of the tower, so that each tower takes the whole tree: `clip.vision.apply({"params": params}, pixels)`.

    Raises ValueError for towers without projection or of another `projection_dim`, and what they raise.
    """

    text: CLIPText = CLIPText(with_projection=True)
    vision: CLIPVision = CLIPVision(with_projection=True)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        return *self.text.dummy_inputs, *self.vision.dummy_inputs

    def setup(self) -> None:
        for tower in (self.text, self.vision):
            if not tower.with_projection or tower.projection_dim != self.projection_dim:
                raise ValueError(f"CLIP's towers project to projection_dim={self.projection_dim}; got {tower}: give both with_projection and that.")
            nn.share_scope(self, tower)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init_value), ())

    def encode_text(self, *arguments: Any) -> Any:
        """`CLIPText` of the same arguments."""
        return self.text(*arguments)

    def encode_image(self, pixels: Array) -> CLIPVisionOutput:
        """`CLIPVision` of the same argument."""
        return self.vision(pixels)

    def __call__(self, input_ids: Array, pixels: Array) -> CLIPOutput:
        text, image = self.text(input_ids).text_embeds, self.vision(pixels).image_embeds
        text, image = (each / jnp.sqrt(jnp.sum(each**2, axis=-1, keepdims=True)) for each in (text, image))
        return CLIPOutput(text, image, jnp.exp(self.logit_scale) * image @ text.T)
