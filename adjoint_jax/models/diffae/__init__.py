"""The diffusion autoencoder (diffae's `BeatGANsAutoencModel`), in Flax linen and NHWC. The family knows nothing of processes, solvers or adjoints.

Fields and parameters carry the names of the original's configuration and state dict, with `.N` written `_N`, or `N` where it counts the layers of a
row (`input_blocks.3.0.in_layers.2` is `input_blocks_3/0/in_layers_2`).
"""

from .network import DiffAE as DiffAE
