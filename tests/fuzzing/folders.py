"""Damage to folders: files missing, renamed, links and pipes in their place, shards that lead astray, pickles with code in them."""

import json
import os
import pickle
from pathlib import Path

import numpy as np

from .case import ALL, FOLDERS, TENSORS, Case, mutation
from .reader import write

INDEX = "diffusion_pytorch_model.safetensors.index.json"


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(case: Case) -> bytes:
    return pickle.dumps({"conv_in.weight": Evil(case.marker)}, protocol=case.pick([0, 2, 4]))


def any_file(case: Case) -> Path:
    return case.pick(sorted(path for path in case.folder.rglob("*") if path.is_file()))


@mutation(*ALL, weight=3)
def missing(case: Case) -> str:
    path = any_file(case)
    path.unlink()
    return path.name


@mutation(*ALL, weight=8)
def something_else_in_its_place(case: Case) -> str:
    path = any_file(case)
    raw = path.read_bytes()
    path.unlink()
    how = case.pick(["folder", "pipe", "loop", "dangling", "outside", "device", "zero device", "to folder", "full folder", "socket"])
    if how == "folder":
        path.mkdir()
    elif how == "full folder":
        path.mkdir()
        (path / path.name).write_bytes(raw)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()
            os.chdir(path.parent)  # the names of sockets are short
            try:
                opened.bind(path.name)
            finally:
                os.chdir(here)
    elif how == "outside":
        outside = case.folder.parent / "outside"
        outside.write_bytes(raw)
        path.symlink_to(outside)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/null", "zero device": "/dev/zero", "to folder": "/"}[how])
    return f"{how} for {path.name}"


@mutation(*ALL, weight=3)
def file_renamed(case: Case) -> str:
    path = any_file(case)
    new = case.pick(
        ["x.safetensors", "model.bin", f"{path.name}.bak", path.name.upper(), f".{path.name}", "config.json.txt", "a\nb.safetensors", "model.ckpt"]
    )
    path.rename(path.with_name(new))
    return f"{path.name} to {new!r}"


@mutation(*FOLDERS, "lora", weight=4)
def pickle_beside(case: Case) -> str:
    name = case.pick(
        ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl", "pytorch_lora_weights.bin", "adapter_model.bin"]
    )
    (case.model / name).write_bytes(pickled(case))
    return name


