"""Flax networks, one self-contained file a family. They know nothing of the sampler."""

from .classifier import ConvClassifier as ConvClassifier
from .edm import DhariwalUNet as DhariwalUNet, SongUNet as SongUNet
from .unet2d import UNet2D as UNet2D
