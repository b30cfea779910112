"""Features of a convolutional classifier, for the style of images: what its convolutions answer, each layer scaled by the style to come to.

    F_l(x) = conv_l(x) / s_l,    s_l^4 = mean G_l(y)^2                                                               (1)

With (1) each term of the style loss (`metrics.style`) is relative to its own target, and 1 where the features vanish. Gatys, Ecker & Bethge
(CVPR 2016) take the layers of VGG and weigh them by hand.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .metrics import gram, style


def convolutions(module: nn.Module, params: Any, images: Any) -> list[Any]:
    """What each convolution of a Flax module answers, `[B, h_l, w_l, c_l]`, in the order of their names."""
    _, seen = module.apply({"params": params}, images, capture_intermediates=lambda part, name: isinstance(part, nn.Conv) and name == "__call__")
    return jax.tree.leaves(seen["intermediates"])


def _scaled(module: nn.Module, params: Any, scales: Any, images: Any) -> list[Any]:
    return [layer / scale for layer, scale in zip(convolutions(module, params, images), scales, strict=True)]  # (1)


def style_of(module: nn.Module, params: Any, images: Any) -> Any:
    """The metric (7) of `metrics`, as a `Partial`: how close the Gram matrices of an image are to the mean ones of `images`."""
    grams = [jnp.mean(gram(layer), axis=0) for layer in convolutions(module, params, images)]
    scales = [jnp.mean(wanted**2) ** 0.25 for wanted in grams]
    wanted = [target / scale**2 for target, scale in zip(grams, scales, strict=True)]
    return jax.tree_util.Partial(partial(_score, module), params, scales, wanted)


def _score(module: nn.Module, params: Any, scales: Any, grams: Any, images: Any) -> Any:
    return style(partial(_scaled, module, params, scales), grams, images)
