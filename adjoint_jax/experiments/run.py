"""A run: a state that advances by iterates, its folder, and going on after a kill as if there had been none.

    (state, row)_{k+1} = step(state_k, k)

`state` is a pytree of arrays, `row` a JSON object that depends on the state alone; wall time is kept apart, so that two runs of one
configuration leave the same `history.jsonl` and the same arrays to the bit. `state.npz` is the run: state, history, seconds and
configuration in one file, replaced in one rename, so that they cannot disagree after a kill. The other files are views of it.
Of several processes (`mesh`) the first one writes; where the state lies in parts on them, an orbax checkpoint may hold it instead (`_orbax`).
"""

import dataclasses
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoints._files import to_json, write_whole
from . import _orbax, mesh

STATE, CONFIG, HISTORY = "state.npz", "config.json", "history.jsonl"
CHECKPOINTERS = ("npz", "orbax")
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
"""The names that `write_whole` writes under."""


class Progress(NamedTuple):
    """A run after `len(history)` iterates; `seconds` is what each of them took."""

    state: Any
    history: Sequence[dict[str, Any]] = ()
    seconds: Sequence[float] = ()


def iterate(step: Callable[[Any, int], tuple[Any, dict[str, Any]]], progress: Progress, total: int) -> Iterator[Progress]:
    """The run after each of the iterates that are missing up to `total`."""
    for k in range(len(progress.history), total):
        begin = time.perf_counter()
        state, row = jax.block_until_ready(step(progress.state, k))
        progress = Progress(state, [*progress.history, row], [*progress.seconds, time.perf_counter() - begin])
        yield progress


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder.

    Args:
        out: the folder; made at the first write.
        config: what decides the outcome, a JSON object; a run is only gone on with under the same.
        resume: go on with the run in `out`, where there is one.
        checkpointer: "npz", one file; "orbax", each process its part; None: as the run in `out`, else npz in one process and orbax in several.
    Raises:
        FileExistsError: for an `out` that is a file, is in use, or holds no run to resume.
        ValueError: for another checkpointer than that of the run in `out`.
    """

    out: Path
    config: Mapping[str, Any]
    resume: bool = False
    checkpointer: str | None = None

    def __post_init__(self) -> None:
        claim(self.out, self.resume)
        object.__setattr__(self, "checkpointer", _checkpointer(self.out, self.checkpointer))
        mesh.wait("claimed")

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes each file by write, fsync and rename, in this order."""
        write(self.out, files)

    def save(self, progress: Progress, views: Mapping[str, bytes] | None = None) -> None:
        """Writes the state, then what shows it."""
        history, config = "".join(json.dumps(row) + "\n" for row in progress.history), json.dumps(dict(self.config))
        leaves, files = dict(_named({"state": progress.state})), {CONFIG: to_json(self.config), HISTORY: history.encode(), **(views or {})}
        if self.checkpointer == "orbax":
            record = {"seconds": json.dumps(list(progress.seconds)), "history": history, "config": config}
            _orbax.save(self.out, len(progress.history), {name: _bare(leaf) for name, leaf in leaves.items()}, record)
        else:
            record = {"seconds": np.asarray(progress.seconds), "history": np.array(history), "config": np.array(config)}
            files = {STATE: npz({**leaves, **record}), **files}
        self.write(files)

    def restore(self, start: Any) -> Progress:
        """The run saved in `out`, laid out on the devices as the state `start`, or one at `start`.

        Raises ValueError where it was of another configuration, or is damaged.
        """
        orbax = self.checkpointer == "orbax"
        path = self.out / (_orbax.FOLDER if orbax else STATE)
        if not (_orbax.found(self.out) if orbax else path.is_file()):
            return Progress(start)
        try:
            record, load = _orbax.read(self.out) if orbax else _archived(path)
            same(self.out, json.loads(record["config"]), json.loads(to_json(self.config)))
            history, seconds = [json.loads(row) for row in record["history"].splitlines()], json.loads(record["seconds"])
            named = dict(_named({"state": start}))
            found = load({name: _bare(leaf) for name, leaf in named.items()})
            leaves = [_dressed(bare, leaf) for bare, leaf in zip(found, named.values(), strict=True)]
        except Other:
            raise
        except Exception as error:  # a damaged archive fails in more ways than its reader names
            raise ValueError(f"{path} is not the whole state of a run ({error}): remove {self.out} and start again.") from error
        return Progress(jax.tree.unflatten(jax.tree.structure(start), leaves), history, seconds)

    def follow(
        self,
        steps: Iterator[Progress],
        restored: Progress,
        total: int,
        save_every: int = 1,
        views: Callable[[Progress], Mapping[str, bytes]] = lambda _: {},
        show: str | None = None,
    ) -> Progress:
        """Runs `steps` to their end, with a bar that shows the entry `show` of the rows, saving the first, every `save_every`-th and the last."""
        from tqdm import tqdm

        progress = restored
        with tqdm(total=total, initial=len(restored.history), desc=self.out.name, unit="iterate", disable=None if mesh.first() else True) as bar:
            for progress in steps:
                done = len(progress.history)
                if show:
                    bar.set_postfix({show: f"{progress.history[-1][show]:.4f}"}, refresh=False)
                bar.update()
                if done == 1 or done % save_every == 0 or done >= total:
                    self.save(progress, views(progress))
        if progress is restored:  # a kill may have come between the last state and its views
            self.save(progress, views(progress))
        return progress


