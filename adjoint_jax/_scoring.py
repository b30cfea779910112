"""From the options of the command line to metrics of images."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checkpoints
from ._misfits import at_least, positive, taken
from ._options import Guide
from ._tokens import tokenize
from .checkpoints import _files as layout
from .experiments import features, metrics, pictures
from .models import CLIP, ConvClassifier
from .models.clip_vision import MEAN, SPREAD

CLASSIFIER, TARGET = checkpoints.EMBEDDED / "classifier", 8
"""The embedded classifier, and the default class to climb to."""
METRICS: dict[str, tuple[str, ...]] = {
    "classifier": ("target", "classifier"),
    "image": ("target_image",),
    "colour": ("target_colour",),
    "layout": ("target_image", "cells"),
    "inpainting": ("target_image", "seen", "noise_level"),
    "deblurring": ("target_image", "blur", "noise_level"),
    "clip": ("clip", "target_prompt"),
}
NOISE_LEVEL, CELLS, BLUR = 0.1, 4, 2.0


def metric(options: Guide, images: Any) -> Any:
    """The metric as a `Partial`, tried on the shape of the images."""
    allowed = METRICS.get(options.metric, ())
    taken("metric", options.metric, allowed, {key: getattr(options, key) for keys in METRICS.values() for key in keys})
    at_least(options, 1, "cells")
    positive(options, "noise_level", "blur")
    found = MADE[options.metric](options, images.shape[1:]) if options.metric in MADE else jax.tree_util.Partial(_imported(options.metric))
    try:
        scores = jax.eval_shape(found, jax.ShapeDtypeStruct(images.shape, images.dtype))
    except Exception as error:
        raise ValueError(f"The metric {options.metric} does not take images of shape {images.shape}; {type(error).__name__}: {error}") from error
    if getattr(scores, "shape", None) != images.shape[:1] or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"The metric {options.metric} must give one float for each image, shape {images.shape[:1]}; it gave {scores}.")
    return found


def classifier(path: str | None, shape: tuple[int, ...]) -> tuple[ConvClassifier, Any]:
    """The classifier in a folder, by default the embedded one, and its weights, for images of `shape` `[H, W, C]`.

    Raises ValueError for another network, or one of images with other channels.
    """
    module, params = checkpoints.load_model(CLASSIFIER if path is None else path)
    if not isinstance(module, ConvClassifier):
        raise ValueError(f"{path} holds a {type(module).__name__} where a ConvClassifier was expected.")
    if module.in_channels != shape[-1]:
        name = "embedded classifier" if path is None else f"classifier {path}"
        raise ValueError(f"The {name} reads images [H, W, {module.in_channels}], and these are [H, W, {shape[-1]}]: give a --classifier for them.")
    return module, params


def _classifier(options: Guide, shape: tuple[int, ...]) -> Any:
    module, params = classifier(options.classifier, shape)
    wanted = target(options)
    if wanted is None or not 0 <= wanted < module.classes:
        raise ValueError(f"The classifier knows the classes 0 to {module.classes - 1}; got --target {wanted}: give one of them.")
    return jax.tree_util.Partial(partial(metrics.log_probability, module.apply, wanted), params)


def target(options: Guide) -> int | None:
    """The class to climb to."""
    return TARGET if options.target is None and options.classifier is None else options.target


def _image(options: Guide, shape: tuple[int, ...]) -> Any:
    return jax.tree_util.Partial(metrics.closeness, _observed(options, shape))


def _colour(options: Guide, shape: tuple[int, ...]) -> Any:
    try:
        wanted = [float(each) for each in (options.target_colour or "").split(",")]
    except ValueError:
        wanted = []
    if len(wanted) != shape[-1] or not np.isfinite(wanted).all():
        raise ValueError(f"--metric colour comes close to a colour: give --target-colour as {shape[-1]} numbers in [-1, 1], joined by commas.")
    return jax.tree_util.Partial(metrics.colour, jnp.asarray(wanted, jnp.float32))


def _layout(options: Guide, shape: tuple[int, ...]) -> Any:
    cells = CELLS if options.cells is None else options.cells
    if any(size % cells for size in shape[:2]):
        raise ValueError(f"--cells must divide the images' sides, {shape[0]} and {shape[1]}; got {cells}.")
    return jax.tree_util.Partial(partial(metrics.layout, cells), _observed(options, shape))


def _inpainting(options: Guide, shape: tuple[int, ...]) -> Any:
    observed = _observed(options, shape)
    if options.seen is None:
        raise ValueError("--metric inpainting needs to know which pixels were seen: give --seen MASK.png, white where they were.")
    seen = jnp.asarray(pictures.load(options.seen, (*shape[:2], 1)) > 0, jnp.float32)
    if not seen.any():
        raise ValueError(f"{options.seen} is black all over: no pixel was seen.")
    return jax.tree_util.Partial(partial(metrics.inpainting, _noise_level(options)), seen, observed)


def _deblurring(options: Guide, shape: tuple[int, ...]) -> Any:
    blur = BLUR if options.blur is None else options.blur
    return jax.tree_util.Partial(partial(metrics.deblurring, _noise_level(options), blur), _observed(options, shape))


def _clip(options: Guide, shape: tuple[int, ...]) -> Any:
    text = options.prompt if options.target_prompt is None else options.target_prompt
    if text is None:
        raise ValueError("--metric clip needs a text to compare with: give --prompt or --target-prompt.")
    return agreement(options.clip, text, shape)


def agreement(clip: str | None, text: str, shape: tuple[int, ...]) -> Any:
    """The metric clip of a folder or id, as a `Partial`; `shape` `[H, W, C]` is that of the images."""
    if clip is None:
        raise ValueError("A comparison with a text needs CLIP's networks: give --clip FOLDER.")
    folder, module, params = _towers(clip, shape)
    encoded: Any = module.text.apply({"params": params}, jnp.asarray(tokenize(folder, [text])))
    return jax.tree_util.Partial(partial(metrics.agreement, module.vision), *_seeing(folder, params), encoded.text_embeds[0])


def patches(clip: str, shape: tuple[int, ...]) -> Any:
    """The features `features.patches` by the CLIP of a folder or id, as a `Partial` of images of `shape` `[H, W, C]`."""
    folder, module, params = _towers(clip, shape)
    return jax.tree_util.Partial(partial(features.patches, module.vision), *_seeing(folder, params))


def _towers(clip: str, shape: tuple[int, ...]) -> tuple[Path, CLIP, Any]:
    if shape[-1] not in (1, 3):
        raise ValueError(f"CLIP sees images of 1 or 3 channels, and these have {shape[-1]}: use another metric.")
    folder = checkpoints.fetched(clip)
    module, params = checkpoints.load_model(folder)
    if not isinstance(module, CLIP):
        raise ValueError(f"{folder} holds a {type(module).__name__} where transformers' CLIPModel was expected.")
    return folder, module, params


def _seeing(folder: Path, params: Any) -> list[Any]:
    """Mean and standard deviation of pixels `[3]` that the folder's images are to have, CLIP's own where it does not say; the tower's weights."""
    file = folder / "preprocessor_config.json"
    settings = layout.read_json(file) if layout.regular(file) else {}
    found = [settings.get(name, default) for name, default in (("image_mean", MEAN), ("image_std", SPREAD))]
    if any(np.shape(each) != (3,) or not all(type(number) in (int, float) for number in each) for each in found) or 0 in found[1]:
        raise ValueError(f"{file} has an image_mean or image_std that is not three numbers: fetch it again.")
    return [*(jnp.asarray(each, jnp.float32) for each in found), {name: params[name] for name in ("vision_model", "visual_projection")}]


