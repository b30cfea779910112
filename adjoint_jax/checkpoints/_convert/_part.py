"""Helpers to read architectures from the names and shapes of tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .. import _files
from .._writing import Converted as Converted, Part as Part

State = Mapping[str, np.ndarray]
SHOWN = 10


def under(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def need(state: State, name: str, source: str) -> np.ndarray:
    """A matrix or kernel by name."""
    if name not in state:
        raise ValueError(f"{source} has no tensor {name}, by which its architecture is recognised: it is not a whole file of this kind.")
    if state[name].ndim < 2 or not state[name].size:
        raise ValueError(f"{source} has {name} {state[name].shape}, which tells no architecture: it is not a whole file of this kind.")
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
    return _files.listed(names, SHOWN)


def replaced(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    """A name with each rule `(pattern, replacement)` applied in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