def _archived(path: Path) -> tuple[Mapping[str, str], Callable[[Mapping[str, Any]], list]]:
    """What was recorded beside the state in an archive, and how to read the arrays."""
    with np.load(path, allow_pickle=False) as data:
        saved = {name: data[name] for name in data.files}
    record = {"config": str(saved["config"]), "history": str(saved["history"]), "seconds": json.dumps(saved["seconds"].tolist())}
    return record, lambda leaves: [_restored(saved[name], leaf) for name, leaf in leaves.items()]


def _bare(leaf: Any) -> Any:
    """A leaf as an array of numbers: a random key as its words."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _dressed(found: Any, leaf: Any) -> Any:
    """The inverse of `_bare`, of the kind of `leaf`."""
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else found


def _stored(leaf: Any) -> np.ndarray:
    """A leaf as numpy's own archive can hold it: bfloat16 and other types that numpy does not have as float32."""
    array = np.asarray(mesh.fetched(_bare(leaf)))
    return array.astype(np.float32) if array.dtype.isbuiltin == 2 else array


def _restored(found: np.ndarray, leaf: Any) -> Any:
    """The inverse of `_stored`, of the kind, type, shape and devices of `leaf`."""
    dtype = np.dtype(leaf.dtype)
    stored = np.dtype(np.float32) if dtype.isbuiltin == 2 else dtype
    if (found.shape, found.dtype) != (leaf.shape, stored):
        raise ValueError(f"an array is {found.dtype}{list(found.shape)} where {stored}{list(leaf.shape)} was expected")
    found = found.astype(dtype)
    if not isinstance(leaf, jax.Array):
        return found
    return mesh.put(found, leaf.sharding) if mesh.of(leaf) else jnp.asarray(found)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names in an archive."""
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


class Other(ValueError):
    """A run of another configuration."""


def same(out: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises Other where the configuration of the run in `out` is not ours."""
    if differing := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
        pairs = ", ".join(f"{key} = {theirs.get(key)!r} (now {ours.get(key)!r})" for key in differing)
        raise Other(f"{out} was started with other values: {pairs}; give the same to resume, or another --out.")


def claim(out: Path, resume: bool) -> None:
    """Raises FileExistsError unless `out` is absent or empty, or holds a run to be resumed; forgets what a kill left half-written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a folder as --out.")
    if not resume:
        raise FileExistsError(f"{out} exists and is not empty: give another --out, or --resume to continue the run in it.")
    left = [file for file in out.iterdir() if TEMPORARY.fullmatch(file.name) or _orbax.unfinished(file)]
    if not _kinds(out) and len(left) < sum(1 for _ in out.iterdir()):
        raise FileExistsError(f"{out} exists and has no {STATE} to resume from: give another --out.")
    for file in left if mesh.first() else ():
        _orbax.forget(file) if file.is_dir() else file.unlink()


def _kinds(out: Path) -> list[str]:
    """By which checkpointers there is a state in `out`."""
    there = {"npz": (out / STATE).is_file(), "orbax": _orbax.found(out)}
    return [kind for kind in CHECKPOINTERS if there[kind]]


def _checkpointer(out: Path, wanted: str | None) -> str:
    """That which was wanted, else that of the run in `out`, else what suits the number of processes."""
    if wanted is not None and wanted not in CHECKPOINTERS:
        raise ValueError(f"--checkpointer {wanted} is not known: use one of {', '.join(CHECKPOINTERS)}.")
    found = _kinds(out)
    if wanted is not None and found and wanted not in found:
        raise ValueError(f"{out} holds a state by {found[0]}, not by {wanted}: leave --checkpointer out to resume it.")
    return wanted or (found or CHECKPOINTERS[jax.process_count() > 1 :])[0]


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file by write, fsync and rename, in this order; of several processes the first one does."""
    if not mesh.first():
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(out / name, data)


def npz(arrays: Mapping[str, Any]) -> bytes:
    """An uncompressed archive of trees of arrays, in the order of their names; types that numpy does not have (bfloat16) become float32."""
    buffer, named = io.BytesIO(), dict(_named(arrays))
    np.savez(buffer, allow_pickle=False, **{name: _stored(named[name]) for name in sorted(named)})
    return buffer.getvalue()
