"""Damage to the files that `convert` reads by torch: pickles with code, with more than tensors, half written."""

import pickle
import warnings
import zipfile

import numpy as np

from .case import Case, mutation
from .folders import Evil


def torch_or_none():
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    return torch


@mutation("convert", weight=10)
def torch_file(case: Case) -> str:
    torch = torch_or_none()
    path, tensors = case.weights, case.tensors()
    path.unlink()
    case.suffix = case.pick([".ckpt", ".pt", ".pth", ".bin"])
    target = path.with_suffix(case.suffix)
    warnings.simplefilter("ignore")  # torch's, of what it does not like either
    if torch is None:
        target.write_bytes(b"\x80\x02}.")
        return "without torch"
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    name = case.pick(state)
    evil = Evil(case.marker)
    values = {
        "sound": state,
        "nested": {"state_dict": state, "epoch": 3},
        "evil": {**state, name: evil},
        "evil beside": {"state_dict": state, "callbacks": evil},
        "evil alone": evil,
        "list": [state],
        "number": {**state, name: 5},
        "names that are numbers": {**state, 5: state[name]},
        "nothing": {},
        "sparse": {**state, name: state[name].to_sparse()},
        "complex": {**state, name: state[name].to(torch.complex64)},
        "meta": {**state, name: torch.empty(3, device="meta")},
        "float8": {**state, name: state[name].to(torch.float8_e5m2)},
        "quantized": {**state, name: torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8)},
        "integers": {**state, name: state[name].to(torch.int32)},
        "not finite": {**state, name: state[name] / 0},
        "expanded": {**state, name: torch.zeros(1).expand(10**7, 10**6)},
        "object array": {**state, name: np.array([evil], object)},
        "deep": {"state_dict": {"state_dict": {"state_dict": state}}},
        "long name": {**state, "x" * 9000: state[name]},
        "line": {**state, "a\nb": state[name]},
    }
    how = case.pick([*values, "evil", "evil beside", "evil alone", "plain pickle", "cut", "bytes", "zip", "old", "old evil", "nested lists"])
    legacy = how.startswith("old")
    torch.save(values.get(how, {**state, name: evil} if how == "old evil" else state), target, _use_new_zipfile_serialization=not legacy)
    raw = bytearray(target.read_bytes())
    if how == "plain pickle":
        target.write_bytes(pickle.dumps({name: evil}))
    elif how == "cut":
        target.write_bytes(raw[: int(case.rng.integers(len(raw)))])
    elif how == "bytes":
        for _ in range(5):
            raw[int(case.rng.integers(len(raw)))] = int(case.rng.integers(256))
        target.write_bytes(raw)
    elif how == "nested lists":
        target.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    elif how == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(evil))
            archive.writestr("archive/version", "3")
    return f"{case.suffix} {how}"
