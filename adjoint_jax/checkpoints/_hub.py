"""Ids of the Hugging Face hub, `org/name`, as local folders: the files are fetched into the hub's own cache, or found there.

Only safetensors, JSON and tokenizers' text files are ever fetched, and of several weights the ones that will be read. The package
`huggingface_hub` is imported where an id is given.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import _files

ID = re.compile(r"(?=.{3,96}$)(?!.*(\.\.|--))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<![-.])", re.ASCII)
DESCRIBING = re.compile(r"([^/]+/)?[^/]+\.json|(tokenizer[^/]*/)?(merges|vocab|added_tokens)\.txt")
Wanted = Callable[[Path], Iterable[str]]


def local(path: str | os.PathLike[str], wanted: Wanted, *, variant: str | None, revision: str | None, local_files_only: bool) -> Path:
    """A local folder: the path itself where something has that name, else the cached snapshot of the hub's repository with that id.

    Args:
        path: a path, or an id `org/name` as a string.
        wanted: given the folder with all its JSON files, the folders below (`"unet"`, or `"."`) whose weights are to be there.
        variant, revision, local_files_only: as `load_model`.

    Raises FileNotFoundError for what is neither a path nor a repository with such files, PermissionError for a gated repository, ConnectionError
        where the hub cannot be reached and nothing is cached, ImportError without `huggingface_hub`; ValueError for a revision of a local folder.
    """
    if os.path.lexists(path) or not isinstance(path, str) or not ID.fullmatch(path):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is one of a repository on the hub, and {path} is none: give an id org/name, or no revision.")
        return Path(path)
    _files.known_variant(variant)
    hub = _package(path)
    if local_files_only or hub.constants.HF_HUB_OFFLINE:
        return _cached(hub, path, revision, "offline was asked for")
    names = _named(hub, path, revision)
    if isinstance(names, str):
        return _cached(hub, path, revision, names)
    describing = [name for name in names if DESCRIBING.fullmatch(name)]
    if not describing:
        raise FileNotFoundError(f"{path} on the hub has no config.json and no model_index.json: a repository in diffusers' layout was expected.")
    folder = _fetched(hub, path, revision, describing)
    weights = [f"{below}/{name}".removeprefix("./") for below in wanted(folder) for name in _weights(names, below, variant, path)]
    return _fetched(hub, path, revision, [*describing, *weights])


def _package(path: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            f"There is no folder at {path}, and an id of the hub needs the package huggingface_hub: pip install 'adjoint-jax[hub]'."
        ) from error
    return huggingface_hub


def _weights(names: Sequence[str], below: str, variant: str | None, path: str) -> list[str]:
    """The weights of one folder of a repository that `_files.choose` would take: the file, or the index and the files that belong to it."""
    prefix = "" if below == "." else f"{below}/"
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    chosen = _files.choose(inside, variant, f"{path}/{below}".removesuffix("/."))
    if not chosen.endswith(".json"):
        return [chosen]
    stem, _, dotted = chosen.removesuffix(".json").partition(".safetensors.index")
    middle = f"({re.escape(dotted)})?" if dotted else ""
    shard = re.compile(rf"{re.escape(stem)}{middle}-\d+-of-\d+{middle}\.safetensors")
    return [chosen, *(name for name in inside if shard.fullmatch(name))]


def _sentence(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(" .:")


def _refusal(hub: Any, path: str, revision: str | None, error: Exception) -> OSError | None:
    """The answer of the hub in one sentence; None where it gave none."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{path} is gated: accept its terms at https://huggingface.co/{path} and log in with `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"There is neither a folder nor a repository on the hub named {path}: give another, or log in where it is private.")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{path} on the hub has no revision {revision!r}: give a branch, a tag or a commit of it.")
    return None


def _named(hub: Any, path: str, revision: str | None) -> list[str] | str:
    """The names of a repository's files, or why they are not to be had."""
    try:
        return hub.HfApi().list_repo_files(path, revision=revision)
    except Exception as error:  # of an HTTP library that differs with the package's version
        if refusal := _refusal(hub, path, revision, error):
            raise refusal from error
        return _sentence(error)


def _fetched(hub: Any, path: str, revision: str | None, names: Iterable[str]) -> Path:
    try:
        return Path(hub.snapshot_download(path, revision=revision, allow_patterns=[glob.escape(name) for name in names]))
    except Exception as error:
        if refusal := _refusal(hub, path, revision, error):
            raise refusal from error
        raise ConnectionError(f"{path} could not be fetched whole from the hub ({_sentence(error)}): try again.") from error


def _cached(hub: Any, path: str, revision: str | None, why: str) -> Path:
    """The snapshot in the cache, whole or not: what lacks in it is an error of its own where it is read."""
    try:
        return Path(hub.snapshot_download(path, revision=revision, local_files_only=True, allow_patterns=["*.json"]))
    except hub.errors.LocalEntryNotFoundError as error:
        if snapshot := getattr(error, "snapshot_path", None):
            return Path(snapshot)
        of = f" of the revision {revision!r}" if revision else ""
        raise ConnectionError(
            f"There is no folder at {path}, and the hub's cache has nothing{of} of that id ({why}): fetch it where there is a network."
        ) from error
