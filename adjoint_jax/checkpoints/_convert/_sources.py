"""The tensors of one file: safetensors, or a torch pickle by torch's own reader of weights alone, which runs nothing and refuses all else."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import _files, _tensors

NESTED = ("state_dict", "model_state_dict", "module")  # under which a training checkpoint keeps its tensors


def state(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of a file, as views of it where that can be."""
    if path.suffix == ".safetensors":
        return dict(_tensors.mapped(path))
    if path.suffix not in _files.PICKLES:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}: a .safetensors file, or one of {', '.join(_files.PICKLES)}, was expected.")
    return {name: _array(name, tensor, path) for name, tensor in _tensors_of(_unpickled(path), path).items()}


def _unpickled(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path} is a torch pickle, which torch has to read: pip install torch, or give the safetensors file.") from error
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before 2020 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile or torch: whatever a damaged or strange file brings about
        reason = _files.shown(" ".join(str(error).split()), 200).rstrip(" .")
        raise ValueError(
            f"{path} is not read, for it is damaged or holds more than tensors, which could be code ({type(error).__name__}: {reason}): "
            "give the safetensors file, or write its state_dict alone where you trust it."
        ) from error


def _tensors_of(loaded: Any, path: Path) -> dict[str, Any]:
    import torch

    for name in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds a {type(loaded).__name__} where a state_dict was expected: give the weights of one network or pipeline.")
    if odd := [_files.shown(str(name), 50) for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]:
        raise ValueError(f"{path} holds {len(odd)} entries that are no named tensors ({', '.join(odd[:5])}): give a state_dict alone.")
    return loaded


def _array(name: str, tensor: Any, path: Path) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    try:
        array = tensor.view(torch.int16).numpy().view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        if array.dtype not in _tensors.NAMES or tensor.untyped_storage().nbytes() < array.nbytes:
            raise TypeError("a kind of number, or a view of fewer, that no safetensors file has")
        return array
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} has {_files.shown(name)} as a {tensor.layout} tensor of {tensor.dtype}, which numpy does not know or "
            "safetensors cannot hold: write it as a dense one of float32."
        ) from error
