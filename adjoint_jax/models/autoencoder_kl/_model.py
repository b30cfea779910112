"""Images to latents and back. The names of submodules follow the original's state dict, with `.N` of a list written `_N`."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._blocks import ACTIVATIONS, Half

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
LOW, HIGH = -30.0, 20.0  # of the logarithm of the variance


class AutoencoderKL(nn.Module):
    """diffusers' `AutoencoderKL`: a convolutional variational autoencoder, that of Stable Diffusion 1 to 3, SDXL and Flux.

    Fields carry the names of its `config.json`. Images are `[B, H, W, in_channels]` in [-1, 1], latents `[B, H/f, W/f, latent_channels]`
    with f = 2^(levels - 1). There are two scales of latents: *z*, the autoencoder's own, and *x*, that of the diffusion model,

        x = (z - shift_factor) scaling_factor                    (`to_latents`; no shift where it is None)
        x = (z - latents_mean) scaling_factor / latents_std      (where these two, a number a channel, are given)
        z = the inverse                                          (`from_latents`)

    Methods, by `module.apply({"params": params}, argument, method="encode")`:
        encode(images): the mean of z and the logarithm of its variance, the latter within [-30, 20].
        decode(z): images.
        to_latents(z), from_latents(x): without parameters, `module.to_latents(z)`. z may be the mean or a draw, mean + exp(logvar / 2) noise.
    The call is decode(mean of encode(images)). `decode_tiled` decodes in the memory of one tile.

    `force_upcast` says that the original's pipelines run this network in float32 where everything else is float16, in which some published
    weights overflow. The module computes in the dtype of its argument and parameters, whatever it says.
    `remat`: each residual block and attention is computed again in the backward pass.

    Raises ValueError for a shape or an option that does not fit.
    Reference: Rombach et al., High-resolution image synthesis with latent diffusion models (2022), sections 3.1 and appendix G; Kingma and
    Welling, Auto-encoding variational Bayes (2014); names and options of diffusers' `AutoencoderKL`.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    remat: bool = False

    @property
    def factor(self) -> int:
        """How many times an image is larger than its latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        return (jax.ShapeDtypeStruct((1, self.factor, self.factor, self.in_channels), jnp.float32),)

    def _check(self) -> None:
        levels = len(self.block_out_channels)
        for kinds, known in ((self.down_block_types, DOWN_BLOCKS), (self.up_block_types, UP_BLOCKS)):
            if unknown := sorted(set(kinds) - set(known)):
                raise ValueError(f"AutoencoderKL does not know the block types {unknown}: it knows {list(known)}.")
            if len(kinds) != levels:
                raise ValueError(f"{len(kinds)} block types {list(kinds)} for {levels} block_out_channels: give one a level.")
        if self.act_fn.lower() not in ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} is not known: use one of {list(ACTIVATIONS)}.")
        if odd := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            raise ValueError(f"norm_num_groups={self.norm_num_groups} does not divide the block_out_channels {odd}: choose a common divisor.")

    def _check_shape(self, x: Array, what: str, channels: int, multiple: int = 1) -> None:
        if x.ndim != 4 or x.shape[3] != channels or x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(f"AutoencoderKL takes {what} of shape [B, H, W, {channels}], H and W multiples of {multiple}; got {x.shape}.")

    def setup(self) -> None:
        self._check()
        shared = {
            "groups": self.norm_num_groups,
            "act_fn": self.act_fn.lower(),
            "mid_attention": self.mid_block_add_attention,
            "remat": self.remat,
        }
        widths, layers = tuple(self.block_out_channels), self.layers_per_block
        down, up = (tuple(kind.startswith("Attn") for kind in kinds) for kinds in (self.down_block_types, self.up_block_types))
        self.encoder = Half(2 * self.latent_channels, widths, down, layers, up=False, **shared)
        self.decoder = Half(self.out_channels, widths[::-1], up, layers + 1, up=True, **shared)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1)) if self.use_quant_conv else None
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1)) if self.use_post_quant_conv else None

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 e"], Float[Array, "b h2 w2 e"]]:
        """The mean of z and the logarithm of its variance."""
        self._check_shape(x, "images", self.in_channels, self.factor)
        moments = self.encoder(x)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, LOW, HIGH)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Images of z."""
        self._check_shape(z, "latents", self.latent_channels)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        return self.decode(self.encode(x)[0])

    @nn.nowrap
    def _affine(self, like: Array) -> tuple[Any, Any]:
        """(m, s) of x = (z - m) s."""
        self._check_shape(like, "latents", self.latent_channels)
        if self.latents_mean is None and self.latents_std is None:
            return self.shift_factor or 0.0, self.scaling_factor
        if self.latents_mean is None or self.latents_std is None or self.shift_factor:
            raise ValueError(
                f"latents_mean={self.latents_mean}, latents_std={self.latents_std} and shift_factor={self.shift_factor} do not go together: "
                "give the first two, or the last, or none."
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
            raise ValueError(
                f"latents_mean and latents_std are of {len(self.latents_mean)} and {len(self.latents_std)} numbers: give {like.shape[3]}."
            )
        mean, std = (jnp.asarray(values, like.dtype).reshape(1, 1, 1, -1) for values in (self.latents_mean, self.latents_std))
        return mean, self.scaling_factor / std

    @nn.nowrap
    def to_latents(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x, what the diffusion model sees, of the autoencoder's own z."""
        mean, scale = self._affine(z)
        return (z - mean) * scale

    @nn.nowrap
    def from_latents(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """z, which `decode` takes, of what the diffusion model made."""
        mean, scale = self._affine(x)
        return x / scale + mean
