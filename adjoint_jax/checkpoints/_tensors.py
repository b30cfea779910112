"""Safetensors files as arrays that lie in the file until they are used, one file or the shards of an index; and their writing, a tensor at a time.

A file is 8 bytes of the header's length, the header (JSON: name -> dtype, shape, place), and the tensors' bytes. Its soundness (places inside of the
file, without gaps or overlaps, sizes that fit) is checked by the library; arrays are then views of the mapped file, so that it is not held in memory.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors

from . import _files
from ._family import Named

DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
INTEGERS: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
DIMENSIONS = 8
NAMES = {np.dtype(dtype): name for name, dtype in (DTYPES | INTEGERS).items()}


def mapped(path: Path) -> Named:
    """The named tensors of one safetensors file, in their own dtypes, as views of the file."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({_files.shown(str(error), 200)}): fetch it again."
        ) from error
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = _files.parse_json(data[8:start].tobytes(), f"The header of {path}")
    header.pop("__metadata__", None)
    known = DTYPES | INTEGERS
    if odd := sorted({entry["dtype"] for entry in header.values()} - set(known)):
        raise ValueError(f"{path} holds tensors of dtype {', '.join(odd)} where floats were expected: convert it to {', '.join(DTYPES)}.")

    def view(entry: dict[str, Any]) -> np.ndarray:
        begin, end = entry["data_offsets"]
        return data[start + begin : start + end].view(known[entry["dtype"]]).reshape(entry["shape"])

    if deep := [name for name, entry in header.items() if len(entry["shape"]) > DIMENSIONS]:
        raise ValueError(f"{path} has tensors of more than {DIMENSIONS} dimensions ({_files.listed(deep, 5)}): fetch it again.")
    return [(name, view(entry)) for name, entry in header.items()]


def is_float(tensor: np.ndarray) -> bool:
    """Whether a tensor holds numbers that weights can be."""
    return tensor.dtype in map(np.dtype, DTYPES.values())


def floats(named: Named, source: Any) -> Named:
    """The same tensors, which must not be integers."""
    if odd := sorted({NAMES[tensor.dtype] for _, tensor in named if not is_float(tensor)}):
        names = _files.listed(sorted(name for name, tensor in named if NAMES[tensor.dtype] in odd), 5)
        raise ValueError(f"{source} holds tensors of dtype {', '.join(odd)} where floats were expected ({names}): convert it to {', '.join(DTYPES)}.")
    return named


def cast(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """A tensor in another dtype, which must be able to hold its numbers."""
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if result.dtype != tensor.dtype and not np.isfinite(result).all() and np.isfinite(tensor).all():
        raise ValueError(f"{_files.shown(name)} holds numbers that are beyond {result.dtype}: give a wider dtype, or fetch it again.")
    return result


def _root(folder: Path) -> Path:
    """What the links of a folder may lead to: the folder; in the hub's cache, `models--org--name/snapshots/COMMIT/...`, what belongs to the model."""
    whole = folder.resolve()
    for parent in (whole, *whole.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return parent.parent.parent
    return whole


def _shards(index: Path) -> dict[str, set[str]]:
    """The tensors that an index expects in each file beside it."""
    places = _files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map of tensors to files: fetch it again.")
    shards: dict[str, set[str]] = {}
    root = _root(index.parent)
    for name, file in places.items():
        if not _files.plain(file) or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index} places {_files.shown(name)} in {_files.shown(file)}, which is no name of a safetensors file beside it: fetch it again."
            )
        shards.setdefault(file, set()).add(name)
    for file in shards:
        if not _files.regular(index.parent / file):
            raise FileNotFoundError(f"{index.parent} has no {file}, one of the {len(shards)} files of {index.name}: fetch the folder again.")
        if not (index.parent / file).resolve().is_relative_to(root):
            raise ValueError(f"{index.parent / file} is a link that leaves {root}: put the file itself in its place.")
    return shards


def read(path: Path) -> Named:
    """The named tensors of a safetensors file, or of the files of an index; integers among them, for a family may know and drop them."""
    if path.suffix != ".json":
        return mapped(path)
    named: Named = []
    problems: list[str] = []
    for file, expected in sorted(_shards(path).items()):
        tensors = mapped(path.parent / file)
        found = {name for name, _ in tensors}
        problems += [f"{file[:60]} lacks {name}" for name in sorted(expected - found)]
        problems += [f"{file[:60]} has {name} beyond" for name in sorted(found - expected)]
        named += tensors
    if problems:
        raise ValueError(f"{path} does not fit its files: {_files.listed(problems, 20, 200)}; fetch the folder again.")
    return named


def writer(named: Iterable[tuple[str, np.ndarray]], dtype: Any = None) -> Callable[[BinaryIO], None]:
    """Writes a safetensors file in the tensors' own dtype, or in another one, into which each is cast as it is written."""
    kind = None if dtype is None else np.dtype(dtype)
    ordered = sorted(named, key=lambda pair: (-pair[1].itemsize, pair[0]))  # so that each lies at a multiple of its size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in ordered:
        to = kind or tensor.dtype
        size = math.prod(tensor.shape) * to.itemsize
        header[name] = {"dtype": NAMES[to], "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            file.write(np.ascontiguousarray(tensor if kind is None else cast(name, tensor, kind)).reshape(-1).view(np.uint8).data)

    return write
