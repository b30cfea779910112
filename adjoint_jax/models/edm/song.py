"""DDPM++ and NCSN++ as EDM has them."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ._blocks import Style
from ._inputs import check, conditionings, dummy_inputs, kept, positional, sinusoids, times
from ._layers import Decoder, Encoder, decoder_layers, encoder_layers

CHOICES = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "skip", "residual"), "decoder_type": ("standard", "skip")}


class SongUNet(nn.Module):
    """The raw network F of DDPM++ and NCSN++ in EDM's layout; `aj.load` preconditions it. Fields carry the names of the original's options.

    DDPM++ is the default; NCSN++ is embedding_type "fourier", channel_mult_noise 2, encoder_type "residual" and resample_filter (1, 3, 3, 1).

    Args of the call:
        x: scaled images c_in(sigma) x, `[B, H, W, in_channels]`; H and W divisible by 2^(levels - 1).
        t: c_noise(sigma), scalar or `[B]`: log(sigma)/4 under EDM's preconditioning.
        cond: None; class labels, integers, scalar or `[B]` (one out of range gives NaN), or one-hot or any other floats, `[label_dim]` or
            `[B, label_dim]`; or a dict with any of "class_labels" and "augment_labels", floats `[augment_dim]` or `[B, augment_dim]`.
            Labels left out are zeros, which is what the original means by no class.
        deterministic: False drops activations and class labels by the "dropout" key.

    Returns F, `[B, H, W, out_channels]`.
    Raises ValueError for a shape, option or label that does not fit.
    The preconditioning changes nothing here, `aj.load` reads it: `precond` "edm" with `sigma_data`, "vp" with `beta_d`, `beta_min` and `M`, or "ve".
    The Fourier frequencies `map_noise/freqs` are constants of the file, without gradient; keep them in float32 where the rest is half precision.
    Reference: Karras et al. 2022, appendix F.2; Song et al. 2021, appendix H.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[float] = (1, 1)
    precond: str | None = None
    sigma_data: float = 0.5
    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    remat: bool = False

    @property
    def dummy_inputs(self) -> tuple[Any, ...]:
        """Abstract arguments of a call, as small as can be."""
        return dummy_inputs(self)

    def _check(self, x: Array) -> None:
        check(self, x)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use one of {list(known)}.")
        if len(self.resample_filter) % 2 or sum(self.resample_filter) == 0:
            raise ValueError(f"resample_filter={self.resample_filter} must have an even number of taps, not of sum 0: (1, 1), (1, 3, 3, 1), ...")

    def _embedding(self, t: Any, cond: Any, x: Array, deterministic: bool) -> Array:
        labels, augment = conditionings(self, cond, x)
        width, t = self.model_channels * self.channel_mult_noise, times(t, x)
        if self.embedding_type == "positional":
            frequencies = positional(width, True, t.dtype)
        else:
            frequencies = 2 * math.pi * jax.lax.stop_gradient(_Frequencies(width // 2, name="map_noise")()).astype(t.dtype)
        emb = sinusoids(t, frequencies, sines_first=True).astype(x.dtype)
        if labels is not None:
            labels = kept(labels, self, self.label_dropout, deterministic)
            emb = emb + nn.Dense(width, name="map_label")(labels * math.sqrt(self.label_dim))
        if augment is not None:
            emb = emb + nn.Dense(width, use_bias=False, name="map_augment")(augment)
        features = self.model_channels * self.channel_mult_emb
        return nn.silu(nn.Dense(features, name="map_layer1")(nn.silu(nn.Dense(features, name="map_layer0")(emb))))

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Num[Array, "..."], cond: Any = None, deterministic: bool = True) -> Float[Array, "b h w e"]:
        self._check(x)
        style = Style(1e-6, math.sqrt(0.5), False, tuple(self.resample_filter), projected=True, head_width=None, dropout=self.dropout)
        outputs = tuple(range(len(self.channel_mult))) if self.decoder_type == "skip" else (0,)
        emb = self._embedding(t, cond, x, deterministic)
        x, skips = Encoder(encoder_layers(self, self.model_channels, self.encoder_type), style, self.remat, name="enc")(x, emb, deterministic)
        _, image = Decoder(decoder_layers(self, False, outputs), style, self.remat, name="dec")(x, skips, emb, deterministic)
        return image


class _Frequencies(nn.Module):
    """The constants of the Fourier embedding, drawn once before training."""

    features: int

    @nn.compact
    def __call__(self) -> Float[Array, " k"]:
        return self.param("freqs", nn.initializers.normal(16.0), (self.features,), jnp.float32)
