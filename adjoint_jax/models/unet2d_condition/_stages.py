"""One resolution of `UNet2DCondition`."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from ._layers import AddedAttention, Resize, ResnetBlock, Transformer


class Stage(nn.Module):
    """Residual blocks, each after a skip (going up) and before attention to the text (but for the last `bare`), then a change of resolution.

    Fields:
        resnet: options of the residual blocks.
        attention: options of `AddedAttention` or, where `depths` are given, of `Transformer`s of these depths.
        resize: "down" or "up" by a convolution, "resnet down" or "resnet up" by a residual block.
        padding: of the convolution going down.
    """

    layers: int
    resnet: dict[str, Any]
    attention: dict[str, Any] | None = None
    depths: Sequence[int] = ()
    resize: str = ""
    padding: int = 1
    bare: int = 0
    remat: bool = False

    def _attention(self, i: int) -> nn.Module:
        options, name = self.attention or {}, f"attentions_{i}"
        if self.depths:
            return Transformer(depth=self.depths[i], **options, remat=self.remat, name=name)
        return (nn.remat(AddedAttention) if self.remat else AddedAttention)(**options, name=name)

    @nn.compact
    def __call__(self, x: Array, temb: Array, text: Array | None, bias: Array | None, skips: list[Array] | None = None) -> tuple[Array, list[Array]]:
        """The result and, for the way up, what comes before it; takes its own from the end of `skips`, of which the next gives the size going up."""
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        outputs = []
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block(**self.resnet, name=f"resnets_{i}")(x, temb)
            if self.attention is not None and i < self.layers - self.bare:
                x = self._attention(i)(x, text, bias)
            outputs.append(x)
        way = self.resize.removeprefix("resnet ")
        if self.resize != way:
            x = block(**self.resnet, resample=way, name=f"{way}samplers_0")(x, temb)
        elif way == "up":
            height, width = (skips or [x])[-1].shape[1:3]
            x = Resize(self.resnet["features"], name="upsamplers_0")(x, (height, width))
        elif way == "down":
            x = Resize(self.resnet["features"], self.padding, name="downsamplers_0")(x)
        return x, [*outputs, x] if way == "down" else outputs
