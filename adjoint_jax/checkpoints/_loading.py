"""One network, from a folder: its configuration, then its tensors, each checked against the other."""

from pathlib import Path
from typing import Any

import flax.linen as nn

from . import _files, _models, _rules, _tensors


def configuration(folder: Path, hint: str | None = None) -> dict[str, Any]:
    """`config.json`, of the class `hint` where it has no `_class_name` itself: a pipeline's word goes before transformers' `architectures`."""
    config = _files.read_json(folder / _files.CONFIG)
    if hint is None or "_class_name" in config or not (_models.known(hint) or _models.class_name(config) is None):
        return config
    return {**config, "_class_name": hint}


def network(folder: Path, *, variant: str | None, dtype: Any, hint: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The module and the parameters of one folder."""
    module, shapes = _models.read(configuration(folder, hint), str(folder / _files.CONFIG))
    weights = _files.find_weights(folder, variant)
    return module, _rules.to_flax(_models.family_of(module), shapes, _tensors.read(weights), str(weights), dtype)
