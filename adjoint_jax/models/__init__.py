"""Flax networks, one self-contained file a family. They know nothing of the sampler."""

from .autoencoder_kl import AutoencoderKL as AutoencoderKL, decode_tiled as decode_tiled
from .classifier import ConvClassifier as ConvClassifier
from .clip_text import CLIPText as CLIPText
from .unet2d import UNet2D as UNet2D
from .unet2d_condition import UNet2DCondition as UNet2DCondition
