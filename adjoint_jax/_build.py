"""From the options of the command line to samplers, metrics, adjoints and optimisers. Each misfit is one sentence; nothing is ignored in silence."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import checkpoints, grids
from ._options import Guide, Sample, recorded
from .adjoints import AdjointDEIS, DiscreteAdjoint
from .checkpoints import _files as layout
from .guide import Given, Sampler, Steering, Variables, closeness, log_probability
from .models import ConvClassifier
from .solvers import DDIM, DEIS, DPMSolverPP, Exponential, ExponentialRK

DIGITS, CLASSIFIER = checkpoints.EMBEDDED / "digits", checkpoints.EMBEDDED / "classifier"
SIZE, LABEL, TARGET = 28, 3, 8
"""Of the embedded networks: pixels, and the default classes to start from and to climb to."""

SAMPLERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "ddim": (DDIM, ()),
    "deis": (DEIS, ("order",)),
    "dpmpp": (DPMSolverPP, ("order",)),
    "exponential": (Exponential, ("order", "sigma_data")),
    "heun": (partial(ExponentialRK, diffrax.Heun()), ("sigma_data",)),
}
ADJOINTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "discrete": (DiscreteAdjoint, ()),
    "direct": (diffrax.DirectAdjoint, ()),
    "deis": (AdjointDEIS, ("steps", "order", "sigma_data")),
    "published": (partial(AdjointDEIS, order=2, sigma_data=np.inf, published=True), ("steps", "order")),
}
METRICS: dict[str, tuple[str, ...]] = {"classifier": ("target", "classifier"), "image": ("target_image",)}
GRIDS = ("uniform", "quadratic", "log_snr", "karras", "edm", "beta", "vp", "angle", "shifted", "linspace", "trailing", "leading")
DRIVES = {"noise": ("x_T",), "embedding": ("embedding",), "both": ("x_T", "embedding")}
OPTIMISERS = ("adam", "adabelief", "adagrad", "adamax", "amsgrad", "lion", "nadam", "radam", "rmsprop", "sgd", "sign_sgd", "yogi")


def _known(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"--{option} {value} is not known: use one of {', '.join(known)}.")
    return value


def _at_least(options: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value < np.inf:
            raise ValueError(f"{_flag(name)} must be at least {low}; got {value}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _taken(option: str, name: str, allowed: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are not None. Raises ValueError for one that `name` does not take."""
    values = {key: value for key, value in given.items() if value is not None}
    if refused := [_flag(key) for key in values if key not in allowed]:
        raise ValueError(f"--{option} {name} takes no {', '.join(refused)}: leave {'them' if len(refused) > 1 else 'it'} out.")
    return values


def _make(option: str, name: str, table: Mapping[str, tuple[Callable, tuple[str, ...]]], prefix: str, options: Any, keys: Sequence[str]) -> Any:
    """table[name] called with the options `prefix + key` that were given."""
    make, allowed = table[_known(option, name, list(table))]
    values = _taken(option, name, [prefix + key for key in allowed], {prefix + key: getattr(options, prefix + key) for key in keys})
    return make(**{key.removeprefix(prefix): value for key, value in values.items()})


def sampler(options: Sample) -> tuple[Sampler, Given, Variables]:
    """What is sampled, from which arrays, and the noise and embedding to start from."""
    _at_least(options, 1, "batch", "steps", "size")
    _at_least(options, 0, "seed")
    if not np.isfinite(options.guidance):
        raise ValueError(f"--guidance must be a finite number; got {options.guidance}.")
    solver = _make("sampler", options.sampler, SAMPLERS, "", options, ("order", "sigma_data"))
    grid = getattr(grids, _known("grid", options.grid, GRIDS))
    path = DIGITS if options.checkpoint is None else checkpoints.fetched(options.checkpoint)
    network, params, process, prediction = checkpoints.load(path)
    times = grids.check(process, grid(process, options.steps, t_start=options.t_start, t_end=options.t_end))
    embedding, null = _embedding(options, params)
    if embedding is None and options.guidance != 1:
        raise ValueError("This checkpoint is unconditional: --guidance needs classes.")
    made = Sampler(network, process, prediction, times, solver, guided=options.guidance != 1)
    shape = (options.batch, *_size(options, path), params["conv_in"]["kernel"].shape[2])
    variables = {"x_T": made.spread * jax.random.normal(jax.random.key(options.seed), shape, jnp.float32)}
    if embedding is not None:
        variables["embedding"] = jnp.tile(embedding[None], (options.batch, 1))
    given = Given(params, jnp.float32(options.guidance), null, None)
    return made, given, variables


