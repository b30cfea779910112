"""Metrics of images `[B, H, W, C]` in [-1, 1]: scores `[B]`, higher is better. Arguments before `images` are bound by `jax.tree_util.Partial`.

class         log p(target | x) of a classifier                                            (1)
image         -mean (x - y)^2                                                              (2)
colour        -mean_c (mean_hw x - y_c)^2                                                   (3)
layout        (2) of x and y averaged over k x k cells                                       (4)
inpainting    log N(y; x, s^2) at the pixels that were seen, a pixel, without its constant    (5)
deblurring    log N(y; K x, s^2), K a Gaussian blur, likewise                                (6)
style         -sum_l mean (G_l(x) - G_l(y))^2,   G_l = F_l F_l^T / (h w)  of features F_l `[c, h w]`    (7)
likeness      correlation of K x and K y over all pixels, whatever their brightness and contrast          (8)
margin        max_{k != y} z_k(x) - z_y(x)  of logits z: above 0 where x of class y is misread             (9)
clip          cos(E(P x), e),  e the embedding of a text, E CLIP's image tower, P its preparation of images    (10)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def log_probability(apply: Callable, target: int, params: Any, images: Any) -> Any:
    """(1), by a classifier `apply(variables, images)` that gives logits."""
    return jax.nn.log_softmax(apply({"params": params}, images))[:, target]


def margin(logits: Callable, labels: Any, images: Any) -> Any:
    """(9), `labels` `[B]`. Linear in the logits, so that it has a gradient where probabilities are 0 and 1. Carlini & Wagner (S&P 2017), f_6."""
    z = logits(images)
    own = jax.nn.one_hot(labels, z.shape[1], dtype=bool)
    return jnp.max(jnp.where(own, -jnp.inf, z), axis=1) - jnp.sum(jnp.where(own, z, 0), axis=1)


def closeness(target: Any, images: Any) -> Any:
    """(2), `target` `[H, W, C]`."""
    return -jnp.mean((images - target[None]) ** 2, axis=(1, 2, 3))


def colour(target: Any, images: Any) -> Any:
    """(3), `target` `[C]`."""
    return -jnp.mean((jnp.mean(images, axis=(1, 2)) - target[None]) ** 2, axis=1)


def layout(cells: int, target: Any, images: Any) -> Any:
    """(4), `target` `[H, W, C]`, `cells` of them along each side; H and W are multiples of it."""
    return closeness(pooled(target[None], cells)[0], pooled(images, cells))


def pooled(images: Any, cells: int) -> Any:
    """Means over `cells` x `cells` equal parts, `[B, cells, cells, C]`."""
    b, height, width, c = images.shape
    return jnp.mean(images.reshape(b, cells, height // cells, cells, width // cells, c), axis=(2, 4))


def inpainting(spread: float, seen: Any, observed: Any, images: Any) -> Any:
    """(5): `observed` `[H, W, C]`, `seen` `[H, W, 1]`, 1 where it was, and `spread`, the noise's standard deviation."""
    errors = seen[None] * (images - observed[None]) ** 2
    return -jnp.sum(errors, axis=(1, 2, 3)) / (2 * spread**2 * jnp.sum(seen) * images.shape[-1])


def deblurring(spread: float, width: float, observed: Any, images: Any) -> Any:
    """(6): `observed` `[H, W, C]` was blurred by a Gaussian of standard deviation `width` pixels."""
    return closeness(observed, blurred(images, width)) / (2 * spread**2)


def blurred(images: Any, width: float) -> Any:
    """Images under a Gaussian blur of standard deviation `width` pixels, cut at three of them, edges repeated."""
    reach = int(np.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    weights = jnp.asarray(weights / weights.sum(), images.dtype)
    for axis in (1, 2):
        pad = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(images, pad, mode="edge")
        size = images.shape[axis]
        images = sum(weights[k] * jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * reach + 1))
    return images


def agreement(tower: Any, mean: Any, spread: Any, params: Any, text: Any, images: Any) -> Any:
    """(10): `tower` is a `CLIPVision` with projection, `text` `[D]`. Hessel et al., CLIPScore (EMNLP 2021), without their factor."""
    found = tower.apply({"params": params}, prepared(images, tower.image_size, mean, spread)).image_embeds
    return found @ text / (jnp.linalg.norm(found, axis=-1) * jnp.linalg.norm(text))


def prepared(images: Any, size: int, mean: Any, spread: Any) -> Any:
    """P in (10): one channel repeated to three, the shorter side resized to `size` pixels by bicubic splines, the middle cut out, scaled by the
    mean and standard deviation `[3]` of data in [0, 1]. CLIP's own preparation, but for its rounding and clipping of what is resized."""
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    short = min(images.shape[1:3])
    height, width = (size * side // short for side in images.shape[1:3])
    resized = jax.image.resize(images, (len(images), height, width, images.shape[-1]), "bicubic")
    top, left = (height - size) // 2, (width - size) // 2
    mean, spread = (jnp.asarray(each, images.dtype) for each in (mean, spread))
    return ((resized[:, top : top + size, left : left + size] + 1) / 2 - mean) / spread


def gram(features: Any) -> Any:
    """G in (7) of features `[B, h, w, c]`: `[B, c, c]`."""
    return jnp.einsum("bhwc,bhwd->bcd", features, features) / (features.shape[1] * features.shape[2])


def style(features: Callable[[Any], Sequence[Any]], grams: Sequence[Any], images: Any) -> Any:
    """(7): `features(images)` gives F_l `[B, h_l, w_l, c_l]`; `grams` are those to come to, `[c_l, c_l]`. Gatys, Ecker & Bethge (CVPR 2016)."""
    found = [gram(layer) for layer in features(images)]
    return -sum(jnp.mean((mine - wanted[None]) ** 2, axis=(1, 2)) for mine, wanted in zip(found, grams, strict=True))


def likeness(width: float, target: Any, images: Any) -> Any:
    """(8), of images `[B, H, W, C]` and their own `target` `[B, H, W, C]`, K a blur of `width` pixels: 1 for the same layout, 0 for none of it."""
    found, wanted = (blurred(each, width) for each in (images, target))
    found, wanted = (each - jnp.mean(each, axis=(1, 2, 3), keepdims=True) for each in (found, wanted))
    inner, sizes = jnp.sum(found * wanted, axis=(1, 2, 3)), [jnp.sum(each**2, axis=(1, 2, 3)) for each in (found, wanted)]
    return inner * jax.lax.rsqrt(sizes[0] * sizes[1] + jnp.finfo(images.dtype).tiny)
