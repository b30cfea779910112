"""Flax networks, one self-contained file a family. They know nothing of the sampler."""

from .adm import ADM as ADM, ADMClassifier as ADMClassifier
from .classifier import ConvClassifier as ConvClassifier
from .diffae import DiffAE as DiffAE
from .unet2d import UNet2D as UNet2D
