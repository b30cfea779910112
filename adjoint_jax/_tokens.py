"""Texts as numbers, by the package `tokenizers` (extra `text`) and a checkpoint's own files. Nothing of transformers is needed, and no code is read.

CLIP's rules where the folder has `vocab.json` and `merges.txt`: NFC, white space to one blank, lower case; the text cut into words, runs of
signs and single digits; each byte-pair-encoded, with `</w>` at its end.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from .checkpoints import _files

PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
NAMED = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
OPTIONS = ("single_word", "lstrip", "rstrip", "normalized")
LONGEST = 2**16  # where transformers has no length, it writes 10^30


def _bounded(path: Path) -> bool:
    """Whether there is a file, which must not be longer than any tokenizer's."""
    if not _files.regular(path):
        return False
    if path.stat().st_size > _files.JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, and {_files.JSON_BYTES} are the most that is read: fetch it again.")
    return True


def _json(path: Path) -> dict[str, Any]:
    return _files.read_json(path) if _files.regular(path) else {}


def _settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's options. `special_tokens_map.json` counts where the configuration does not list the added tokens itself, as in transformers."""
    config = _json(folder / "tokenizer_config.json")
    settings = config if "added_tokens_decoder" in config else config | _json(folder / "special_tokens_map.json")
    added = settings.get("added_tokens_decoder", {})
    numbered = isinstance(added, dict) and all(re.fullmatch(r"[0-9]{1,9}", number) for number in added)
    tokens = [*(added.values() if numbered else ()), *(settings[key] for key in NAMED if settings.get(key))]
    limit = settings.get("model_max_length")
    if not (limit is None or isinstance(limit, (int, float))):
        raise ValueError(f"{folder} has model_max_length={_files.shown(repr(limit))} where a number was expected: fetch its files again.")
    if not numbered or not all(map(_is_token, tokens)):
        raise ValueError(f"{folder} has an entry of special or added tokens that is neither a text nor an object with one: fetch its files again.")
    return settings


def _is_token(token: Any) -> bool:
    """A text, or an object with the text `content` and options that are true or false."""
    if not isinstance(token, Mapping):
        return isinstance(token, str)
    return isinstance(token.get("content"), str) and all(isinstance(token[key], bool) for key in (*OPTIONS, "special") if key in token)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _added(token: Any, special: bool | None = None) -> Any:
    from tokenizers import AddedToken

    if not isinstance(token, Mapping):
        return AddedToken(str(token), special=True)
    options = {key: token[key] for key in OPTIONS if key in token}
    return AddedToken(token["content"], special=token.get("special", False) if special is None else special, **options)


def _clip(folder: Path, settings: Mapping[str, Any]) -> Any:
    """CLIP's tokenizer of `vocab.json` and `merges.txt`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    files = [folder / "vocab.json", folder / "merges.txt"]
    if not all(map(_bounded, files)):
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt: give a pipeline's tokenizer folder.")
    if not all(type(number) is int and 0 <= number < 2**31 for number in _files.read_json(files[0]).values()):
        raise ValueError(f"{files[0]} gives a word what is no number of a word: fetch it again.")
    names = {key: _content(settings.get(key) or default) for key, default in NAMED.items()}
    options = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False, "unk_token": names["unk_token"]}
    try:
        found = Tokenizer(models.BPE.from_file(*map(str, files), **options))
    except Exception as error:
        raise ValueError(
            f"{files[0]} and {files[1].name} are not a vocabulary and its merges ({_files.shown(str(error), 200)}): fetch them again."
        ) from error
    found.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    listed = sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    found.add_tokens([_added(token, _content(token) in names.values() or None) for _, token in listed])
    rest = [settings.get(key) or default for key, default in NAMED.items()]
    found.add_tokens([_added(token, True) for token in rest if _content(token) not in {_content(each) for _, each in listed}])
    ends = ((names[key], cast(int, found.token_to_id(names[key]))) for key in ("eos_token", "bos_token"))
    found.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return found


def tokenize(folder: str | os.PathLike[str], texts: str | Sequence[str], *, length: int | None = None, truncate: bool = False) -> np.ndarray:
    """Texts as the numbers that a text encoder takes.

    Args:
        folder: a pipeline's `tokenizer`, `load_pipeline(...).tokenizers["tokenizer"]`: `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`;
            with `tokenizer_config.json` and `special_tokens_map.json` where they are. A pipeline's two tokenizers may pad with different tokens.
        texts: one, or several.
        length: T; the `model_max_length` of the files, or 77, where it is None.
        truncate: cut longer texts off before the end token, as diffusers does.

    Returns integers `[B, T]`, int32: start token, text, end token, paddings.
    Raises FileNotFoundError without the files; ImportError without `tokenizers`; ValueError for a damaged file, a padding token that is not in the
        vocabulary, or a text that is too long.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("Tokenizing needs the package tokenizers: pip install 'adjoint-jax[text]'.") from error
    folder, texts = Path(folder), [texts] if isinstance(texts, str) else list(texts)
    settings = _settings(folder)
    if _bounded(folder / "tokenizer.json"):
        try:
            found = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer ({_files.shown(str(error), 200)}): fetch it again.") from error
    else:
        found = _clip(folder, settings)
    limit = settings.get("model_max_length")
    length = length or (int(limit) if isinstance(limit, (int, float)) and 1 < limit < LONGEST else 77)
    pad = _content(settings.get("pad_token") or NAMED["pad_token"])
    if found.token_to_id(pad) is None:
        raise ValueError(f"{folder} pads with {_files.shown(repr(pad))}, which is not in its vocabulary: fetch its files again.")
    found.no_padding()
    found.no_truncation()
    if not truncate and (long := [(i, n) for i, n in enumerate(len(found.encode(text).ids) for text in texts) if n > length]):
        raise ValueError(f"Text {long[0][0]} has {long[0][1]} tokens where {length} fit: shorten it, or cut it off by truncate=True.")
    found.enable_truncation(length)
    found.enable_padding(length=length, pad_id=found.token_to_id(pad), pad_token=pad)
    return np.asarray([each.ids for each in found.encode_batch(texts)], np.int32).reshape(len(texts), length)
