"""The UNet of diffusers' `UNet2DModel`, in Flax linen and NHWC.

Self-contained: it knows nothing of processes, solvers or adjoints. Module names follow the original's state dict with
`.N` written `_N` (`down_blocks.0.resnets.1.conv1` is `down_blocks_0/resnets_1/conv1`), so that a checkpoint converts by a rule
table alone (`adjoint_jax.checkpoints`). Arithmetic that differs between look-alike networks is spelt out where it happens:
the epsilon of the group norms, the one-sided padding of the stride-2 convolutions, the order of sine and cosine.
"""

from ._unet2d import UNet2D as UNet2D