def _noise_level(options: Guide) -> float:
    return NOISE_LEVEL if options.noise_level is None else options.noise_level


MADE: dict[str, Callable[[Guide, tuple[int, ...]], Any]] = {
    "classifier": _classifier, "image": _image, "colour": _colour, "layout": _layout, "inpainting": _inpainting, "deblurring": _deblurring,
    "clip": _clip,
}  # fmt: skip


def _observed(options: Guide, shape: tuple[int, ...]) -> Any:
    if options.target_image is None:
        raise ValueError(f"--metric {options.metric} measures the distance to an image: give --target-image FILE.png.")
    return jnp.asarray(pictures.load(options.target_image, shape))


def _imported(name: str) -> Callable:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"--metric {name} is not known: use one of {', '.join(METRICS)}, or module:function.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise ValueError(f"--metric {name} cannot be imported; {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ValueError(f"--metric {name} is a {type(found).__name__}, not a function of images.")
    return found


def describe(options: Guide) -> str:
    """The metric in words."""
    text = options.prompt if options.target_prompt is None else options.target_prompt
    words = {
        "classifier": f"log-probability of class {target(options)}",
        "image": f"minus the mean squared distance to {options.target_image}",
        "colour": f"minus the mean squared distance of the mean colour to {options.target_colour}",
        "layout": f"minus the mean squared distance to {options.target_image} in {options.cells or CELLS} x {options.cells or CELLS} cells",
        "inpainting": f"log-likelihood a pixel of what was seen of {options.target_image}",
        "deblurring": f"log-likelihood a pixel of {options.target_image}, blurred",
        "clip": f"cosine of CLIP's embeddings of the image and of the text {text!r}",
    }
    return words.get(options.metric, options.metric)
