"""Reading and writing networks in diffusers' layout: `config.json`, safetensors, `scheduler_config.json`. No torch, and nothing is unpickled."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..schedulers import _betas
from . import _files, _models, _rules

__all__ = ["EMBEDDED", "Checkpoint", "load", "load_model", "save"]


EMBEDDED = Path(__file__).parent.parent / "assets"
"""The folder of the networks that come with the package, `digits` and `classifier`, trained by `examples/train_digits.py`."""


class Checkpoint(NamedTuple):
    """What `load` returns: `DiffusionTerm(network, process, prediction)` is the term, `{"params": params, ...}` its args."""

    network: Any
    params: dict[str, Any]
    process: Any
    prediction: str


def load_model(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A network in diffusers' layout as a Flax module and its parameters.

    Args:
        path: a local folder with `config.json` and one safetensors file, or a pipeline with such a folder named `unet`. Of several
            weights the averaged ones in full precision are taken (`diffusion_pytorch_model.safetensors`, not `.non_ema` or `.fp16`).
        dtype: of the parameters; half-precision files are cast up to the default.

    Returns `(module, params)` with `module.apply({"params": params}, x, ...)` in NHWC; `UNet2D` for the class `UNet2DModel`, or `ConvClassifier`.
    Raises FileNotFoundError where the folder, its configuration or its weights are missing; ValueError where the configuration asks for what the
        module does not compute, the weights are damaged or pickled, or any tensor is missing, unexpected, misshapen or not finite.
    """
    folder, _ = _files.folders(path)
    source = str(folder / _files.CONFIG)
    config = _files.read_json(folder / _files.CONFIG)
    module, shapes = _models.read(config, source)
    weights = _files.find_weights(folder)
    return module, _rules.to_flax(_models.family_of(module), shapes, _files.read_tensors(weights), str(weights), dtype)


def load(path: str | os.PathLike[str] | None = None, *, dtype: Any = jnp.float32) -> Checkpoint:
    """A diffusion or flow model in diffusers' layout, ready for `DiffusionTerm`.

    Args:
        path: None for the embedded class-conditional digits (28 x 28, in [-1, 1], class 10 the null one); or a local folder with
            `config.json`, one safetensors file and `scheduler_config.json` (DDPM's defaults where that file is missing), or a pipeline with
            the folders `unet` and `scheduler`.
        dtype: of the parameters.

    Returns `(network, params, process, prediction)`. `network(x, t, args)` takes x `[B, H, W, C]` and args `{"params": params}`, with `"cond"`
        (labels or a class embedding) for a conditional network; t is the process's own time.
    Raises what `load_model` raises, and ValueError for a scheduler that is not known or a network whose output is not the shape of x.
    """
    from ..networks import linen

    path = EMBEDDED / "digits" if path is None else path
    module, params = load_model(path, dtype=dtype)
    folder, scheduler_folder = _files.folders(path)
    ours, theirs = getattr(module, "in_channels", None), getattr(module, "out_channels", None)
    if ours is None or ours != theirs:
        raise ValueError(f"{folder} maps {ours} channels to {theirs}, not x to a prediction of its shape: use load_model and wrap the module.")
    file = scheduler_folder / _files.SCHEDULER
    scheduler = _files.read_json(file) if file.exists() else {}
    family = _models.family_of(module)
    process, prediction = family.process(module, scheduler) if family.process else _betas.process_from_config(scheduler)
    adapt = family.adapt or linen
    network, unit = adapt(module), _betas.time_unit(scheduler)
    return Checkpoint(network if unit == 1 else _betas.ScaledTime(network, unit), params, process, prediction)


def save(path: str | os.PathLike[str], module: nn.Module, params: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> None:
    """Writes a network in diffusers' layout, which `load` and diffusers' `UNet2DModel.from_pretrained` read back.

    Args:
        path: a folder that does not exist, or is empty.
        module: `UNet2D` or `ConvClassifier`.
        params: its parameters; dtypes are kept, except that bfloat16 is written as float32.
        scheduler: the contents of `scheduler_config.json`; no such file without it.

    Raises FileExistsError for a path in use; ValueError for a module or scheduler that is not known, or parameters that do not fit the module.
    """
    config, source = _models.describe(module), f"the {type(module).__name__} to be saved"
    tensors = _rules.to_torch(_models.family_of(module), _models.shapes(module), params, source)
    if scheduler is not None and not _betas.is_flow(scheduler):
        _betas.alphas_cumprod(scheduler)
    _files.write_folder(path, config, tensors, scheduler)
