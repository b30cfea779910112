"""What the experiments have in common that tune something which all samples share, weights or an embedding: tunings one after another, fresh noise
by the number of the update, effects made by a formula, and measurements of digits that no gradient has seen.

A digit's ink is w = (x + 1)/2 clipped to [0, 1], and it has

    thickness   2 #{w > 1/2} / #{pairs of neighbours with w > 1/2 in one alone}, pixels: area over half the outline            (1)
    slant       sum w (u - u_0)(v - v_0) / sum w (v - v_0)^2,  u to the right, v upwards from the centre (u_0, v_0): the shear     (2)
    upright     the shear, of 41 between -1 and 1, that undone makes sum_u (sum_v w)^2 largest                                  (3)
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from judges import lenet_judge

from adjoint_jax import _scoring
from adjoint_jax.audit import AuditRow, compare
from adjoint_jax.experiments.features import convolutions


class Tuned(NamedTuple):
    """The state of a run: what is being tuned, its optimiser's state, and what came of the tunings that are finished."""

    tuned: Any
    optimiser: Any
    finished: dict[str, Any]


def in_turn(counts: Mapping[str, int], start: Any, optimiser: optax.GradientTransformation, update: Callable) -> tuple[Tuned, Callable, int]:
    """The first state, the step and the number of iterates of tunings one after another, each from `start`, with `counts[name]` updates.

    `update(name, i, tuned, optimiser_state)` gives the two after the update and a row of the history.
    """
    order = [(name, i) for name, count in counts.items() for i in range(count)]

    def step(state: Tuned, k: int) -> tuple[Tuned, dict[str, Any]]:
        name, i = order[k]
        tuned, inner, row = update(name, i, *((start, optimiser.init(start)) if i == 0 else state[:2]))
        finished = {**state.finished, name: tuned} if i + 1 == counts[name] else state.finished
        return Tuned(tuned, inner, finished), {"iteration": k, "tuning": name, "update": i, **row}

    return Tuned(start, optimiser.init(start), dict.fromkeys(counts, start)), step, len(order)


def refuse_on_a_mesh(text: str | None, engines: Iterable[str]) -> None:
    """Raises ValueError for an engine that a mesh cannot have."""
    if text is not None and any(name.startswith("low-variance") for name in engines):
        raise ValueError("The engine low-variance draws noise for a whole batch, which no device of a --mesh has: use another.")


def applied(optimiser: optax.GradientTransformation, gradient: Any, tuned: Any, inner: Any) -> tuple[Any, Any, Any]:
    """One step of the optimiser: what is tuned and the optimiser's state after it, and the norm of the gradient."""
    updates, inner = optimiser.update(gradient, inner, tuned)
    return optax.apply_updates(tuned, updates), inner, optax.tree.norm(gradient)


def audited_against_exact(
    gradient: Callable[[str, Any], Any], points: Mapping[str, Any], engines: Sequence[str], what: str
) -> list[tuple[str, AuditRow]]:
    """Each engine's `gradient(engine, point)`, a tree, as one vector against the exact one, at each of the named points."""
    vector = lambda name, point: jax.flatten_util.ravel_pytree(gradient(name, point))[0]  # noqa: E731
    rows = []
    for point, at in points.items():
        exact = vector("discrete", at)
        rows += [(point, AuditRow(name, what, *compare(vector(name, at), exact))) for name in engines]
    return rows