@mutation(*TENSORS, weight=4)
def pickle_instead(case: Case) -> str:
    path = case.weights
    name = case.pick([path.name, "pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
    path.unlink()
    path.with_name(name).write_bytes(pickled(case))
    case.suffix = Path(name).suffix
    return name


@mutation(*FOLDERS, "tokenizer", weight=2)
def code_beside(case: Case) -> str:
    name = case.pick(["modeling.py", "__init__.py", "config.py", "tokenization.py", "config.json.py"])
    (case.model / name).write_text(f"import os\nos.mkdir({str(case.marker)!r})\n")
    return name


@mutation(*FOLDERS, weight=4)
def variants(case: Case) -> str:
    path = case.weights
    stem = path.name.removesuffix(".safetensors")
    tensors = case.tensors()
    case.variant = case.pick([None, "fp16", "fp16", "..", "", "a/b", "fp16.x", "x" * 300, "non_ema"])
    name = case.pick([f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", f"{stem}.bf16.safetensors"])
    if case.pick([True, False]):
        path.rename(path.with_name(name))
        return f"{name} alone, variant {str(case.variant)[:9]}"
    if case.variant is None:  # not to be taken
        tensors = {key: tensor + 1 for key, tensor in tensors.items()}
    write(path.with_name(name), tensors)
    return f"{name} beside, variant {str(case.variant)[:9]}"


@mutation(*FOLDERS, "lora", weight=2)
def second_file(case: Case) -> str:
    path = case.weights
    tensors = {key: tensor + 1 for key, tensor in case.tensors().items()}
    names = ["zzz.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"]
    name = case.pick(names[: 2 + (case.subject.kind == "model")])
    write(path.with_name(name), tensors)
    return name


def shard(case: Case) -> dict[str, str]:
    """Makes two files and their index of the weights."""
    path, tensors = case.weights, case.tensors()
    stem = path.name.removesuffix(".safetensors")
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        write(path.with_name(name), half)
    path.unlink()
    return {key: name for name, half in zip(names, halves, strict=True) for key in half}


PLACES = (
    "../outside.safetensors", "/tmp/outside.safetensors", "..", ".", "", "a/b.safetensors", "x.bin", "model.bin", "C:\\x.safetensors",
    "absent.safetensors", None, 5, [], "a\nb.safetensors", "x" * 300 + ".safetensors", "./{0}", "{0}/", "{0}\x00", "x" * 9000, "\ud800.safetensors",
)  # fmt: skip


@mutation(*FOLDERS, weight=16)
def shards(case: Case) -> str:
    where = case.weights.parent
    index = where / case.weights.name.replace(".safetensors", ".safetensors.index.json")
    places = shard(case)
    files = sorted(set(places.values()))
    ways = ["sound", "elsewhere", "elsewhere", "elsewhere", "swapped", "missing file", "extra file", "not listed", "not there",
            "one file twice", "total",
            "empty", "no map", "list", "index twice", "renamed", "outside", "loop", "pipe", "folder", "pickle", "all pickles",
            "same", "chain"]  # fmt: skip
    how = case.pick(ways)
    first, name = where / files[0], case.pick(places)
    value = {"metadata": {"total_size": 1}, "weight_map": places}
    if how == "elsewhere":
        target = case.pick(PLACES)
        how = f"elsewhere {str(target)[:20]!r}"
        places[name] = target.format(places[name]) if isinstance(target, str) else target
        write(where.parent / "outside.safetensors", {name: np.zeros(2, np.float32)})
    elif how == "swapped":
        places[name] = next(each for each in files if each != places[name])
    elif how == "missing file":
        first.unlink()
    elif how == "extra file":
        write(where / "model-00003-of-00003.safetensors", {"x": np.zeros(2, np.float32)})
    elif how == "not listed":
        del places[name]
    elif how == "not there":
        places["absent.weight"] = files[0]
    elif how == "one file twice":
        (where / files[1]).write_bytes(first.read_bytes())
    elif how == "total":
        value["metadata"] = {"total_size": "x" * 9000}
    elif how == "empty":
        value["weight_map"] = {}
    elif how == "no map":
        del value["weight_map"]
    elif how == "list":
        value["weight_map"] = [places]
    elif how == "index twice":
        (where / ("model.safetensors.index.json" if "diffusion" in index.name else INDEX)).write_text(json.dumps({"weight_map": {}}))
    elif how == "renamed":
        index = where / "x.safetensors.index.json"
    elif how == "outside":
        first.rename(where.parent / "outside.safetensors")
        first.symlink_to(where.parent / "outside.safetensors")
    elif how == "chain":
        places[name] = index.name
    elif how in ("loop", "pipe", "folder", "pickle", "all pickles"):
        first.unlink()
        if how == "loop":
            first.symlink_to(first.name)
        elif how == "pipe":
            os.mkfifo(first)
        elif how == "folder":
            first.mkdir()
        elif how == "pickle":
            first.write_bytes(pickled(case))
        else:
            first.with_suffix(".bin").write_bytes(pickled(case))
            value["weight_map"] = {key: file.replace("safetensors", "bin") for key, file in places.items()}
    elif how == "same":
        value["weight_map"] = dict.fromkeys(places, files[0])
    index.write_text(json.dumps(value))
    return how


@mutation("pipeline", weight=4)
def component_folder(case: Case) -> str:
    name = case.pick(["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
    path = case.folder / name
    how = case.pick(["renamed", "file", "loop", "outside", "pipe", "empty"])
    if how == "outside":
        path.rename(case.folder.parent / "outside")
        path.symlink_to(case.folder.parent / "outside")
        return f"{how} {name}"
    path.rename(case.folder / f"{name}_")
    if how == "file":
        path.write_text("x")
    elif how == "loop":
        path.symlink_to(name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.mkdir()
    return f"{how} {name}"


@mutation(*ALL, weight=2)
def no_folder(case: Case) -> str:
    how = case.pick(["gone", "file", "loop", "pipe", "empty"])
    case.folder.rename(case.folder.with_name("elsewhere"))
    if how == "file":
        case.folder.write_text("{}")
    elif how == "loop":
        case.folder.symlink_to(case.folder.name)
    elif how == "pipe":
        os.mkfifo(case.folder)
    elif how == "empty":
        case.folder.mkdir()
    return how
