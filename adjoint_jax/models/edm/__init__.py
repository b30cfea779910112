"""The networks of EDM: `SongUNet` (DDPM++ and NCSN++) and `DhariwalUNet` (ADM), in Flax linen and NHWC.

Reference: Karras et al., Elucidating the design space of diffusion-based generative models (2022), appendix F.2; after Song et al. (2021) and
Dhariwal & Nichol (2021). Submodules carry the original's names: `enc.32x32_block0.conv0` is `enc/32x32_block0/conv0`.
"""

from .dhariwal import DhariwalUNet as DhariwalUNet
from .song import SongUNet as SongUNet
