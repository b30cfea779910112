"""A small convolutional classifier: the differentiable metric that the digit examples climb."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class ConvClassifier(nn.Module):
    """Convolution, group norm, SiLU and a halving of the resolution for each width; then the mean over pixels and one dense layer.

    The call maps images `[B, H, W, C]` in [-1, 1] to logits `[B, classes]`. Smooth (SiLU, average pooling), so that its gradient in
    the image is of use.
    """

    features: Sequence[int] = (16, 32, 64)
    classes: int = 10
    norm_num_groups: int = 8
    in_channels: int = 1

    @property
    def dummy_inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Abstract arguments of a call, as small as can be."""
        side = 2 ** len(self.features)
        return (jax.ShapeDtypeStruct((1, side, side, self.in_channels), jnp.float32),)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        for i, features in enumerate(self.features):
            x = nn.Conv(features, (3, 3), padding=1, name=f"conv_{i}")(x)
            x = nn.silu(nn.GroupNorm(self.norm_num_groups, name=f"norm_{i}")(x))
            b, height, width, c = x.shape
            x = jnp.mean(x[:, : height // 2 * 2, : width // 2 * 2].reshape(b, height // 2, 2, width // 2, 2, c), axis=(2, 4))
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))
