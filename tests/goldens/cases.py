"""The golden cases: from `golden/` of the shared data, or the committed subset of one case a method where those are absent.

The subset holds all its arrays in one; its index says where each begins. Written by `subset`.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from shared import ROOT

SUBSET = ROOT / "tests" / "fixtures" / "goldens.npz"
NET = ("W1", "b1", "A1", "W2", "b2", "A2", "W3", "b3")


class Case(NamedTuple):
    """One published run: `array("x0")` and the like are what it wrote."""

    name: str
    model: str
    meta: dict[str, Any]
    arrays: dict[str, Any]

    @property
    def peer(self) -> str:
        return self.name.split("/")[0]

    @property
    def label(self) -> str:
        return self.name.split("/")[1]

    def has(self, name: str) -> bool:
        return name in self.arrays

    def array(self, name: str) -> Any:
        return read(self.arrays[name])


def _folder() -> Any:
    """The golden folder of the shared data, or None."""
    asked = os.environ.get("AJ_SHARED")
    folder = (Path(asked) if asked else ROOT.parent / "shared") / "golden"
    return folder if asked or folder.exists() else None


@functools.cache
def _archive(file: str) -> Any:
    folder = _folder()
    return np.load(SUBSET if folder is None else folder / file)


@functools.cache
def _numbers() -> np.ndarray:
    return _archive("")["data"]


def read(place: Any) -> np.ndarray:
    """The array under a key of the goldens, or at [offset, shape] of the subset."""
    if isinstance(place, str):
        return _archive("golden_main.npz")[place]
    offset, shape = place
    return _numbers()[offset : offset + math.prod(shape)].reshape(shape)


@functools.cache
def _index() -> dict[str, Any]:
    folder = _folder()
    if folder is None:
        return json.loads(bytes(_archive("")["index"]))
    index = json.loads((folder / "index.json").read_text())["cases"]
    for name, entry in index.items():
        entry["arrays"] = {key: f"{name}/{key}" for key in entry["arrays"]}
    return {"cases": index}


@functools.cache
def parameters() -> dict[str, Any]:
    """The models' parameters, "net/W1" and the like."""
    if _folder() is None:
        return {key: read(place) for key, place in _index()["params"].items()}
    file = _archive("golden_params.npz")
    return {key: file[key] for key in file.files}


@functools.cache
def cases() -> dict[str, Case]:
    """All cases that are there, by name."""
    return {name: Case(name, entry["model"], entry["meta"], entry["arrays"]) for name, entry in _index()["cases"].items()}


def subset() -> set[str]:
    """The names of the committed cases, one a method."""
    return set(json.loads(bytes(np.load(SUBSET)["index"]))["cases"])


def complete() -> bool:
    """Whether the shared data are there, rather than the subset alone."""
    return _folder() is not None


def shared_file(name: str) -> str:
    """A text of the golden folder."""
    folder = _folder()
    assert folder is not None
    return (folder / name).read_text()
