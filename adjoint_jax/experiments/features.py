"""Features of images for their style, each layer scaled by the style to come to: what a classifier's convolutions answer, or CLIP's layers.

    F_l(x) = layer_l(x) / s_l,    s_l^4 = mean G_l(y)^2                                                              (1)

With (1) each term of the style loss (`metrics.style`) is relative to its own target, and 1 where the features vanish. Gatys, Ecker & Bethge
(CVPR 2016) take the layers of VGG and weigh them by hand.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .metrics import gram, prepared, style

LAYERS = 4
"""Of CLIP, at most."""


def convolutions(module: nn.Module, params: Any, images: Any) -> list[Any]:
    """What each convolution of a Flax module answers, `[B, h_l, w_l, c_l]`, in the order of their names."""
    _, seen = module.apply({"params": params}, images, capture_intermediates=lambda part, name: isinstance(part, nn.Conv) and name == "__call__")
    return jax.tree.leaves(seen["intermediates"])


def patches(tower: Any, mean: Any, spread: Any, params: Any, images: Any) -> list[Any]:
    """States `[B, 1, P, D]` of the P patches in a `CLIPVision`, even in depth: from the embeddings to the last that the class token attends to."""
    states = tower.apply({"params": params}, prepared(images, tower.image_size, mean, spread)).hidden_states
    depths = np.linspace(0, tower.num_hidden_layers - 1, LAYERS).astype(int)
    return [states[depth][:, None, 1:] for depth in np.unique(depths)]


def style_of(features: Any, images: Any) -> Any:
    """The metric (7) of `metrics`, as a `Partial`: how close the Gram matrices of an image are to the mean ones of `images`.

    `features` is a `Partial` from images to F_l without its scale, `[B, h_l, w_l, c_l]`.
    """
    grams = [jnp.mean(gram(layer), axis=0) for layer in features(images)]
    scales = [jnp.mean(wanted**2) ** 0.25 for wanted in grams]
    wanted = [target / scale**2 for target, scale in zip(grams, scales, strict=True)]
    return jax.tree_util.Partial(_score, features, scales, wanted)


def _score(features: Any, scales: Any, grams: Any, images: Any) -> Any:
    scaled = lambda images: [layer / scale for layer, scale in zip(features(images), scales, strict=True)]  # noqa: E731  (1)
    return style(scaled, grams, images)
