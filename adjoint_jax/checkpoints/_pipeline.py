"""A pipeline: the folders that `model_index.json` names, each with a network, a scheduler or a tokenizer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from . import _files, _hub, _loading, _models, _rules, _writing

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
NEEDED = ("unet", "transformer", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Pipeline(NamedTuple):
    """What `load_pipeline` returns.

    Fields:
        components: `(module, params)` by name: unet or transformer, vae, text_encoder, text_encoder_2.
        scheduler: the contents of `scheduler_config.json`; empty where the pipeline has none.
        tokenizers: the folders of the tokenizers by name: tokenizer, tokenizer_2, tokenizer_3.
        config: the contents of `model_index.json`.
        unknown: the classes by name of the components that have no Flax module here and were not read: T5 (text_encoder_3), safety checkers.
    """

    components: dict[str, tuple[nn.Module, dict[str, Any]]]
    scheduler: dict[str, Any]
    tokenizers: dict[str, Path]
    config: dict[str, Any]
    unknown: dict[str, str]


def classes(folder: Path) -> dict[str, str]:
    """The components of a pipeline and their classes. Entries that are no pair are options, those of nulls components left out."""
    source, config = folder / _files.PIPELINE, _files.read_json(folder / _files.PIPELINE)
    listed = {}
    for name, entry in config.items():
        if not name.startswith("_") and isinstance(entry, list):
            if not _files.plain(name) or len(entry) != 2 or not all(isinstance(each, str) or each is None for each in entry):
                raise ValueError(
                    f"{source} has {_files.shown(repr(name))}: {_files.shown(repr(entry))} where a name and a pair of names were expected."
                )
            if entry[1] is not None:
                listed[name] = entry[1]
    if not any(name in listed for name in _files.DENOISERS):
        raise ValueError(
            f"{source} names no unet and no transformer, but {_files.listed(sorted(listed), 10) or 'nothing'}: use load_model with subfolder=."
        )
    return listed


def parts(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The classes of the networks that are read, and of the components that are not known."""
    listed, read, unknown = classes(folder), {}, {}
    for name, hint in listed.items():
        if name in NETWORKS:
            kind = _models.class_name(_loading.configuration(folder / _files.place(folder, name), hint))
            if name in NEEDED or _models.known(kind):
                read[name] = hint  # of an unknown class the reading complains
            else:
                unknown[name] = str(kind)
        elif name not in (*TOKENIZERS, "scheduler"):
            unknown[name] = hint
    return read, unknown


def places(folder: Path) -> list[str]:
    """The folders, below the pipeline's, of the networks that are read."""
    return [_files.place(folder, name) for name in parts(folder)[0]]


def scheduler(folder: Path) -> dict[str, Any] | None:
    """The contents of `scheduler_config.json`, which has to be there where `model_index.json` names a scheduler: another would sample otherwise."""
    file = _files.scheduler_folder(folder) / _files.SCHEDULER
    return _files.read_json(file) if "scheduler" in classes(folder) or _files.regular(file) else None


def load_pipeline(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Pipeline:
    """A pipeline in diffusers' layout: its networks as Flax modules with their parameters, and where the rest lies.

    Args:
        path: a local folder with `model_index.json`, or the id of one on the Hugging Face hub.
        variant, dtype, revision, local_files_only: as `load_model`. The variant is that of each network.

    Raises what `load_model` raises; ValueError where the pipeline has no unet or transformer, or a component that it needs is of an unknown class.

        components, scheduler, tokenizers, *_ = load_pipeline("stabilityai/stable-diffusion-2-1", variant="fp16")
        unet, params = components["unet"]
    """
    folder = _hub.local(path, places, variant=variant, revision=revision, local_files_only=local_files_only)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder at {folder}: give a local pipeline in diffusers' layout, or the id org/name of one on the hub.")
    read, unknown = parts(folder)
    components = {name: _loading.network(folder / _files.place(folder, name), variant=variant, dtype=dtype, hint=hint) for name, hint in read.items()}
    return Pipeline(
        components,
        scheduler(folder) or {},
        {name: folder / name for name in TOKENIZERS if (folder / name).is_dir()},
        _files.read_json(folder / _files.PIPELINE),
        unknown,
    )


def save_pipeline(path: str | os.PathLike[str], pipeline: Pipeline) -> None:
    """Writes what `load_pipeline` returned, with other parameters if wanted, as a pipeline that it and diffusers read back.

    Args:
        path: a folder that does not exist, or is empty.
        pipeline: components, scheduler and tokenizers to be written; those that are unknown are left out, and `model_index.json` says so.

    Raises FileExistsError for a path in use; ValueError for parameters that do not fit their module. Written whole or not at all.

        unet, params = pipeline.components["unet"]
        save_pipeline("tuned", pipeline._replace(components={**pipeline.components, "unet": (unet, tuned)}))
    """
    parts = {}
    for name, (module, params) in pipeline.components.items():
        source = f"the {name} to be saved"
        tensors = _rules.to_torch(_models.family_of(module), _models.shapes(module), params, source)
        parts[name] = _writing.Part(_models.describe(module), tensors, source)
    config = {name: [None, None] if name in pipeline.unknown else value for name, value in pipeline.config.items()}
    converted = _writing.Converted(parts, pipeline.scheduler or None, config, tokenizers=pipeline.tokenizers)
    _writing.write(_files.unused(path), converted)


def index(classes: Mapping[str, tuple[str, str] | None], pipeline: str) -> dict[str, Any]:
    """The contents of `model_index.json` from the library and class of each component; None for one left out."""
    return {"_class_name": pipeline, **{name: list(pair or (None, None)) for name, pair in classes.items()}}
