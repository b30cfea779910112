"""The levels of a UNet: `stage(x, image, temb, deterministic, skips) -> x, image, outputs`.

`skips` are the outputs of the way down that a stage on the way up takes, in the order in which it takes them. `image` is the picture that NCSN++
carries beside its features, resized with them and read on the way down, summed up on the way up; other stages leave it alone.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from ._layers import Attention, Resize, ResnetBlock, _conv, _norm, fir_down, fir_up

Answer = tuple[Array, Array | None, list[Array]]


def _blocks(remat: bool) -> tuple[type[ResnetBlock], type[Attention]]:
    """The classes of the blocks, recomputed in the backward pass where `remat` says so; `deterministic` is argument 3, counting self."""
    return (nn.remat(ResnetBlock, static_argnums=(3,)), nn.remat(Attention)) if remat else (ResnetBlock, Attention)


class Stage(nn.Module):
    """Residual blocks, each after a skip (going up) and before attention (but for the last `bare`), then a change of resolution.

    `resize` is "down", "up" or none, by a convolution (`Resize`) or, with `by_resnet`, by a residual block.
    """

    layers: int
    resnet: dict[str, Any]
    attention: dict[str, Any] | None
    resize: str = ""
    by_resnet: bool = False
    padding: int = 1
    bare: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, image: Array | None, temb: Array, deterministic: bool, skips: Sequence[Array] = ()) -> Answer:
        resnet, attention = _blocks(self.remat)
        outputs = []
        for i in range(self.layers):
            x = jnp.concatenate([x, skips[i]], axis=-1) if skips else x
            x = resnet(**self.resnet, name=f"resnets_{i}")(x, temb, deterministic)
            if self.attention is not None and i < self.layers - self.bare:
                x = attention(**self.attention, name=f"attentions_{i}")(x)
            outputs.append(x)
        if self.resize:
            name = f"{self.resize}samplers_0"
            if self.by_resnet:
                x = resnet(**self.resnet, resample=self.resize, name=name)(x, temb, deterministic)
            else:
                x = Resize(self.resnet["features"], up=self.resize == "up", padding=self.padding, name=name)(x)
            outputs.append(x)
        return x, image, outputs


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


class SkipDownStage(nn.Module):
    """NCSN++ going down: residual blocks with attention or none; the last filters and halves, and a 1x1 convolution adds the filtered image."""

    layers: int
    resnet: dict[str, Any]
    attention: dict[str, Any] | None
    resize: str = ""
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, image: Array, temb: Array, deterministic: bool, skips: Sequence[Array] = ()) -> Answer:
        resnet, attention = _blocks(self.remat)
        features = self.resnet["features"]
        outputs = []
        for i in range(self.layers):
            options = {**self.resnet, "groups": _groups(x.shape[-1]), "groups_out": _groups(features)}
            x = resnet(**options, name=f"resnets_{i}")(x, temb, deterministic)
            x = x if self.attention is None else attention(**self.attention, name=f"attentions_{i}")(x)
            outputs.append(x)
        if self.resize:
            options = {**self.resnet, "groups": _groups(features), "resample": "fir_down", "shortcut": True}
            x = resnet(**options, name="resnet_down")(x, temb, deterministic)
            image = fir_down(image)
            x = _conv(features, 1, "skip_conv", padding=0)(image) + x
            outputs.append(x)
        return x, image, outputs


class SkipUpStage(nn.Module):
    """NCSN++ going up: residual blocks, one attention or none; then what this level adds to the filtered image, and a block that doubles."""

    layers: int
    resnet: dict[str, Any]
    attention: dict[str, Any] | None
    resize: str = ""
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, image: Array | None, temb: Array, deterministic: bool, skips: Sequence[Array]) -> Answer:
        resnet, attention = _blocks(self.remat)
        features, eps = self.resnet["features"], self.resnet["eps"]
        for i, skip in enumerate(skips):
            # With attention the original divides the width of the skip alone by four.
            groups = _groups(x.shape[-1] + skip.shape[-1]) if self.attention is None else min(x.shape[-1] + skip.shape[-1] // 4, 32)
            options = {**self.resnet, "groups": groups, "groups_out": _groups(features)}
            x = resnet(**options, name=f"resnets_{i}")(jnp.concatenate([x, skip], axis=-1), temb, deterministic)
        x = x if self.attention is None else attention(**self.attention, name="attentions_0")(x)
        image = None if image is None else fir_up(image)
        if self.resize:
            added = _conv(3, 3, "skip_conv")(nn.silu(_norm(_groups(features), eps, "skip_norm")(x)))
            image = added if image is None else image + added
            options = {**self.resnet, "groups": _groups(features), "resample": "fir_up", "shortcut": True}
            x = resnet(**options, name="resnet_up")(x, temb, deterministic)
        return x, image, []
