"""Pictures of a report, as bytes of PNG files: sheets of images, and curves; and images of a file."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import mesh

PADDING, WIDTH, MARKED = 2, 64, 8


def load(path: str, shape: tuple[int, ...]) -> Any:
    """A PNG, grey or RGB, as an image of `shape` `[H, W, C]`, C = 1 or 3, in [-1, 1]. Raises ValueError for one of another size or mode."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = from_bytes(np.asarray(image))
        mode = image.mode
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    wanted = "L" if shape[-1] == 1 else "RGB"
    if pixels.shape != shape or mode != wanted:
        raise ValueError(f"{path} has shape {pixels.shape} and mode {mode} where images are sampled of {shape} and {wanted}: resize or convert it.")
    return pixels


def from_bytes(pixels: Any) -> Any:
    """Numbers from 0 to 255 as images in [-1, 1], float32."""
    return pixels.astype(np.float32) / 127.5 - 1


def as_bytes(images: Any) -> np.ndarray:
    """Images in [-1, 1] as whole numbers from 0 to 255, clipped."""
    return np.round(np.clip(np.asarray(images, np.float32) + 1, 0, 2) * np.float32(127.5)).astype(np.uint8)


def sheet(images: Any, columns: int | None = None, width: int = WIDTH) -> bytes:
    """Images `[B, H, W, C]` in [-1, 1], C = 1 or 3 (of others the first channel), in rows of `columns` (by default a square), each enlarged
    by a whole number to about `width` pixels."""
    from PIL import Image

    pixels = np.asarray(mesh.fetched(images), np.float32)
    pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    factor = max(1, width // pixels.shape[2])
    pixels = as_bytes(pixels).repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    made = np.full((rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING, 3), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (PADDING + index * (size + PADDING) for index, size in zip(divmod(i, columns), (height, width), strict=True))
        made[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(made).save(buffer, "PNG")
    return buffer.getvalue()


def table_of_images(rows: Mapping[str, Any], columns: Sequence[str] | None = None, width: int = WIDTH) -> bytes:
    """A row of images `[B, H, W, C]` for each name, the name at its left, and names of the columns above."""
    from matplotlib.figure import Figure

    count = max(len(images) for images in rows.values())
    inches = width / 64
    figure = Figure(figsize=(inches * count + 1.6, inches * len(rows) + 0.4 * bool(columns)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for i, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            axes.axis("on" if i < len(images) else "off")
            if i < len(images):
                pixels = (np.clip(np.asarray(images[i], np.float32), -1, 1) + 1) / 2
                axes.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for axes, name in zip(grid[0], columns or (), strict=False):
        axes.set_title(name, fontsize=8)
    return _png(figure)


def curve(history: Sequence[Mapping[str, Any]], name: str) -> bytes:
    """The metric against the iteration: a thin line an image, a thick one for the mean."""
    figure, axes = _figure("iteration", name)
    iterations = [row["iteration"] for row in history]
    axes.plot(iterations, [row["per_image"] for row in history], color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(iterations, [row["metric"] for row in history], color="tab:orange", linewidth=2, label="mean")
    axes.legend()
    return _png(figure)


def curves(lines: Mapping[str, tuple[Any, Any]], x: str, y: str, log: bool = False) -> bytes:
    """A named line `(xs, ys)` each; `log`, both axes logarithmic, a few xs marked by their numbers."""
    figure, axes = _figure(x, y)
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="." if len(xs) < 30 else None, label=name)
    if log:
        axes.set(xscale="log", yscale="log")
        if len(places := sorted({float(each) for xs, _ in lines.values() for each in xs})) <= MARKED:
            axes.set_xticks(places, [f"{place:g}" for place in places], minor=False)
            axes.set_xticks([], minor=True)
    axes.legend(fontsize=8)
    return _png(figure)


def _figure(x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
