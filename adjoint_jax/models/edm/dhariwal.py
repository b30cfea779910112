"""ADM as EDM has it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Num

from ._blocks import Style, conv, norm
from ._inputs import check, conditionings, dummy_inputs, kept, positional, sinusoids, times
from ._layers import Decoder, Encoder, decoder_layers, encoder_layers


class DhariwalUNet(nn.Module):
    """The raw network F of ADM in EDM's layout; `aj.load` preconditions it. Fields carry the names of the original's options.

    Heads of attention are 64 channels wide: a level of fewer channels has none, the middle included.

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
    Reference: Karras et al. 2022, appendix F.2; Dhariwal & Nichol 2021, section 3.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)
    dropout: float = 0.10
    label_dropout: float = 0.0
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

    def _embedding(self, t: Any, cond: Any, x: Array, deterministic: bool) -> Array:
        labels, augment = conditionings(self, cond, x)
        t = times(t, x)
        emb = sinusoids(t, positional(self.model_channels, False, t.dtype), sines_first=False).astype(x.dtype)
        if augment is not None:
            emb = emb + nn.Dense(self.model_channels, use_bias=False, name="map_augment")(augment)
        features = self.model_channels * self.channel_mult_emb
        emb = nn.Dense(features, name="map_layer1")(nn.silu(nn.Dense(features, name="map_layer0")(emb)))
        if labels is not None:
            emb = emb + nn.Dense(features, use_bias=False, name="map_label")(kept(labels, self, self.label_dropout, deterministic))
        return nn.silu(emb)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], t: Num[Array, "..."], cond: Any = None, deterministic: bool = True) -> Float[Array, "b h w e"]:
        check(self, x)
        style = Style(1e-5, 1.0, True, (1, 1), projected=False, head_width=64, dropout=self.dropout)
        emb = self._embedding(t, cond, x, deterministic)
        first = self.model_channels * self.channel_mult[0]
        x, skips = Encoder(encoder_layers(self, first), style, self.remat, name="enc")(x, emb, deterministic)
        x, _ = Decoder(decoder_layers(self, True), style, self.remat, name="dec")(x, skips, emb, deterministic)
        return conv(self.out_channels, 3, "out_conv")(nn.silu(norm(x, style.eps, "out_norm")))
