"""What goes into the networks beside the image: the time, class and augmentation labels; and what does not fit."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ARGUMENTS = ("class_labels", "augment_labels")


def sinusoids(t: Float[Array, " b"], frequencies: Float[Array, " k"], sines_first: bool) -> Float[Array, "b k2"]:
    """Cosines and sines of t times each frequency."""
    angles = t[:, None] * frequencies[None]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(parts[::-1] if sines_first else parts, axis=-1)


def positional(dim: int, endpoint: bool, dtype: Any) -> Float[Array, " k"]:
    """The frequencies 1e-4^(k / (dim/2)), or with the last one at 1e-4 itself (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    return jnp.asarray(1e-4 ** (np.arange(half) / (half - endpoint)), dtype)


def times(t: Any, x: Array) -> Float[Array, " b"]:
    """One t for each sample, in float32 at least: half precision has no t = 999.5."""
    return jnp.broadcast_to(jnp.asarray(t), x.shape[:1]).astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def conditionings(module: Any, cond: Any, x: Array) -> tuple[Array | None, Array | None]:
    """Class and augmentation labels `[B, label_dim]` and `[B, augment_dim]`, zeros where none are given, None where the network takes none."""
    given = cond if isinstance(cond, Mapping) else {"class_labels": cond}
    if unknown := sorted(set(given) - set(ARGUMENTS)):
        raise ValueError(f"{type(module).__name__} does not know the conditionings {unknown}: give class labels, or a dict of {list(ARGUMENTS)}.")
    found = []
    for name, dim in zip(ARGUMENTS, (module.label_dim, module.augment_dim), strict=True):
        labels = given.get(name)
        if labels is not None and not dim:
            raise ValueError(f"This {type(module).__name__} takes no {name}: leave them out, for the width of such labels is 0 here.")
        found.append(_vectors(labels, name, dim, x) if dim else None)
    return found[0], found[1]


def _vectors(labels: Any, name: str, dim: int, x: Array) -> Array:
    labels = jnp.zeros((dim,), x.dtype) if labels is None else jnp.asarray(labels)
    vectors = labels
    if name == "class_labels" and labels.ndim < 2 and not jnp.issubdtype(labels.dtype, jnp.floating):
        known = (labels >= 0) & (labels < dim)
        vectors = jnp.where(known[..., None], jax.nn.one_hot(labels, dim, dtype=x.dtype), jnp.nan)  # not the zeros that mean "no class"
    if not jnp.issubdtype(vectors.dtype, jnp.floating) or vectors.shape not in ((dim,), (1, dim), (len(x), dim)):
        integers = "integers, scalar or `[B]`, or " if name == "class_labels" else ""
        raise ValueError(f"{name} are {integers}floats `[{dim}]` or `[B, {dim}]`, B = {len(x)}; got {labels.dtype} {labels.shape}.")
    return jnp.broadcast_to(vectors.astype(x.dtype), (len(x), dim))


def check(module: Any, x: Array) -> None:
    """Raises ValueError where the images or options do not fit."""
    name, multiple = type(module).__name__, 2 ** (len(module.channel_mult) - 1)
    if x.ndim != 4 or x.shape[3] != module.in_channels or x.shape[1] % multiple or x.shape[2] % multiple:
        raise ValueError(f"{name} takes x of shape [B, H, W, {module.in_channels}], H and W multiples of {multiple}; got {x.shape}.")
    if module.img_resolution % multiple or module.num_blocks < 1:
        raise ValueError(
            f"{name} needs an img_resolution that is a multiple of {multiple}, and num_blocks of 1 or more; "
            f"got {module.img_resolution} and {module.num_blocks}."
        )


def dummy_inputs(module: Any) -> tuple[Any, ...]:
    """Abstract arguments of a call, as small as can be."""
    side = 2 ** (len(module.channel_mult) - 1)
    return jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32), None


def kept(labels: Array, module: nn.Module, rate: float, deterministic: bool) -> Array:
    """The class labels, in training zero for a random share of the samples."""
    if deterministic or not rate:
        return labels
    return labels * jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (len(labels), 1)).astype(labels.dtype)
