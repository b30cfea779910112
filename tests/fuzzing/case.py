"""One copy of a checkpoint, about to be damaged, and the table of the ways to damage it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .reader import write
from .subjects import Subject

MARKER = "unpickled"
WEIGHED: list[tuple[Callable[..., Any], tuple[str, ...]]] = []
FOLDERS = ("model", "pipeline")
TENSORS = ("model", "lora", "pipeline", "convert")
ALL = (*TENSORS, "tokenizer")


def mutation(*kinds: str, weight: int = 1):
    """A way to damage a checkpoint of these kinds: a function of a `Case` that changes its files and returns a few words about how."""

    def register(function: Callable[["Case"], str | None]) -> Callable[["Case"], str | None]:
        WEIGHED.extend([(function, kinds)] * weight)
        return function

    return register


class Case:
    """A copy of a subject's folder, with the draws of one mutation.

    `variant` and `suffix` change how it is read; `model` is the folder of the network to be damaged, itself or one of a pipeline.
    """

    def __init__(self, subject: Subject, folder: Path, rng: np.random.Generator):
        self.subject, self.folder, self.rng, self.variant, self.suffix = subject, folder, rng, None, ".safetensors"
        part = self.pick(["unet", "vae", "text_encoder"]) if subject.kind == "pipeline" else ""
        self.model = folder / part if part else folder

    def pick(self, options: Any) -> Any:
        options = list(options)
        return options[int(self.rng.integers(len(options)))]

    @property
    def weights(self) -> Path:
        return next(iter(sorted(self.model.glob("*.safetensors"))))

    @property
    def config(self) -> Path:
        return self.model / "config.json"

    @property
    def marker(self) -> Path:
        return self.folder.parent / MARKER

    def header(self) -> tuple[dict[str, Any], bytes]:
        raw = self.weights.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:end]), raw[end:]

    def put(self, header: Any, data: bytes) -> None:
        """A safetensors file of a header, as it is or as text, and data."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + data)

    def tensors(self) -> dict[str, np.ndarray]:
        header, data = self.header()
        header.pop("__metadata__", None)
        return {name: np.frombuffer(data[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"]).copy() for name, entry in header.items()}

    def store(self, tensors: dict[str, np.ndarray]) -> None:
        write(self.weights, tensors)

    def json_file(self) -> Path:
        """One of the JSON files of the subject."""
        return self.pick(sorted(self.folder.rglob("*.json")))
