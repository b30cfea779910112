"""A folder to be written: networks with their configurations, a scheduler, tokenizers; whole or not at all."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from . import _files, _hub, _models, _tensors


class Part(NamedTuple):
    """One network: its configuration, and its tensors under the names of the layout that is written. A fault in either is reported under `source`."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    source: str


class Converted(NamedTuple):
    """What is written: one network, or a pipeline of several with its scheduler and tokenizers; `dropped` names what the source has beyond."""

    parts: dict[str, Part]
    scheduler: dict[str, Any] | None = None
    pipeline: dict[str, Any] | None = None
    dropped: tuple[str, ...] = ()
    tokenizers: Mapping[str, Path] = {}

    def classes(self) -> str:
        """The classes of the networks, in words."""
        return ", ".join(str(_models.class_name(part.config)) for part in self.parts.values())


def _below(name: str) -> str:
    return f"{name}/" if name else ""


def write(target: Path, converted: Converted, dtype: Any = None) -> None:
    """Writes the parts into folders of their names, or, where the name is empty, into the folder itself; of the given dtype, or each in its own."""
    files: dict[str, bytes | Callable[[BinaryIO], None]] = {}
    whole = converted.pipeline is not None or len(converted.parts) > 1
    for name, part in converted.parts.items():
        below = _below(name if whole else "")
        files[below + _files.weights_name(part.config)] = _tensors.writer(part.tensors.items(), dtype)
        files[below + _files.CONFIG] = _files.to_json(part.config)
    if converted.scheduler is not None:
        files[_below("scheduler" if whole else "") + _files.SCHEDULER] = _files.to_json(converted.scheduler)
    if converted.pipeline is not None:
        files[_files.PIPELINE] = _files.to_json(converted.pipeline)
    for name, folder in converted.tokenizers.items():
        texts = [file for file in sorted(folder.iterdir()) if _hub.DESCRIBING.fullmatch(f"{name}/{file.name}") and _files.regular(file)]
        files |= {f"{name}/{file.name}": file.read_bytes() for file in texts}
    with _files.whole_folder(target) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _files.write_whole(folder / name, data)