def least_seconds(calls: Mapping[Any, Callable[[], Any]], repeats: int = 3) -> dict[Any, float]:
    """Of each compiled call the least wall time, all taken in turn, so that what else the machine does meets all of them."""
    seconds = dict.fromkeys(calls, np.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


class Arrival(NamedTuple):
    """What it took to reach a goal: seconds, updates, and evaluations of the network, forward and backward, in one of them."""

    seconds: float
    updates: int
    evaluations: int


def standing(arrivals: Mapping[str, Arrival], raced: Iterable[str]) -> str:
    """A sentence on where the default gradient, or else the exact one with its linearisations kept, stands among those that arrived: first, or
    behind whom, by how much, and for how many evaluations."""
    default = next((name for name in ("discrete", "kept") if name in raced), None)
    if default is None:
        return ""
    words = "The default, discrete," if default == "discrete" else "The exact gradient, kept,"
    if default not in arrivals:
        return f" {words} does not arrive."
    first = min(arrivals, key=lambda name: arrivals[name].seconds)
    mine, theirs = arrivals[default], arrivals[first]
    if mine.seconds <= theirs.seconds:
        return f" {words} is the first."
    return (
        f" {words} takes {mine.seconds / theirs.seconds:.2f} times as long as {first}: {mine.updates} updates of {mine.evaluations} "
        f"network evaluations against {theirs.updates} of {theirs.evaluations}."
    )


def _diagonal(images: Any) -> Any:
    rows, columns = np.indices(images.shape[1:3])
    return jnp.asarray(np.sin(2 * np.pi * (rows + columns) / 5), images.dtype)[None, :, :, None]


def _squares(images: Any) -> Any:
    rows, columns = np.indices(images.shape[1:3])
    return jnp.asarray(1.0 - 2 * ((rows // 3 + columns // 3) % 2), images.dtype)[None, :, :, None]


def _spread(images: Any) -> Any:
    """The brightest of each pixel and its eight neighbours."""
    return jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


EFFECTS: dict[str, Callable[[Any], Any]] = {
    "bold": _spread,
    "thin": lambda images: -_spread(-images),
    "outline": lambda images: jnp.clip(_spread(images) - images - 1, -1, 1),
    "hatched": lambda images: jnp.minimum(_spread(images), jnp.maximum(2 * _diagonal(images), -1)),
    "stripes": lambda images: jnp.clip(2 * _diagonal(images), -1, 1) + 0 * images,
    "checkerboard": lambda images: _squares(images) + 0 * images,
    "inverted": lambda images: -images,
}
"""What is made of images in [-1, 1]; stripes and checkerboard leave nothing of them."""


def ink(images: Any) -> np.ndarray:
    """Images `[B, H, W, C]` in [-1, 1] as grey ones in [0, 1]."""
    return np.clip((np.asarray(images, np.float64).mean(axis=-1) + 1) / 2, 0, 1)


def thickness(images: Any) -> np.ndarray:
    """(1), `[B]`; 0 where there is no ink."""
    on = np.pad(ink(images) > 0.5, ((0, 0), (1, 1), (1, 1)))
    edges = sum(np.sum(on != np.roll(on, 1, axis), axis=(1, 2)) for axis in (1, 2))
    return 2 * on.sum(axis=(1, 2)) / np.maximum(edges, 1)


def slant(images: Any) -> Any:
    """(2), `[B]`, differentiable; right-leaning strokes have a positive one."""
    w = jnp.clip((images[..., 0] + 1) / 2, 0, 1)
    v, u = (jnp.asarray(each, w.dtype)[None] for each in np.indices(images.shape[1:3]))
    total = jnp.sum(w, axis=(1, 2), keepdims=True) + 1e-6
    u, v = (each - jnp.sum(w * each, axis=(1, 2), keepdims=True) / total for each in (u, -v))
    return jnp.sum(w * u * v, axis=(1, 2)) / (jnp.sum(w * v**2, axis=(1, 2)) + 1e-6)


def upright(images: Any) -> np.ndarray:
    """(3), `[B]`."""
    w, shears = ink(images), np.linspace(-1, 1, 41)
    height, width = w.shape[1:]
    rows, columns = np.indices((height, width))
    sums = []
    for shear in shears:
        place = columns + shear * (rows - (height - 1) / 2) + width  # a stroke of this shear stands upright
        left, part = np.floor(place).astype(int), place - np.floor(place)
        profile = np.zeros((len(w), 3 * width))
        for columns_of, weight in ((left, 1 - part), (left + 1, part)):
            np.add.at(profile, (np.arange(len(w))[:, None, None], columns_of[None]), w * weight[None])
        sums.append(np.sum(profile**2, axis=1))
    return shears[np.argmax(sums, axis=0)]


def classified(path: str | None, judge: str | None, shape: tuple[int, ...]) -> tuple[Any, dict[str, Callable[[Any], np.ndarray]]]:
    """The features of a style, by the ConvClassifier in a folder (None: the embedded one), as a `Partial` of images of `shape` `[H, W, C]`, and who
    reads these: it, and a LeNet."""
    module, params = _scoring.classifier(path, shape)
    features = jax.tree_util.Partial(partial(convolutions, module), params)
    return features, readers(lambda images: module.apply({"params": params}, images), judge, shape)


def readers(classifier: Callable[[Any], Any], judge: str | None, shape: tuple[int, ...]) -> dict[str, Callable[[Any], np.ndarray]]:
    """Functions from images of `shape` `[H, W, C]` to what they are read as: the classifier whose features or logits were climbed, and, where its
    file is, a LeNet."""
    logits = jax.jit(classifier)
    found: dict[str, Callable[[Any], np.ndarray]] = {"the classifier": lambda images: np.argmax(logits(images), axis=1)}
    if judge is not None:
        second, note = lenet_judge(judge, shape)
        if second is None:
            print(note, file=sys.stderr)
        else:
            found["a LeNet"] = second.read
    return found
