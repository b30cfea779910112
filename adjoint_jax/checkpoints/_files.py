"""Files of a checkpoint: found by fixed names, read without running anything that they hold, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

CONFIG, SCHEDULER, WEIGHTS = "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"
# In the order of preference; the full precision and, of diffusers' two sets of weights, the averaged one come first.
WEIGHT_NAMES = (WEIGHTS, "model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def folders(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The folders of the network and of the scheduler: `path` itself, or a pipeline's `unet` and `scheduler`."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder at {folder}: give a local folder in diffusers' layout, and download one from a hub beforehand.")
    if not (folder / CONFIG).is_file() and (folder / "unet").is_dir():
        return folder / "unet", folder / "scheduler"
    return folder, folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: a folder in diffusers' layout, or a pipeline with a unet folder, was expected.")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or write it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} where an object of names and values was expected.")
    return value


def find_weights(folder: Path) -> Path:
    """The one safetensors file of a folder."""
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise ValueError(f"{folder} has {len(found)} safetensors files ({', '.join(found[:5])}): keep one, named {WEIGHTS}, with all tensors in it.")
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise ValueError(
            f"{folder} has pickled weights only ({', '.join(pickles[:5])}), and nothing is unpickled here because a pickle can run code: "
            "convert it where torch is installed, with diffusers' save_pretrained(folder, safe_serialization=True)."
        )
    raise FileNotFoundError(f"{folder} has no weights: {WEIGHTS} was expected.")


def read_tensors(path: Path) -> list[tuple[str, np.ndarray]]:
    """The named tensors of a safetensors file, in their own dtypes."""
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file ({error}): fetch it again.") from error
    if odd := sorted({str(entry["dtype"]) for _, entry in entries} - set(DTYPES)):
        raise ValueError(f"{path} holds tensors of dtype {', '.join(odd)} where floats were expected: convert it to {', '.join(DTYPES)}.")
    return [(name, np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])) for name, entry in entries]


def write_whole(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_folder(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: dict[str, np.ndarray], scheduler: Mapping[str, Any] | None
) -> None:
    """Writes a checkpoint; `config.json` comes last, so that an interrupted folder is not taken for a whole one."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: give a new path, or remove it first.")
    files = {WEIGHTS: safetensors.numpy.save(tensors, metadata={"format": "pt"})}
    files |= {SCHEDULER: to_json(scheduler)} if scheduler is not None else {}
    files |= {CONFIG: to_json(config)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, data)
