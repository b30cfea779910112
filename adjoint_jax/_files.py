"""What a run of the command line leaves in its folder, each file whole or absent: images, curve, history, report, and the state to resume from.

`state.npz` is the run: variables, optimiser, history and configuration in one file, replaced in one rename, so that they cannot disagree after a
kill. The other files are views of it, written again whenever it is.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoints._files import to_json, write_whole
from .guide import Progress

STATE = "state.npz"
WRITTEN = (STATE, "config.json", "history.jsonl", "before.png", "after.png", "metric.png", "final.npz", "report.md", "samples.png", "samples.npz")
PADDING, WIDTH = 2, 64


def claim(out: Path, resume: bool) -> None:
    """Raises FileExistsError unless `out` is absent or empty, or holds a run to be resumed; forgets what a kill left half-written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a folder as --out.")
    if not resume:
        raise FileExistsError(f"{out} exists and is not empty: give another --out, or --resume to continue the run in it.")
    for name in WRITTEN:
        for temporary in out.glob(f".{name}.*"):
            temporary.unlink()
    if any(out.iterdir()) and not (out / STATE).is_file():
        raise FileExistsError(f"{out} exists and has no {STATE} to resume from: give another --out.")


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file by write, fsync and rename, in this order."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(out / name, data)


def npz(arrays: Mapping[str, Any]) -> bytes:
    """An uncompressed archive of arrays, in the order of their names."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(arrays[name]) for name in sorted(arrays)})
    return buffer.getvalue()


def save(out: Path, config: Mapping[str, Any], progress: Progress) -> None:
    """Writes the state, then what shows it."""
    history = "".join(json.dumps(row) + "\n" for row in progress.history)
    arrays = {f"variables_{name}": value for name, value in progress.variables.items()}
    arrays |= {f"optimiser_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(progress.optimiser))}
    arrays |= {"before": progress.before, "images": progress.images, "history": np.array(history), "config": np.array(json.dumps(dict(config)))}
    views = {"config.json": to_json(config), "history.jsonl": history.encode(), "before.png": png(progress.before)}
    write(out, {STATE: npz(arrays), **views})


def restore(out: Path, config: Mapping[str, Any], start: Progress) -> Progress:
    """The run saved in `out`, or `start` where nothing was. Raises ValueError where it was of another configuration, or is damaged."""
    path = out / STATE
    if not path.is_file():
        return start
    try:
        with np.load(path) as data:
            saved = {name: data[name] for name in data.files}
        history, theirs = [json.loads(row) for row in str(saved["history"]).splitlines()], json.loads(str(saved["config"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not the whole state of a run ({error}): remove {out} and start again.") from error
    ours = json.loads(to_json(config))
    if differing := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
        pairs = ", ".join(f"{key} = {theirs.get(key)!r} (now {ours.get(key)!r})" for key in differing)
        raise ValueError(f"{out} was started with other values: {pairs}; give the same to resume, or another --out.")
    leaves, tree = jax.tree.flatten(start.optimiser)
    optimiser = jax.tree.unflatten(tree, [jnp.asarray(saved[f"optimiser_{i}"]) for i in range(len(leaves))])
    variables = {name: jnp.asarray(saved[f"variables_{name}"]) for name in start.variables}
    return Progress(variables, optimiser, history, saved["before"], saved["images"])


def png(images: Any) -> bytes:
    """Images `[B, H, W, C]` in [-1, 1], C = 1 or 3 (of others the first channel), tiled to a square and enlarged to about 64 pixels each."""
    from PIL import Image

    pixels = np.asarray(images, np.float32)
    pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    factor = max(1, WIDTH // pixels.shape[2])
    pixels = np.round(np.clip(pixels + 1, 0, 2) * 127.5).astype(np.uint8).repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = pixels.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING, 3), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (PADDING + index * (size + PADDING) for index, size in zip(divmod(i, columns), (height, width), strict=True))
        sheet[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    return buffer.getvalue()


def curve(history: Sequence[Mapping[str, Any]], name: str) -> bytes:
    """The metric against the iteration as a PNG: a thin line an image, a thick one for the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    iterations = [row["iteration"] for row in history]
    axes.plot(iterations, [row["per_image"] for row in history], color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(iterations, [row["metric"] for row in history], color="tab:orange", linewidth=2, label="mean")
    axes.set(xlabel="iteration", ylabel=name)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def report(
    config: Mapping[str, Any], history: Sequence[Mapping[str, Any]], audit: Sequence[tuple[str, Any]], name: str, cost: Mapping[str, str]
) -> str:
    """What was run, what came of it, how good its gradients were, and what it cost."""
    first, last = history[0], history[-1]
    gained = sum(after > before for before, after in zip(first["per_image"], last["per_image"], strict=True))
    ends = [("mean", f"{first['metric']:.4g}", f"{last['metric']:.4g}")]
    for kind, pick in (("worst image", min), ("best image", max)):
        ends.append((kind, f"{pick(first['per_image']):.4g}", f"{pick(last['per_image']):.4g}"))
    rows = [(point, r.adjoint, r.wrt, f"{r.relative_error:.2e}", f"{r.cosine:.4f}", f"{r.norm_ratio:.3g}") for point, r in audit]
    return (
        "# Guidance by gradient\n\n"
        f"Higher is better: {name}. It rose for {gained} of {len(first['per_image'])} images in {last['iteration']} iterations.\n\n"
        + table(("metric", "before", "after"), ends)
        + "\n## The gradient against the exact one\n\n"
        "The exact gradient is that of the sampler as it ran, by `DiscreteAdjoint`; the first row of each point is the adjoint that was used.\n\n"
        + table(("iterate", "adjoint", "input", "relative error", "cosine", "norm ratio"), rows)
        + "\n## Cost\n\n"
        + table(("what", "how much"), list(cost.items()))
        + "\n## What was run\n\n"
        + table(("option", "value"), [(key, "default" if value is None else f"`{value}`") for key, value in config.items()])
    )
