"""The autoencoder of latent diffusion models, diffusers' `AutoencoderKL`, in Flax linen and NHWC."""

from ._model import AutoencoderKL as AutoencoderKL
from ._tiled import decode_tiled as decode_tiled
