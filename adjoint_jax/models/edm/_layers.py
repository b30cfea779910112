"""Encoder and decoder as lists of layers, which both networks share: what stands at which resolution, and under which name."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from ._blocks import Block, Style, conv, downsample, norm, upsample


class Layer(NamedTuple):
    """An entry of the encoder or decoder: "conv", a block ("block", "down", "up", "join" after a skip), or an "aux" of the side branch."""

    name: str
    kind: str
    features: int
    attention: bool = False


def encoder_layers(module: Any, first: int, aux: str = "standard") -> tuple[Layer, ...]:
    """The encoder of a network whose first convolution has `first` channels; `aux` is the encoder_type."""
    layers, width = [], first
    for level, multiple in enumerate(module.channel_mult):
        side = module.img_resolution >> level
        name = f"{side}x{side}"
        if level == 0:
            layers.append(Layer(f"{name}_conv", "conv", first))
        else:
            layers.append(Layer(f"{name}_down", "down", width))
            if aux != "standard":
                layers.append(Layer(f"{name}_aux_{aux}", f"aux_{aux}", width))
        width = module.model_channels * multiple
        layers += [Layer(f"{name}_block{i}", "block", width, side in module.attn_resolutions) for i in range(module.num_blocks)]
    return tuple(layers)


def decoder_layers(module: Any, attends_every: bool, outputs: tuple[int, ...] = ()) -> tuple[Layer, ...]:
    """The decoder, attention after every block or after the last of a resolution; the levels of `outputs` add to the image."""
    layers, width = [], module.model_channels * module.channel_mult[-1]
    for level in reversed(range(len(module.channel_mult))):
        side = module.img_resolution >> level
        name = f"{side}x{side}"
        if level == len(module.channel_mult) - 1:
            layers += [Layer(f"{name}_in0", "block", width, True), Layer(f"{name}_in1", "block", width)]
        else:
            layers.append(Layer(f"{name}_up", "up", width))
        width = module.model_channels * module.channel_mult[level]
        attends = [side in module.attn_resolutions and (attends_every or i == module.num_blocks) for i in range(module.num_blocks + 1)]
        layers += [Layer(f"{name}_block{i}", "join", width, attention) for i, attention in enumerate(attends)]
        if level in outputs:
            layers.append(Layer(f"{name}_aux", "aux_out", module.out_channels))
    return tuple(layers)


def _block(half: Any, name: str, kind: str, features: int, attention: bool) -> nn.Module:
    block = nn.remat(Block, static_argnums=(3,)) if half.remat else Block
    return block(features, half.style, kind if kind in ("down", "up") else "", attention, name=name)


class Encoder(nn.Module):
    """Layers going down; returns the state and the skips."""

    layers: tuple[Layer, ...]
    style: Style
    remat: bool

    @nn.compact
    def __call__(self, x: Array, emb: Array, deterministic: bool) -> tuple[Array, list[Array]]:
        skips: list[Array] = []
        aux, taps = x, self.style.taps
        for name, kind, features, attention in self.layers:
            if kind == "aux_skip":
                aux = downsample(aux, taps)
                x = skips[-1] = x + conv(features, 1, name)(aux)
            elif kind == "aux_residual":
                # The original filters after this convolution, and pads once for both: the convolution goes beyond the image.
                wide = conv(features, 3, name, padding=len(taps) // 2)(aux)
                x = skips[-1] = aux = (x + downsample(wide, taps, padding=0)) / math.sqrt(2)
            else:
                x = conv(features, 3, name)(x) if kind == "conv" else _block(self, name, kind, features, attention)(x, emb, deterministic)
                skips.append(x)
        return x, skips


class Decoder(nn.Module):
    """Layers going up; returns the state and the sum of the images on the way, if any."""

    layers: tuple[Layer, ...]
    style: Style
    remat: bool

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], emb: Array, deterministic: bool) -> tuple[Array, Any]:
        skips, image = list(skips), None
        for name, kind, features, attention in self.layers:
            if kind == "aux_out":
                out = conv(features, 3, f"{name}_conv")(nn.silu(norm(x, self.style.eps, f"{name}_norm")))
                image = out if image is None else upsample(image, self.style.taps) + out
                continue
            if kind == "join":
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = _block(self, name, kind, features, attention)(x, emb, deterministic)
        return x, image
