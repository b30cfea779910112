"""The diffusion transformer of diffusers' `DiTTransformer2DModel`, in Flax linen and NHWC.

A latent is cut into patches, each patch is a token, and every block is a transformer block whose norms are scaled, shifted and gated by
the time and the class (adaLN-Zero). With c = e_t + e_y, both of the block's own embedders,

    (beta_1, gamma_1, a_1, beta_2, gamma_2, a_2) = W SiLU(c) + b                                                    (1)
    x <- x + a_1 Attention((1 + gamma_1) LN(x) + beta_1)                                                            (2)
    x <- x + a_2 MLP((1 + gamma_2) LN(x) + beta_2).                                                                 (3)

Module names follow the original's state dict with `.N` written `_N`. What look-alikes do otherwise is spelt out where it happens: the
epsilons of the two norms, the order of sine and cosine, and that the last layer reads the first block's c.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._blocks import NORM_EPS, Block, Patches, modulate, norm, timestep_embedding

ACTIVATIONS = ("gelu", "gelu-approximate", "geglu")


class DiT(nn.Module):
    """diffusers' `DiTTransformer2DModel`: a transformer over the patches of a latent. Fields carry the names of its `config.json`.

    With D = num_attention_heads * attention_head_dim, the args of the call:
        x: latents, `[B, H, W, in_channels]`; H and W multiples of `patch_size`. `sample_size` is the trained resolution; positions are
            stretched to any other. The original answers square latents alone.
        t: the training step as a number, scalar or `[B]`; differentiable.
        class_labels: integer labels below `num_embeds_ada_norm + 1`, scalar or `[B]`, the last the null class of classifier-free guidance;
            or the embedding itself as floats, which a gradient in the conditioning differentiates: `[D]` or `[B, D]` for all blocks alike, or
            `[B, num_layers, D]`, since each block has a table of its own. In the published weights all tables are equal.
        deterministic: False draws the dropout, with the rng "dropout". Labels are never dropped at random: the caller gives the null class.

    Returns `[B, H, W, out_channels]`: the prediction, and where `out_channels = 2 in_channels` the variance's interpolation after it.
    Raises ValueError for a shape, an activation or labels that do not fit.
    Reference: Peebles and Xie, Scalable diffusion models with transformers (2023), section 3.2; names and options of diffusers' class.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    remat: bool = False

    @property
    def embedding_dim(self) -> int:
        """Width of the tokens and of the class embeddings."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def dummy_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract arguments of a call, as small as can be."""
        x = jax.ShapeDtypeStruct((1, self.patch_size, self.patch_size, self.in_channels), jnp.float32)
        return x, jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def _check(self, x: Array) -> None:
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(f"DiT takes x of shape [B, H, W, {self.in_channels}], H and W multiples of {self.patch_size}; got {x.shape}.")
        if self.activation_fn not in ACTIVATIONS:
            raise ValueError(f"activation_fn={self.activation_fn!r} is not known: use one of {list(ACTIVATIONS)}.")
        if self.embedding_dim % 4:
            raise ValueError(f"num_attention_heads * attention_head_dim must be a multiple of 4, for the positions; got {self.embedding_dim}.")

    def _labels(self, labels: Any, x: Array) -> list[Array]:
        """What each block's embedder is given: integers `[B]`, or floats `[B, D]`."""
        if labels is None:
            raise ValueError(f"This DiT is conditional: give class_labels, the null class being {self.num_embeds_ada_norm}.")
        labels, batch, dim = jnp.asarray(labels), x.shape[0], self.embedding_dim
        if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape in ((), (batch,)):
            return [jnp.broadcast_to(labels, (batch,))] * self.num_layers
        if jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape in ((dim,), (batch, dim)):
            return [jnp.broadcast_to(labels, (batch, dim))] * self.num_layers
        if jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == (batch, self.num_layers, dim):
            return [labels[:, i] for i in range(self.num_layers)]
        shapes = f"[{dim}], [{batch}, {dim}] or [{batch}, {self.num_layers}, {dim}]"
        raise ValueError(f"class_labels are integers, one or [{batch}], or embeddings as floats, {shapes}; got {labels.dtype} {labels.shape}.")

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Num[Array, "..."], class_labels: Num[Array, "..."] | int | None = None, deterministic: bool = True
    ) -> Float[Array, "b h w e"]:
        self._check(x)
        (b, height, width, _), p, dim = x.shape, self.patch_size, self.embedding_dim
        labels, channels = self._labels(class_labels, x), self.out_channels or self.in_channels
        # In float32 at least: half precision has no t = 999.5.
        t = jnp.broadcast_to(jnp.asarray(t), (b,)).astype(jnp.promote_types(x.dtype, jnp.float32))
        time = timestep_embedding(t).astype(x.dtype)

        options = {
            "attention": {
                "heads": self.num_attention_heads,
                "head_dim": self.attention_head_dim,
                "bias": self.attention_bias,
                "dropout": self.dropout,
            },
            "feed_forward": {"activation": self.activation_fn, "dropout": self.dropout},
            "affine": self.norm_elementwise_affine,
            "eps": self.norm_eps,
            "deterministic": deterministic,
        }
        block: Any = nn.remat(Block) if self.remat else Block
        conditionings = []
        x = Patches(p, dim, self.sample_size // p, name="pos_embed")(x)
        for i in range(self.num_layers):
            x, c = block(self.num_embeds_ada_norm + 1, **options, name=f"transformer_blocks_{i}")(x, time, labels[i])
            conditionings.append(c)

        shift, scale = jnp.split(nn.Dense(2 * dim, name="proj_out_1")(nn.silu(conditionings[0])), 2, axis=-1)
        x = nn.Dense(p * p * channels, name="proj_out_2")(modulate(norm(NORM_EPS, False, "norm_out")(x), shift, scale))
        x = x.reshape(b, height // p, width // p, p, p, channels)
        return jnp.swapaxes(x, 2, 3).reshape(b, height, width, channels)