def _embedding(options: Sample, params: Any) -> tuple[Any, Any]:
    """The class embedding `[E]` of the label, and that of the null class; None for an unconditional network."""
    table = params.get("class_embedding", {}).get("embedding")
    if table is None:
        if "class_embedding" in params:
            raise ValueError("This checkpoint computes its class embedding instead of looking it up in a table: only tables can be driven.")
        if options.label is not None:
            raise ValueError("This checkpoint is unconditional: leave --label out.")
        return None, None
    label = LABEL if options.label is None and options.checkpoint is None else options.label
    if label is None or not 0 <= label < len(table):
        raise ValueError(f"This checkpoint has the classes 0 to {len(table) - 1}; got --label {label}: give one of them.")
    return table[label], table[-1]


def _size(options: Sample, path: Path) -> list[int]:
    size = options.size or layout.read_json(layout.folders(path)[0] / layout.CONFIG).get("sample_size")
    if size is None and options.checkpoint is None:
        size = SIZE
    if size is None:
        raise ValueError(f"{path} does not say how large its images are: give --size in pixels.")
    return np.broadcast_to(size, 2).tolist()


def steering(options: Guide) -> tuple[Steering, Given, Variables]:
    """What is steered, the arrays that stay, and those to start from."""
    _at_least(options, 1, "iterations", "save_every", "adjoint_steps")
    if not 0 < options.learning_rate < np.inf:
        raise ValueError(f"--learning-rate must be a positive number; got {options.learning_rate}.")
    adjoint = _make("adjoint", options.adjoint, ADJOINTS, "adjoint_", options, ("steps", "order", "sigma_data"))
    optimiser = getattr(optax, _known("optimiser", options.optimiser, OPTIMISERS))(options.learning_rate)
    driven, shell = DRIVES[_known("drive", options.drive, list(DRIVES))], _known("project", options.project, ["shell", "none"]) == "shell"
    made, given, variables = sampler(options)
    if absent := [name for name in driven if name not in variables]:
        raise ValueError(f"This checkpoint is unconditional and has no {absent[0]} to drive: use --drive noise.")
    given = given._replace(metric=_metric(options, variables["x_T"]))
    return Steering(made, adjoint, optimiser, driven, shell), given, variables


def _metric(options: Guide, images: Any) -> Any:
    """The metric as a `Partial`, tried on the shape of the images."""
    allowed = METRICS.get(options.metric, ())
    _taken("metric", options.metric, allowed, {key: getattr(options, key) for keys in METRICS.values() for key in keys})
    if options.metric == "classifier":
        metric = _classifier(options)
    elif options.metric == "image":
        metric = jax.tree_util.Partial(closeness, _target_image(options.target_image, images.shape[1:]))
    else:
        metric = jax.tree_util.Partial(_imported(options.metric))
    try:
        scores = jax.eval_shape(metric, jax.ShapeDtypeStruct(images.shape, images.dtype))
    except Exception as error:
        raise ValueError(f"The metric {options.metric} does not take images of shape {images.shape}; {type(error).__name__}: {error}") from error
    if getattr(scores, "shape", None) != images.shape[:1] or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"The metric {options.metric} must give one float for each image, shape {images.shape[:1]}; it gave {scores}.")
    return metric


def _classifier(options: Guide) -> Any:
    path = CLASSIFIER if options.classifier is None else options.classifier
    module, params = checkpoints.load_model(path)
    if not isinstance(module, ConvClassifier):
        raise ValueError(f"{path} holds a {type(module).__name__} where a ConvClassifier was expected.")
    target = TARGET if options.target is None and options.classifier is None else options.target
    if target is None or not 0 <= target < module.classes:
        raise ValueError(f"The classifier knows the classes 0 to {module.classes - 1}; got --target {target}: give one of them.")
    return jax.tree_util.Partial(partial(log_probability, module.apply, target), params)


def _target_image(path: str | None, shape: tuple[int, ...]) -> Any:
    """A PNG as pixels `[H, W, C]` in [-1, 1]."""
    from PIL import Image

    if path is None:
        raise ValueError("--metric image measures the distance to an image: give --target-image FILE.png.")
    with Image.open(path) as image:
        pixels = np.asarray(image, np.float32) / 127.5 - 1
        mode = image.mode
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    wanted = "L" if shape[-1] == 1 else "RGB"
    if pixels.shape != shape or mode != wanted:
        raise ValueError(f"{path} has shape {pixels.shape} and mode {mode} where images are sampled of {shape} and {wanted}: resize or convert it.")
    return jnp.asarray(pixels)


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
    target = TARGET if options.target is None else options.target
    words = {"classifier": f"log-probability of class {target}", "image": f"minus the mean squared distance to {options.target_image}"}
    return words.get(options.metric, options.metric)


def compared(options: Guide, steered: Steering) -> dict[str, diffrax.AbstractAdjoint]:
    """The adjoint that was used, and the continuous one at half the steps."""
    fewer = max(1, options.steps // 2)
    given = {key.removeprefix("adjoint_"): value for key, value in recorded(options).items() if key.startswith("adjoint_")}
    used = f"{options.adjoint}({', '.join(f'{key}={value}' for key, value in given.items() if value is not None)}), used"
    return {used: steered.adjoint, f"AdjointDEIS(steps={fewer})": AdjointDEIS(steps=fewer)}
