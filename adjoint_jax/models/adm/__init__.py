"""ADM (guided-diffusion): its UNet and its noisy classifier, in Flax linen and NHWC. The family knows nothing of processes, solvers or adjoints.

Fields and parameters carry the names of the original's constructors and state dicts, with `.N` written `_N`, or `N` where it counts the layers of a
row (`input_blocks.3.0.in_layers.2` is `input_blocks_3/0/in_layers_2`).
"""

from .classifier import ADMClassifier as ADMClassifier
from .unet import ADM as ADM
