"""Conversion of checkpoints of other projects, and of other layouts, into folders in diffusers' layout: what `adjoint-jax convert` does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import _files, _hub, _loading, _models, _pipeline, _rules, _tensors, _values, _writing
from .._writing import Converted, Part
from . import _ldm, _own, _sources

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
WEIGHTS = ("ema", "raw")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    weights: str = "ema",
    prediction: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Converted:
    """Writes a checkpoint as a folder that `load`, `load_pipeline` and diffusers read: safetensors and configurations, whole or not at all.

    Args:
        source: a network or pipeline in diffusers' layout (a folder, or an id of the hub); or one file: of Stable Diffusion 1, 2 or XL, its UNet or
            its autoencoder alone, of guided-diffusion, DiffAE or EDM; `.safetensors`, or a torch pickle, of which tensors alone are read.
        target: a folder that does not exist, or is empty.
        kind: "ldm" (Stable Diffusion), or the class of a network with a module here ("ADM", "ADMClassifier", "DiffAE", "SongUNet", ...);
            recognised by the tensors' names where it is not given.
        config: entries of the configuration, which count more than what the shapes tell; for Stable Diffusion by component, `{"unet": {...}}`;
            "scheduler" holds those of the scheduler, say `{"beta_schedule": "squaredcos_cap_v2"}` for guided-diffusion's 64x64_diffusion.pt.
        variant, revision, local_files_only: as `load_model`.
        dtype: "float32", "float16" or "bfloat16", to cast to; by default each tensor keeps its own.
        weights: "ema" for the averaged weights where a file has both, or "raw".
        prediction: "epsilon" or "v_prediction", what a Stable Diffusion predicts.

    Returns what was written, with the names of tensors that were left out (schedules, counters; the other of two sets of weights).
    Raises FileExistsError for a target in use; ImportError for a pickle without torch; ValueError where the architecture is not recognised, a
        tensor is missing, unexpected, misshapen or not finite, or the file holds anything but tensors.
    """
    folder = _files.unused(target)
    if weights not in WEIGHTS or dtype not in (None, *DTYPES):
        raise ValueError(f"weights={weights!r} and dtype={dtype!r}: use one of {', '.join(WEIGHTS)}, and one of {', '.join(DTYPES)} or none.")
    overrides = dict(config or {})
    file = Path(source)
    if file.is_file():
        read = lambda: _file(file, kind, weights=weights, prediction=prediction, overrides=overrides)  # noqa: E731
        converted = _values.guarded(read, file, "it is not a whole file of this kind")
    else:
        given = {"kind": kind, "prediction": prediction, "config": overrides or None}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{source} is no file, and a folder tells its own {' and '.join(wrong)}: leave out --{', --'.join(wrong)}.")
        converted = _folder(source, variant=variant, revision=revision, local_files_only=local_files_only)
    converted = converted._replace(parts={name: _checked(part) for name, part in converted.parts.items()})
    _writing.write(folder, converted, None if dtype is None else DTYPES[dtype])
    return converted


def _file(path: Path, kind: str | None, *, weights: str, prediction: str | None, overrides: dict[str, Any]) -> Converted:
    state = _sources.state(path)
    kind = kind or overrides.get("_class_name")
    if kind is None and not _ldm.is_ldm(state):
        if any(name.startswith("encoder.down.") for name in state):
            state, kind = {_ldm.VAE + name: tensor for name, tensor in state.items()}, "ldm"
        elif any(".transformer_blocks." in name and name.startswith("input_blocks.") for name in state):
            state, kind = {_ldm.UNET + name: tensor for name, tensor in state.items()}, "ldm"
        elif (kind := _own.recognise(state)) is None:
            raise ValueError(
                f"{path} is of no kind that is recognised by its tensors ({_files.listed(sorted(state), 3)}): give --kind and --config; "
                f"known are ldm (Stable Diffusion) and {', '.join(_models.names())}."
            )
    if kind in (None, "ldm"):
        if wrong := sorted(name for name in overrides if name not in (*_ldm.NETWORKS, "scheduler") or not isinstance(overrides[name], dict)):
            names = ", ".join((*_ldm.NETWORKS, "scheduler"))
            raise ValueError(f"The configuration of a Stable Diffusion has the components {names}, each with its entries; got {', '.join(wrong)}.")
        return _ldm.convert(state, weights=weights, prediction=prediction, overrides=overrides, source=str(path))
    if prediction is not None:
        raise ValueError(f"prediction={prediction!r} is for Stable Diffusion alone, and {path} is a {kind}: leave it out.")
    return _own.convert(state, kind, weights=weights, overrides=overrides, source=str(path))


def _part(folder: Path, variant: str | None, hint: str | None = None) -> Part:
    """A network in diffusers' layout, its configuration in today's words."""
    config, weights = _loading.configuration(folder, hint), _files.find_weights(folder, variant)
    module, _ = _models.read(config, str(folder / _files.CONFIG))
    kept = {name: config[name] for name in _models.family_of(module).ignored if name in config}
    return Part({**kept, **_models.describe(module)}, dict(_tensors.read(weights)), str(weights))


def _folder(source: str | os.PathLike[str], *, variant: str | None, revision: str | None, local_files_only: bool) -> Converted:
    def wanted(root: Path) -> list[str]:
        return _pipeline.places(root) if (root / _files.PIPELINE).is_file() else ["."]

    folder = _hub.local(source, wanted, variant=variant, revision=revision, local_files_only=local_files_only)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no file and no folder at {folder}: give one, or the id org/name of a repository on the hub.")
    if not _files.regular(folder / _files.PIPELINE):
        scheduler = _files.scheduler_folder(folder) / _files.SCHEDULER
        return Converted({"": _part(folder, variant)}, _files.read_json(scheduler) if _files.regular(scheduler) else None)
    read, unknown = _pipeline.parts(folder)
    index = {name: [None, None] if name in unknown else value for name, value in _files.read_json(folder / _files.PIPELINE).items()}
    return Converted(
        {name: _part(folder / _files.place(folder, name), variant, hint) for name, hint in read.items()},
        _pipeline.scheduler(folder),
        index,
        tuple(sorted(unknown)),
        {name: folder / name for name in _pipeline.TOKENIZERS if (folder / name).is_dir()},
    )


def _checked(part: Part) -> Part:
    """The part with its tensors in today's words, each of which has its place in the module and fills it."""
    module, shapes = _models.read(part.config, f"The configuration of {part.source}")
    family = _models.family_of(module)
    named = _tensors.floats(family.tensors(list(part.tensors.items())), part.source)
    _rules.check(_rules.rules(shapes, family.lists), named, part.source)
    return part._replace(tensors=dict(named))
