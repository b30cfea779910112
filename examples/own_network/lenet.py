"""LeNet-5 from its published weights (`mnist_lenet5.npz` of the shared data): a judge of digits that our training never saw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def load_lenet(path: str | Path) -> Callable[[Any], Any]:
    """A function from images `[B, 28, 28, 1]` in [-1, 1] to logits `[B, 10]`."""
    with np.load(path) as file:
        weights = {name: jnp.asarray(value) for name, value in file.items()}

    def convolve(x: Any, name: str) -> Any:
        kernel = jnp.transpose(weights[f"convnet.{name}.weight"], (2, 3, 1, 0))
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(y + weights[f"convnet.{name}.bias"][None, None, None])

    def pool(x: Any) -> Any:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def dense(x: Any, name: str) -> Any:
        return x @ weights[f"fc.{name}.weight"].T + weights[f"fc.{name}.bias"][None]

    def logits(images: Any) -> Any:
        x = (jax.image.resize(images.astype(jnp.float32), (len(images), 32, 32, 1), "bilinear") + 1) / 2
        x = convolve(pool(convolve(pool(convolve(x, "c1")), "c3")), "c5")[:, 0, 0]
        return dense(jax.nn.relu(dense(x, "f6")), "f7")

    return jax.jit(logits)
