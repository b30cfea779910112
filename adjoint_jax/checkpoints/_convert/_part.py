"""What a conversion makes of a file: networks by name, and helpers to read architectures from the shapes of tensors."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import _models

State = Mapping[str, np.ndarray]
SHOWN = 10


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


def under(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def need(state: State, name: str, source: str) -> np.ndarray:
    """A tensor by name."""
    if name not in state:
        raise ValueError(f"{source} has no tensor {name}, by which its architecture is recognised: it is not a whole file of this kind.")
    return state[name]


def count(state: State, pattern: str) -> int:
    """How many different numbers stand where the pattern has its group."""
    found = {match[1] for name in state if (match := re.match(pattern, name))}
    return len(found)


def renamed(state: State, rename: Any, source: str) -> dict[str, np.ndarray]:
    """The tensors under new names; each has one, and no two the same."""
    names = {name: rename(name) for name in state}
    if unknown := sorted(name for name, new in names.items() if new is None):
        raise ValueError(f"{source} has {len(unknown)} tensors that belong to no known place ({listed(unknown)}): it is of another architecture.")
    result = {new: state[name] for name, new in names.items()}
    if len(result) != len(names):
        raise ValueError(f"{source} has two tensors for one place: it is of another architecture.")
    return result


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def replaced(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    """A name with each rule `(pattern, replacement)` applied in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
