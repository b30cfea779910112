"""Flax networks, one self-contained file a family. They know nothing of the sampler."""

from .classifier import ConvClassifier as ConvClassifier
from .unet2d import UNet2D as UNet2D
from .unet2d_condition import UNet2DCondition as UNet2DCondition
