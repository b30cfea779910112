"""The state of a run as an orbax checkpoint: each process writes and reads the parts that lie on its devices; no file holds the whole.

`state/N` is the run after N iterates: arrays, history, seconds and configuration. Orbax writes it under another name and renames it when all
processes are done, and only then removes the one before: a kill leaves the old state or the new. (It does not fsync: what a machine does that
loses power is its file system's affair.) All processes need to see one file system.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER, UNFINISHED = "state", "orbax-checkpoint-tmp"


def _manager(out: Path) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("--checkpointer orbax needs orbax-checkpoint: pip install 'adjoint-jax[mesh]'.") from error
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True)
    handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    return ocp, ocp.CheckpointManager((out / FOLDER).absolute(), options=options, item_handlers=handlers)


def found(out: Path) -> bool:
    """Whether there is a whole checkpoint."""
    folder = out / FOLDER
    return folder.is_dir() and any(step.name.isdecimal() for step in folder.iterdir())


def unfinished(path: Path) -> bool:
    """Whether a path is what a kill during the first save left."""
    return path.name == FOLDER and path.is_dir() and all(UNFINISHED in step.name for step in path.iterdir())


def forget(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def save(out: Path, step: int, leaves: Mapping[str, Any], record: Mapping[str, str]) -> None:
    """Writes the state after `step` iterates, unless it is there."""
    ocp, manager = _manager(out)
    with manager:
        if manager.latest_step() != step:
            items = ocp.args.Composite(state=ocp.args.StandardSave(dict(leaves)), record=ocp.args.JsonSave(dict(record)))
            manager.save(step, args=items)


def _like(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def read(out: Path) -> tuple[Mapping[str, str], Callable[[Mapping[str, Any]], list]]:
    """What was recorded beside the latest state, and how to read arrays that are laid out as those given, whatever laid out they were saved."""
    ocp, manager = _manager(out)
    with manager:
        step = manager.latest_step()
        record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def load(leaves: Mapping[str, Any]) -> list:
        ocp, manager = _manager(out)
        with manager:
            saved = manager.item_metadata(step)["state"].tree
            for name, leaf in leaves.items():
                there, wanted = saved[name], (tuple(leaf.shape), np.dtype(leaf.dtype))
                if (tuple(there.shape), np.dtype(there.dtype)) != wanted:  # orbax would cast
                    raise ValueError(f"an array is {np.dtype(there.dtype)}{list(there.shape)} where {wanted[1]}{list(wanted[0])} was expected")
            as_given = {name: _like(leaf) for name, leaf in leaves.items()}
            loaded = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(as_given)))["state"]
        return [loaded[name] for name in leaves]

    return record, load
