"""Safetensors written and read by a few lines of numpy, apart from the package and the library that it uses."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

KINDS: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "I8": np.int8,
    "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
NAMES = {np.dtype(kind): name for name, kind in KINDS.items()}


def encode(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place, parts = 0, []
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        parts.append(np.ascontiguousarray(tensor).tobytes())
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place := place + len(parts[-1])]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    path.write_bytes(encode(tensors, metadata))


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors as float32. Raises whatever comes where a file is not whole."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in header(path).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        found[name] = np.frombuffer(raw[start + begin : start + end], KINDS[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)
    return found
