"""Flax networks, one self-contained file a family. They know nothing of the sampler."""

from .adm import ADM as ADM, ADMClassifier as ADMClassifier
from .autoencoder_kl import AutoencoderKL as AutoencoderKL, decode_tiled as decode_tiled
from .classifier import ConvClassifier as ConvClassifier
from .clip_text import CLIPText as CLIPText
from .clip_vision import CLIP as CLIP, CLIPVision as CLIPVision
from .diffae import DiffAE as DiffAE
from .dit import DiT as DiT
from .edm import DhariwalUNet as DhariwalUNet, SongUNet as SongUNet
from .sd3 import SD3Transformer as SD3Transformer
from .unet2d import UNet2D as UNet2D
from .unet2d_condition import UNet2DCondition as UNet2DCondition
