"""Values of a configuration, checked before anything is built from them: of the field's kind, finite, and within bounds that no network exceeds.

A configuration is a stranger's file. Without bounds `num_layers: 1000000000` would loop, and a table of positions for `sample_size: 1000000` would
fill the memory, before any tensor could be found missing.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from . import _files

MOST, LENGTH, DEPTH, TEXT = 2**20, 64, 4, 200
LEVELS = 16  # resolutions of a UNet
TRAINED = 100_000  # training steps
# Names whose values size a loop or a table; the first pattern that is found in the name counts.
BOUNDS = (
    (r"layers_per_block|num_res", 32),
    (r"layers|depth|blocks|num_stages", 256),
    (r"sample_size|image_size|input_size|img_resolution|resolution$|pos_embed_max_size", 4096),
)
POSITIVE = r"channels$|num_groups$|_heads$|_size$|^hidden_|^num_layers$|^num_hidden_layers$|^layers_per_block$|^depth$|^features$|^classes$"
FILLED = r"block_types$|block_out_channels$|channel_mult$|^features$|resample_filter$"
FACTOR = r"(^scal(ing|e)|_scale)_factor$|^sigma_data$"
NONNEGATIVE = r"eps$|epsilon$|dropout|_prob$"


def _words(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(_words, typing.get_args(annotation)))
    if _is_sequence(annotation):
        return f"a list of {_words(next(iter(typing.get_args(annotation)), Any))}"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(annotation, "a value")


def _is_sequence(annotation: Any) -> bool:
    origin = typing.get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str


def _of_kind(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON is what a field was declared to hold. An integer is a number, a bool is neither; what is not known here passes."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_of_kind(value, each) for each in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is type(None):
        return value is None
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if _is_sequence(annotation):
        each = [kind for kind in typing.get_args(annotation) if kind is not Ellipsis]
        if not isinstance(value, (list, tuple)):
            return False
        kinds = each if len(each) == len(value) and len(each) > 1 else (each or [Any])[:1] * len(value)
        return all(map(_of_kind, value, kinds))
    return True


def _problem(name: str, value: Any, default: Any, depth: int = 0) -> str:
    """What is wrong with a value whatever its kind, in a few words; empty where nothing is."""
    if isinstance(value, (list, tuple, dict)):
        length = LEVELS if "block" in name else LENGTH
        if len(value) > length or depth >= DEPTH:
            return f"at most {length} entries in {DEPTH} levels"
        if not value and depth == 0 and re.search(FILLED, name):
            return "at least one entry"
        each = value.values() if isinstance(value, dict) else value
        return next(filter(None, (_problem(name, item, default, depth + 1) for item in each)), "")
    if isinstance(value, str):
        return f"at most {TEXT} letters" if len(value) > TEXT else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float) and not math.isfinite(value) and value != default:
        return "a finite number"
    if isinstance(value, int):
        most = next((bound for pattern, bound in BOUNDS if re.search(pattern, name)), MOST)
        zero = default == 0 or (depth > 0 and "layers" in name)
        least = 1 if re.search(POSITIVE, name) and not zero else 0
        least = min(least, default) if type(default) is int else least
        if not least <= value <= most:
            return f"between {least} and {most}"
    if value <= 0 and re.search(FACTOR, name):
        return "a positive number"
    return "no negative number" if value < 0 and re.search(NONNEGATIVE, name) else ""


def check(module: type[nn.Module], given: Mapping[str, Any], source: Any) -> None:
    """Raises one ValueError that names each value which is not of its field's kind, or outside of what any network has."""
    problems = []
    for field in dataclasses.fields(module):
        if field.name not in given:
            continue
        value, default = given[field.name], None if field.default is dataclasses.MISSING else field.default
        wanted = _problem(field.name, value, default)
        if not _of_kind(value, field.type) and not (value == default and type(value) is type(default)):
            wanted = _words(field.type)
        if wanted:
            problems.append(f"{field.name}={_short(value)} ({wanted} was expected)")
    if problems:
        raise ValueError(
            f"{source} has a value of the wrong kind: {_files.listed(problems, 10, 2 * TEXT)}; compare it with one that diffusers wrote."
        )


def check_scheduler(config: Mapping[str, Any], source: Any) -> None:
    """The same for the numbers of a scheduler's configuration that a process is made of."""
    for name in ("num_train_timesteps", "beta_start", "beta_end", "shift", "snr_shift_scale", "trained_betas"):
        value = config.get(name)
        each = value if name == "trained_betas" and isinstance(value, list) else [] if value is None else [value]
        sound = all(type(item) in (int, float) and abs(item) < 1e9 for item in each) and len(each) <= TRAINED
        if not sound or (name == "num_train_timesteps" and each and not (type(value) is int and 0 < value <= TRAINED)):
            raise ValueError(f"{source} has {name}={_short(value)} where finite numbers were expected, of steps 1 to {TRAINED}: fetch it again.")


def _short(value: Any) -> str:
    return _files.shown(repr(value), TEXT // 2)


def guarded(build: Callable[[], Any], source: Any, advice: str = "compare it with one that diffusers wrote") -> Any:
    """What `build` returns, an error of arithmetic or of kinds inside of it being one of the configuration; so are errors of JAX and numpy."""
    try:
        return build()
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError, ValueError) as error:
        text = str(error)
        if isinstance(error, ValueError) and text.endswith(".") and text.isprintable():  # one of ours
            raise
        raise ValueError(f"{source} has a value of the wrong kind ({_files.shown(text, TEXT)}): {advice}.") from error
