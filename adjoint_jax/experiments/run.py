"""A run: a state that advances by iterates, its folder, and going on after a kill as if there had been none.

    (state, row)_{k+1} = step(state_k, k)

`state` is a pytree of arrays, `row` a JSON object that depends on the state alone; wall time is kept apart, so that two runs of one
configuration leave the same `history.jsonl` and the same arrays to the bit. `state.npz` is the run: state, history, seconds and
configuration in one file, replaced in one rename, so that they cannot disagree after a kill. The other files are views of it.
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

STATE, CONFIG, HISTORY = "state.npz", "config.json", "history.jsonl"
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
    Raises:
        FileExistsError: for an `out` that is a file, is in use, or holds no run to resume.
    """

    out: Path
    config: Mapping[str, Any]
    resume: bool = False

    def __post_init__(self) -> None:
        claim(self.out, self.resume)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes each file by write, fsync and rename, in this order."""
        write(self.out, files)

    def save(self, progress: Progress, views: Mapping[str, bytes] | None = None) -> None:
        """Writes the state, then what shows it."""
        history = "".join(json.dumps(row) + "\n" for row in progress.history)
        arrays = dict(_named(progress.state))
        arrays |= {"seconds": np.asarray(progress.seconds), "history": np.array(history), "config": np.array(json.dumps(dict(self.config)))}
        self.write({STATE: npz(arrays), CONFIG: to_json(self.config), HISTORY: history.encode(), **(views or {})})

    def restore(self, start: Any) -> Progress:
        """The run saved in `out`, or one at the state `start`. Raises ValueError where it was of another configuration, or is damaged."""
        path = self.out / STATE
        if not path.is_file():
            return Progress(start)
        try:
            with np.load(path, allow_pickle=False) as data:
                saved = {name: data[name] for name in data.files}
            history, theirs = [json.loads(row) for row in str(saved["history"]).splitlines()], json.loads(str(saved["config"]))
            self._check(theirs)
            leaves = [_restored(saved[name], leaf) for name, leaf in _named(start)]
        except Other:
            raise
        except Exception as error:  # a damaged archive fails in more ways than its reader names
            raise ValueError(f"{path} is not the whole state of a run ({error}): remove {self.out} and start again.") from error
        return Progress(jax.tree.unflatten(jax.tree.structure(start), leaves), history, saved["seconds"].tolist())

    def _check(self, theirs: Mapping[str, Any]) -> None:
        ours = json.loads(to_json(self.config))
        if differing := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
            pairs = ", ".join(f"{key} = {theirs.get(key)!r} (now {ours.get(key)!r})" for key in differing)
            raise Other(f"{self.out} was started with other values: {pairs}; give the same to resume, or another --out.")

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
        with tqdm(total=total, initial=len(restored.history), desc=self.out.name, unit="iterate") as bar:
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


def _stored(leaf: Any) -> np.ndarray:
    """A leaf as numpy's own archive can hold it: a random key as its words, bfloat16 and other types that numpy does not have as float32."""
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.isbuiltin == 2 else array


def _restored(found: np.ndarray, leaf: Any) -> Any:
    """The inverse of `_stored`, of the kind, type and shape of `leaf`."""
    as_stored = _stored(leaf)
    if (found.shape, found.dtype) != (as_stored.shape, as_stored.dtype):
        raise ValueError(f"an array is {found.dtype}{list(found.shape)} where {as_stored.dtype}{list(as_stored.shape)} was expected")
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(leaf))
    found = found.astype(np.asarray(leaf).dtype)
    return jnp.asarray(found) if isinstance(leaf, jax.Array) else found


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(state: Any) -> list[tuple[str, Any]]:
    """The leaves of a state with their names in the archive."""
    return [("state/" + jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


class Other(ValueError):
    """A run of another configuration."""


def claim(out: Path, resume: bool) -> None:
    """Raises FileExistsError unless `out` is absent or empty, or holds a run to be resumed; forgets what a kill left half-written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a folder as --out.")
    if not resume:
        raise FileExistsError(f"{out} exists and is not empty: give another --out, or --resume to continue the run in it.")
    temporary = [file for file in out.iterdir() if TEMPORARY.fullmatch(file.name)]
    if not (out / STATE).is_file() and len(temporary) < sum(1 for _ in out.iterdir()):
        raise FileExistsError(f"{out} exists and has no {STATE} to resume from: give another --out.")
    for file in temporary:
        file.unlink()


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file by write, fsync and rename, in this order."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(out / name, data)


def npz(arrays: Mapping[str, Any]) -> bytes:
    """An uncompressed archive of arrays, in the order of their names; those of types that numpy does not have (bfloat16) as float32."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: _stored(arrays[name]) for name in sorted(arrays)})
    return buffer.getvalue()
