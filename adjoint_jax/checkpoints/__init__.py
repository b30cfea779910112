"""Reading and writing networks in diffusers' layout: `config.json`, safetensors, `scheduler_config.json`. No torch, and nothing is unpickled."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..schedulers import _betas
from . import _files, _hub, _loading, _models, _rules, _tensors, _values
from ._convert import convert as convert
from ._pipeline import Pipeline as Pipeline, load_pipeline as load_pipeline, save_pipeline as save_pipeline

__all__ = ["EMBEDDED", "Checkpoint", "Pipeline", "convert", "load", "load_model", "load_pipeline", "save", "save_pipeline"]


EMBEDDED = Path(__file__).parent.parent / "assets"
"""The folder of the networks that come with the package, `digits` and `classifier`, trained by `examples/train_digits.py`."""


class Checkpoint(NamedTuple):
    """What `load` returns: `DiffusionTerm(network, process, prediction)` is the term, `{"params": params, ...}` its args."""

    network: Any
    params: dict[str, Any]
    process: Any
    prediction: str


def fetched(
    path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder that `load_model` and `load` read: the path itself, or the hub's repository of that id, with the files they need."""

    def wanted(root: Path) -> list[str]:
        return [_files.folders(root, subfolder)[0].relative_to(root).as_posix()]

    return _hub.local(path, wanted, variant=variant, revision=revision, local_files_only=local_files_only)


def load_model(
    path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """A network in diffusers' or transformers' layout as a Flax module and its parameters.

    Args:
        path: a local folder with `config.json` and one safetensors file, or several and their index (`*.safetensors.index.json`); a pipeline with
            such a folder named `unet` or `transformer`; or the id `org/name` of one on the Hugging Face hub (extra `hub`), which is fetched into
            the hub's cache. What exists as a path is never an id. Of several weights the averaged ones in full precision are taken
            (`diffusion_pytorch_model.safetensors`, not `.non_ema`), else `fp16`.
        subfolder: the folder below `path` that is meant, say "vae".
        variant: which of several weights, "fp16" for `diffusion_pytorch_model.fp16.safetensors`; nothing else is taken.
        dtype: of the parameters; half-precision files are cast up to the default. Tensors are read one at a time.
        revision: branch, tag or commit on the hub.
        local_files_only: take what is in the hub's cache and ask nobody, as `HF_HUB_OFFLINE=1` does.

    Returns `(module, params)` with `module.apply({"params": params}, x, ...)` in NHWC; `UNet2D` for the class `UNet2DModel`, and so on.
    Raises FileNotFoundError where the folder, its configuration or its weights are missing; ValueError where the configuration asks for what the
        module does not compute or holds a value that no network has, the weights are damaged or pickled, or any tensor is missing, unexpected,
        misshapen or not finite; ConnectionError, PermissionError or ImportError where a hub's id cannot be fetched.
    """
    local = fetched(path, subfolder=subfolder, variant=variant, revision=revision, local_files_only=local_files_only)
    folder, _ = _files.folders(local, subfolder)
    return _loading.network(folder, variant=variant, dtype=dtype)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """A diffusion or flow model in diffusers' layout, ready for `DiffusionTerm`.

    Args:
        path: None for the embedded class-conditional digits (28 x 28, in [-1, 1], class 10 the null one); or what `load_model` takes, with
            `scheduler_config.json` (DDPM's defaults where that file is missing) beside `config.json`, or in a pipeline's folder `scheduler`.
        subfolder, variant, dtype, revision, local_files_only: as `load_model`.

    Returns `(network, params, process, prediction)`. `network(x, t, args)` takes x `[B, H, W, C]` and args `{"params": params}`, with `"cond"`
        for a conditional network (labels, a class embedding, or a dict of the module's several conditionings); t is the process's own time.
    Raises what `load_model` raises, and ValueError for a scheduler that is not known or a network whose output is not the shape of x.
    """
    from ..networks import linen

    path = EMBEDDED / "digits" if path is None else path
    local = fetched(path, subfolder=subfolder, variant=variant, revision=revision, local_files_only=local_files_only)
    folder, scheduler_folder = _files.folders(local, subfolder)
    module, params = _loading.network(folder, variant=variant, dtype=dtype)
    family = _models.family_of(module)
    ours, theirs = getattr(module, "in_channels", None), getattr(module, "out_channels", None)
    if family.adapt is None and (ours is None or ours != theirs):
        raise ValueError(f"{folder} maps {ours} channels to {theirs}, not x to a prediction of its shape: use load_model and wrap the module.")
    network, file = (family.adapt or linen)(module), scheduler_folder / _files.SCHEDULER
    named = _files.regular(local / _files.PIPELINE) and "scheduler" in _files.read_json(local / _files.PIPELINE)
    scheduler = _files.read_json(file) if named or _files.regular(file) else {}
    if family.process is not None:
        return Checkpoint(network, params, *family.process(module, scheduler))
    _values.check_scheduler(scheduler, file)
    process, prediction = _values.guarded(lambda: _betas.process_from_config(scheduler), file)
    return Checkpoint(_betas.in_process_time(network, scheduler), params, process, prediction)


def save(path: str | os.PathLike[str], module: nn.Module, params: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> None:
    """Writes a network in diffusers' layout (a text encoder in transformers'), which `load` and the originals' `from_pretrained` read back.

    Args:
        path: a folder that does not exist, or is empty.
        module: a module of `adjoint_jax.models` that `load_model` knows.
        params: its parameters; dtypes are kept, except that bfloat16 is written as float32.
        scheduler: the contents of `scheduler_config.json`; no such file without it.

    Raises FileExistsError for a path in use; ValueError for a module or scheduler that is not known, or parameters that do not fit the module.
    """
    config, source = _models.describe(module), f"the {type(module).__name__} to be saved"
    tensors = _rules.to_torch(_models.family_of(module), _models.shapes(module), params, source)
    files: dict[str, Any] = {_files.weights_name(config): _tensors.writer(tensors.items())}
    if scheduler is not None:
        _values.check_scheduler(scheduler, "The scheduler to be saved")
        _betas.process_from_config(scheduler)
        files[_files.SCHEDULER] = _files.to_json(scheduler)
    _files.write_folder(path, {**files, _files.CONFIG: _files.to_json(config)})
