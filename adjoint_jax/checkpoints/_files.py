"""Files of a checkpoint: found by fixed names, read without running anything that they hold, written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

CONFIG, SCHEDULER, PIPELINE = "config.json", "scheduler_config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' name and transformers'
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DENOISERS = ("unet", "transformer")
ROOM = 400  # letters of a list of names in a message
JSON_BYTES = 2**25  # the index of a network of a million tensors is smaller


def regular(path: Path) -> bool:
    """Whether there is a file. What has its name but is a folder, a pipe, or a link that leads nowhere or in a circle, is a ValueError."""
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise ValueError(f"{path} is not a file (a folder, a pipe, or a link that leads nowhere): put the file of that name in its place.")
    return False


def shown(value: Any, most: int = 100) -> str:
    """A name or a value of a stranger's file in a message: on one line, in letters that can be printed, cut off where it is long."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: 2 * most] if text[: 2 * most].isprintable() else repr(text[: 2 * most])[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[Any], most: int, each: int = 100) -> str:
    """The first names, and how many more there are."""
    texts, names = [], list(names)
    while len(texts) < min(most, len(names)) and sum(map(len, texts)) < ROOM:
        texts.append(shown(names[len(texts)], each))
    return ", ".join(texts) + (f" and {len(names) - len(texts)} more" if len(names) > len(texts) else "")


def plain(name: Any) -> bool:
    """Whether a name, read from a file, is that of an entry of the same folder and of nothing else."""
    return isinstance(name, str) and name.isprintable() and re.fullmatch(r"(?!\.)[^/\\:]{1,255}", name) is not None


def below(folder: Path, subfolder: str | os.PathLike[str]) -> Path:
    """`folder / subfolder`, which has to lie below."""
    parts = PurePosixPath(subfolder).parts
    if not parts or not all(plain(part) for part in parts):
        raise ValueError(f"subfolder={str(subfolder)!r} does not name a folder below {folder}: give a relative path such as 'unet'.")
    return folder.joinpath(*parts)


def folders(path: str | os.PathLike[str], subfolder: str | None = None) -> tuple[Path, Path]:
    """The folders of the network and of the scheduler: `path` itself, or a pipeline's `unet` or `transformer` (or `subfolder`) and `scheduler`."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder at {folder}: give a local folder in diffusers' layout, or the id org/name of one on the hub.")
    if subfolder is not None:
        network = below(folder, subfolder)
        if not network.is_dir():
            raise FileNotFoundError(f"{folder} has no folder {subfolder}: it has {listed(sorted(os.listdir(folder)), 10) or 'nothing'}.")
        return network, network if regular(network / SCHEDULER) else scheduler_folder(folder)
    found = [] if regular(folder / CONFIG) else [name for name in DENOISERS if (folder / name).is_dir()]
    if len(found) > 1:
        raise ValueError(f"{folder} has the networks {' and '.join(found)}: give one as subfolder=.")
    return folder / found[0] if found else folder, scheduler_folder(folder)


def scheduler_folder(folder: Path) -> Path:
    """Where the scheduler of a network or pipeline lies: beside `config.json`, as in the first pipelines, or in a folder of its own."""
    return folder if regular(folder / SCHEDULER) else folder / "scheduler"


def place(folder: Path, name: str) -> str:
    """Where a pipeline's network lies: in the folder of its name; in the first pipelines of a single one, in their own, "."."""
    return "." if name in DENOISERS and not (folder / name).is_dir() and regular(folder / CONFIG) else name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(repr(next(name for name in names if names.count(name) > 1)))} stands twice")
    return value


def parse_json(data: bytes, source: Any) -> dict[str, Any]:
    """A JSON object, in which no name stands twice."""
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON ({shown(str(error), 200)}): fetch or write it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a JSON {type(value).__name__} where an object of names and values was expected.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not regular(path):
        raise FileNotFoundError(f"{path.parent} has no {path.name}: a folder in diffusers' layout, or a pipeline with a unet folder, was expected.")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path} is a JSON file of {path.stat().st_size} bytes, and {JSON_BYTES} are the most that is read: fetch it again.")
    return parse_json(path.read_bytes(), path)


def _candidates(variant: str | None) -> Iterator[str]:
    dotted = f".{variant}" if variant else ""
    for stem in STEMS:
        yield f"{stem}{dotted}.safetensors"
        yield f"{stem}.safetensors.index{dotted}.json"


def known_variant(variant: str | None) -> str | None:
    """The variant, which becomes part of a file's name."""
    if variant is not None and not re.fullmatch(r"\w[\w-]{0,99}", variant):
        raise ValueError(f"variant={shown(variant)!r} is not a part of a file's name: give the fp16 of {STEMS[0]}.fp16.safetensors, or None.")
    return variant


def choose(names: Collection[str], variant: str | None, folder: Any) -> str:
    """The weights among the names of a folder's files: one safetensors file, or the index of several.

    Of several weights without a variant the full precision and, of diffusers' two sets, the averaged one come first.
    """
    wanted = [*_candidates(known_variant(variant)), *(() if variant else _candidates("fp16"))]
    if chosen := next((name for name in wanted if name in names), None):
        return chosen
    found = sorted(name for name in names if name.endswith((".safetensors", ".json")) and "safetensors" in name)
    if variant and found:
        raise FileNotFoundError(f"{folder} has no weights of the variant {variant!r}: it has {listed(found, 5)}; give theirs, or none.")
    indexes = [name for name in found if name.endswith(".json")]
    if len(alone := indexes or found) == 1:
        return alone[0]
    if found:
        raise ValueError(f"{folder} has {len(found)} safetensors files ({listed(found, 5)}): keep one, named {WEIGHTS}, or add their index.")
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        raise ValueError(
            f"{folder} has pickled weights only ({listed(pickles, 5)}), and nothing is unpickled here because a pickle can run code: "
            "convert it where torch is installed, with diffusers' save_pretrained(folder, safe_serialization=True)."
        )
    raise FileNotFoundError(f"{folder} has no weights: {WEIGHTS} was expected.")


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The safetensors file of a folder, or the index of its files."""
    weights = folder / choose([entry.name for entry in folder.iterdir()], variant, folder)
    regular(weights)
    return weights


def write_whole(path: Path, data: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes bytes, or what a function writes, to a file that is there whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def weights_name(config: Mapping[str, Any]) -> str:
    """The name of the weights' file: transformers' beside a configuration that names `architectures`, else diffusers'."""
    return f"{STEMS['architectures' in config]}.safetensors"


def unused(path: str | os.PathLike[str]) -> Path:
    """A path to be written: absent, or an empty folder."""
    folder = Path(path)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: give a new path, or remove it first.")
    return folder


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes | Callable[[BinaryIO], None]]) -> None:
    """Writes the files of one network in the given order; `config.json` comes last, so that an interrupted folder is not taken for a whole one."""
    folder = unused(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, data)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which takes its name `path` when all is written, and is removed where something goes wrong."""
    folder = unused(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
