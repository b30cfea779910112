"""Reading a LoRA's file: its tensors placed at the layers of the networks given, and all that does not fit, in words."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict

from . import _files, _lora_names, _models, _rules, _tensors

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
LARGEST = 1e9  # alpha
FOREIGN = ("pissa", "olora", "corda", "loftq")  # ways to begin that change W itself
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "bias": (None, "none"),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (None, False)),
    **dict.fromkeys(
        ("modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"), (None, [], {})
    ),
}
"""Entries of peft's configuration, and their values that leave W + scale up down as it is."""


def kernels(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of a tree of parameters, by their paths."""
    return {"/".join(path): leaf for path, leaf in cast(dict, flatten_dict(tree)).items() if path[-1] == "kernel"}


class Layers(NamedTuple):
    """The layers of a network that a LoRA can correct: kernels by their names in its state dict, and names by all spellings."""

    kernels: dict[str, tuple[str, Any]]
    names: dict[str, str]


def layers(module: nn.Module) -> Layers:
    """Those of a module."""
    lists = _models.family_of(module).lists
    places = kernels(_models.shapes(module)).items()
    table = {_rules.torch_name(tuple(path.split("/")), lists).removesuffix(".weight"): (path, leaf) for path, leaf in places}
    return Layers(table, _lora_names.spellings(table, getattr(module, "layers_per_block", None)))


def listed(problems: list[str]) -> str:
    """The problems in one line, the first of them where there are many."""
    room = [_files.shown(problem, 300) for problem in problems[: _rules.SHOWN]]
    while len(room) > 1 and sum(map(len, room)) > 2000:
        room.pop()
    return "; ".join(room) + (f"; and {len(problems) - len(room)} more" if len(problems) > len(room) else "")


def find(path: Path) -> Path:
    """The safetensors file: `path` itself, or the one in that folder."""
    if path.is_dir():
        names = [name for name in FILES if (path / name).is_file()]
        return path / names[0] if names else _files.find_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no LoRA at {path}: give a safetensors file, or a folder with one.")
    return path


def config(file: Path) -> dict[str, Any]:
    """peft's configuration: in the file's metadata, where diffusers puts it, or beside the file."""
    if (beside := file.with_name("adapter_config.json")).is_file() and file.name == FILES[1]:
        return _checked(_files.read_json(beside), beside)
    try:
        with safetensors.safe_open(file, "np") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({_files.shown(str(error), 200)}): fetch it again.") from error
    source = f"lora_adapter_metadata of {file}"
    return _checked(_files.parse_json(text.encode(), source), source)


def _simple(pattern: str) -> bool:
    """Whether a pattern is a regular expression, and none that takes for ever: it repeats little, and nothing that repeats itself."""
    return bool(re.compile(pattern)) and len(pattern) < 1000 and len(re.findall(r"[*+{]", pattern)) <= 3 and not re.search(r"\)[*+{]", pattern)


def _checked(config: dict[str, Any], source: Any) -> dict[str, Any]:
    """The configuration itself, where every alpha is a finite number and every pattern a regular expression."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST

    def sound(name: str, value: Any) -> bool:
        if value is None or name not in ("lora_alpha", "alpha_pattern"):
            return True
        if name == "lora_alpha":
            return number(value)
        try:
            return isinstance(value, dict) and all(_simple(pattern) and number(alpha) for pattern, alpha in value.items())
        except re.error:
            return False

    if odd := [key for key, value in config.items() if not sound(key.rpartition(".")[2], value)]:
        raise ValueError(
            f"{source} has {_files.shown(odd[0])}={_files.shown(repr(config[odd[0]]))} where a number, "
            "or numbers by pattern, were expected: fetch it again."
        )
    return config


def foreign(config: Mapping[str, Any]) -> list[str]:
    """What peft's configuration asks for beyond W + scale up down."""
    entries = [(key.rpartition(".")[2], value) for key, value in config.items()]
    odd = [f"{_files.shown(key)}={_files.shown(repr(value))}" for key, value in entries if value not in PLAIN.get(key, (value,))]
    odd += [
        f"{_files.shown(key)}={_files.shown(repr(value))}"
        for key, value in entries
        if key == "init_lora_weights" and str(value).lower().startswith(FOREIGN)
    ]
    return [f"its configuration has {_files.listed(odd, 5, 300)}, which is not W + scale up down"] if odd else []


def gather(named: Any, tables: Mapping[str, Layers], drop: Sequence[str]) -> tuple[dict[tuple[str, str], dict[str, np.ndarray]], list[str]]:
    """The tensors of a file by (part, layer) and half, and what could not be placed."""
    sole = next(iter(tables)) if len(tables) == 1 else next((part for part in _lora_names.DENOISERS if part in tables), "")
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    problems, absent = [], {}
    for name, tensor in named:
        key = name if name.isprintable() else repr(name)
        if kind := _lora_names.refused(key):
            problems.append(f"{key} is of a kind that is not computed here ({kind})")
            continue
        parsed = _lora_names.parse(key, tables)
        part = (parsed.part or sole) if parsed else ""
        if parsed is None:
            problems.append(f"{key} is not a key of a LoRA")
        elif part in drop:
            pass
        elif part not in tables:
            absent[part] = absent.get(part, 0) + 1
        elif (layer := tables[part].names.get(parsed.layer)) is None:
            problems.append(f"{key} names no layer of the {part} given")
        elif parsed.half != "alpha" and not _tensors.is_float(tensor):
            problems.append(f"{key} holds numbers of dtype {tensor.dtype} where floats were expected")
        elif not np.isfinite(tensor).all():
            problems.append(f"{key} is not finite")
        elif found.setdefault((part, layer), {}).setdefault(parsed.half, tensor) is not tensor:
            problems.append(f"{key} is given twice")
    problems += [f"{count} tensors are for {part!r}: give that network in modules, or its name in drop" for part, count in absent.items()]
    return found, problems


def factors(
    name: str, halves: Mapping[str, np.ndarray], shape: tuple[int, ...], setting: tuple[float | None, bool], problems: list[str]
) -> tuple[np.ndarray, ...] | None:
    """(down, up, scale) in Flax's layout from the halves in torch's, or None and one more problem."""
    if missing := [half for half in ("down", "up") if half not in halves]:
        problems.append(f"{name} has no {missing[0]} half")
        return None
    down, up, alpha = halves["down"], halves["up"], halves.get("alpha")
    rank, window = down.shape[0] if down.ndim else 0, shape[:-2]
    # 1x1 convolutions and dense layers are written either way.
    wanted = _squeezed((rank, shape[-2], *window)), (shape[-1], rank)
    fits = (_squeezed(down.shape), _squeezed(up.shape)) == wanted and (alpha is None or alpha.size == 1)
    if not fits or not rank:
        torch = (shape[-1], shape[-2], *window)
        problems.append(f"{name} {torch} has down {down.shape}, up {up.shape}{'' if alpha is None else f', alpha {alpha.shape}'}")
        return None
    default, rooted = setting
    alpha = float(alpha.reshape(())) if alpha is not None else rank if default is None else default
    down = np.moveaxis(down.reshape(rank, shape[-2], *window), (0, 1), (-1, -2))
    return down, up.reshape(shape[-1], rank).T, np.asarray(alpha / (np.sqrt(rank) if rooted else rank))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the window of a 1x1 convolution."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape
