"""A UNet of 63.2 million parameters for 64 x 64 RGB drawings of faces, from its published weights (`wang64_unet_uint8.npz` of the shared data).

It predicts eps at the integer times 0 .. 299 of a cosine schedule; data lie in [-1, 1]. Start at t = 290: at 299 alpha is 5e-5 and the first
step saturates. Layers are numbered in the order in which they were made.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adjoint_jax as aj

WIDTHS, BLOCKS, ATTENTION, GROUPS, START = (64, 128, 256, 512), 2, (2, 3), 8, 290.0


def load_unet64(path: str | Path, alphas_cumprod: Any) -> tuple[aj.DiffusionTerm, dict[str, Any]]:
    """The term and the weights: `aj.sample(term, x_T, {"params": weights}, ...)`, x_T `[B, 64, 64, 3]`. Weights are q s + m of 8-bit numbers q."""
    with np.load(path) as file:
        scales = {name: file[f"{name}:scale_min"] for name in file.files if not name.endswith(":scale_min")}
        params = {name: jnp.asarray(file[name].astype(np.float64) * s + m, jnp.float32) for name, (s, m) in scales.items()}
    return aj.DiffusionTerm(unet64, aj.VPDiscrete(alphas_cumprod), "eps"), params


def unet64(x: Any, t: Any, args: Any) -> Any:
    """eps, from blocks of convolutions at four resolutions, with attention at 16 x 16 and 8 x 8."""
    conv, dense, norm = _layers(args["params"])
    angle = jnp.asarray(t, x.dtype) * jnp.exp(-jnp.log(1e4) * jnp.arange(128) / 127).astype(x.dtype)
    time = dense(jax.nn.silu(dense(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])[None])))

    def block(x: Any, width: int, attend: bool) -> Any:
        shortcut = x if x.shape[-1] == width else conv(x)
        shift = dense(jax.nn.silu(time))[:, None, None]
        x = shortcut + conv(jax.nn.silu(norm(conv(jax.nn.silu(norm(x))) + shift)))
        return attention(norm(x)) if attend else x

    def attention(x: Any) -> Any:
        flat = x.reshape(len(x), -1, x.shape[-1])
        q, k, v = dense(flat), dense(flat), dense(flat)
        scores = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / np.sqrt(x.shape[-1]).astype(x.dtype), axis=-1)
        return x + dense(jnp.einsum("bqk,bkc->bqc", scores, v)).reshape(x.shape)

    x = conv(x)
    skips = [x]
    for i, width in enumerate(WIDTHS):
        for _ in range(BLOCKS):
            x = block(x, width, i in ATTENTION)
            skips.append(x)
        if i < len(WIDTHS) - 1:
            x = conv(x, stride=2)
            skips.append(x)
    x = block(block(x, WIDTHS[-1], True), WIDTHS[-1], False)
    for i, width in reversed(list(enumerate(WIDTHS))):
        for _ in range(BLOCKS + 1):
            x = block(jnp.concatenate([x, skips.pop()], axis=-1), width, i in ATTENTION)
        if i:
            x = conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
    return conv(jax.nn.silu(norm(x)))


def _layers(params: dict[str, Any]) -> tuple[Callable, Callable, Callable]:
    """Convolution, dense layer and group norm, each of which takes the next weights of its kind."""

    def numbered(kind: str) -> Iterator[dict[str, Any]]:
        return (
            {part: params[f"{kind}/{i}/{part}"] for part in ("kernel", "scale", "bias") if f"{kind}/{i}/{part}" in params} for i in itertools.count()
        )

    kinds = {kind: numbered(kind) for kind in ("conv", "dense", "gn")}

    def conv(x: Any, stride: int = 1) -> Any:
        p = next(kinds["conv"])
        y = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + p["bias"][None, None, None]

    def dense(x: Any) -> Any:
        p = next(kinds["dense"])
        return x @ p["kernel"] + p["bias"][(None,) * (x.ndim - 1)]

    def norm(x: Any) -> Any:
        p, grouped = next(kinds["gn"]), x.reshape(len(x), -1, GROUPS, x.shape[-1] // GROUPS)
        normed = jax.nn.standardize(grouped, axis=(1, 3), epsilon=1e-3).reshape(x.shape)
        return normed * p["scale"][None, None, None] + p["bias"][None, None, None]

    return conv, dense, norm
