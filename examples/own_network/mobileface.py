"""MobileFace, a recogniser of faces, from its published weights and graph (`mobileface_v2.npz`, `MobileFace_Identification_V2-symbol.json`).

    features(x) = f(x) + f(mirror(x)) `[B, 256]`,     d(u, v) = 1 - <u, v> / (|u| |v|)                                (1)

The graph is that of MXNet: convolutions, batch norms (here one scale and one shift a channel), a clip to [0, 6], sums, and one dense layer;
it subtracts 127.5 and divides by 128 itself. Source: becauseofAI/MobileFace (MIT). It was trained on faces aligned by their eyes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-3
"""Of the batch norms; the file does not say."""


def load_mobileface(weights: str | Path, graph: str | Path, side: int = 112) -> tuple[Callable, dict[str, Any]]:
    """(`f(params, images)`, params): features `[B, 256]` of images `[B, side, side, 3]` of 0 .. 255, or features (1) by `recognise`."""
    nodes = json.loads(Path(graph).read_text())["nodes"]
    with np.load(weights) as file:
        arrays = {name.split(":")[1]: file[name] for name in file.files}
    params, program = {}, []
    for index, node in enumerate(nodes):
        made, name, options = node["op"], node["name"], node.get("attrs", {})
        read = [entry[0] for entry in node["inputs"] if nodes[entry[0]]["op"] != "null" or nodes[entry[0]]["name"] == "data"]
        if made == "null":
            continue
        if made in ("Convolution", "FullyConnected"):
            kernel = arrays[f"{name}_weight"]
            params[name] = {"kernel": kernel.transpose(2, 3, 1, 0) if made == "Convolution" else kernel.T}
            if f"{name}_bias" in arrays:
                params[name]["bias"] = arrays[f"{name}_bias"]
        if made == "BatchNorm":
            gamma, beta, mean, variance = (arrays[f"{name}_{part}"].astype(np.float64) for part in ("gamma", "beta", "moving_mean", "moving_var"))
            scale = gamma / np.sqrt(variance + EPSILON)
            params[name] = {"scale": scale.astype(np.float32), "bias": (beta - mean * scale).astype(np.float32)}
        program.append((index, OPERATIONS[made], name, options, read))
    data = next(index for index, node in enumerate(nodes) if node["name"] == "data")

    def features(params: dict[str, Any], images: Any) -> Any:
        if images.shape[1:] != (side, side, 3):
            raise ValueError(f"This recogniser takes images of {side} x {side} x 3; got {images.shape[1:]}.")
        values = {data: images}
        for index, operation, name, options, read in program:
            values[index] = operation(params.get(name, {}), options, *(values[i] for i in read))
        return values[program[-1][0]]

    return features, jax.tree.map(jnp.asarray, params)


def _convolve(p: dict[str, Any], options: dict[str, str], x: Any) -> Any:
    kernel, stride, pad = p["kernel"], *(json.loads(options[name].replace("(", "[").replace(")", "]")) for name in ("stride", "pad"))
    if int(options.get("num_group", 1)) > 1:
        y = _depthwise(x, kernel, stride, pad)
    elif kernel.shape[:2] == (1, 1) and stride == [1, 1] and pad == [0, 0]:
        y = x @ kernel[0, 0]
    else:
        y = jax.lax.conv_general_dilated(x, kernel, stride, [(n, n) for n in pad], dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["bias"] if "bias" in p else y


def _depthwise(x: Any, kernel: Any, stride: list[int], pad: list[int]) -> Any:
    """One filter a channel, as a sum of shifted products: on a CPU its gradient is ten times as fast as that of a convolution of so many groups."""
    x = jnp.pad(x, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1]), (0, 0)))
    rows, columns = (x.shape[1 + k] - kernel.shape[k] + 1 for k in (0, 1))
    products = [kernel[i, j, 0] * x[:, i : i + rows, j : j + columns] for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return sum(products, jnp.zeros_like(products[0]))[:, :: stride[0], :: stride[1]]


OPERATIONS: dict[str, Callable] = {
    "_minus_scalar": lambda p, options, x: x - float(options["scalar"]),
    "_mul_scalar": lambda p, options, x: x * float(options["scalar"]),
    "_maximum_scalar": lambda p, options, x: jnp.maximum(x, float(options["scalar"])),
    "_minimum_scalar": lambda p, options, x: jnp.minimum(x, float(options["scalar"])),
    "elemwise_add": lambda p, options, x, y: x + y,
    "BatchNorm": lambda p, options, x: x * p["scale"] + p["bias"],
    "Convolution": _convolve,
    "Flatten": lambda p, options, x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
    "FullyConnected": lambda p, options, x: x @ p["kernel"],
}


def recognise(features: Callable, side: int, params: dict[str, Any], images: Any) -> Any:
    """The features of (1) of grey images `[B, H, W, 1]` in [-1, 1], enlarged bilinearly; `[B, 256]`, of norm 1."""
    enlarged = jax.image.resize(127.5 * (images + 1), (len(images), side, side, 1), "bilinear")
    enlarged = jnp.broadcast_to(enlarged, (*enlarged.shape[:3], 3))
    found = features(params, enlarged) + features(params, enlarged[:, :, ::-1])
    return found / jnp.linalg.norm(found, axis=1, keepdims=True)
