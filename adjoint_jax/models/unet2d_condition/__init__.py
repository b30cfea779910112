"""The text-conditional UNet of diffusers' `UNet2DConditionModel` (Stable Diffusion 1, 2 and XL, DeepFloyd IF), in Flax linen and NHWC."""

from ._unet import UNet2DCondition as UNet2DCondition
