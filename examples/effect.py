"""Visual effect to embedding: one embedding of the condition, shared by all samples, moves until samples of fixed noise show an effect; then fresh
noise is sampled with it, which nothing was fitted to.

With x_0(z; e) the sample of noise z given the embedding e, e* the embedding of a class, and f a metric of images:

    maximise over e   (1/B) sum_b f(x_0(z_b; e)),    z_1 .. z_B fixed,    |e - e*| <= R |e*| where R is given           (1)

The effects, each in a tuning of its own from e*, with a measurement beside it that no gradient has seen (formulas in `tuning`):

    slant:S        f = -(slant(x) - S)^2                           measured by the shear that makes strokes upright      (2)
    style:NAME     f = -(distance of the Gram matrices), the style made by a formula of the samples of e*;  by thickness  (3)
    image:C        f = -mean (x - y_C)^2,  y_C the mean of samples of class C, or image:FILE.png;  by readers of digits    (4)
    clip:TEXT      f = -(1 - cos of CLIP's embeddings of the image and of TEXT);                     by brightness         (5)

With --prompt the embedding is the encoding of a text, of a text-to-image pipeline, and the effects are image:FILE.png and clip:TEXT.

Sources: Pan et al., AdjointDPM (ICLR 2024), section 5, whose effects are found for the text embeddings of Stable Diffusion; Gatys, Ecker & Bethge
(CVPR 2016) for (3). `guide` gives each image an embedding of its own; here one has to serve all.

    python examples/effect.py --config configs/effect_digits.toml --out runs/effect_digits
    python examples/effect.py --config configs/effect_flow_vit.toml --out runs/effect_flow_vit
    python examples/effect.py --config configs/effect_text_to_image.toml --out runs/effect_text_to_image
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from own_network.flow_vit import NULL, chosen_flow_vit
from tuning import EFFECTS, applied, audited_against_exact, classified, in_turn, ink, refuse_on_a_mesh, slant, thickness, upright

from adjoint_jax import _build, _scoring, grids
from adjoint_jax._misfits import at_least, finite, known, made, positive
from adjoint_jax._options import Sample
from adjoint_jax.checkpoints import _files as layout
from adjoint_jax.experiments import OnMesh, Run, command, iterate, mesh, metrics, npz, pictures, recorded, report
from adjoint_jax.experiments.engines import GREEDY, drawn, engine, evaluations
from adjoint_jax.experiments.features import style_of
from adjoint_jax.experiments.projections import projection
from adjoint_jax.experiments.statistics import mean, rate
from adjoint_jax.guide import Given, Sampler

FIXED, FRESH, MADE = 0, 1, 2
"""Streams of noise: what is fitted to, what is reported, what the effects' targets are made of."""
SHOWN = 10


@dataclass(frozen=True)
class Options(OnMesh, Sample):
    """Finds the embedding of an effect."""

    out: str = "runs/effect"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    label: int | None = None
    """The class whose embedding it starts from; by default 3 for the embedded digits and the flow ViT."""
    steps: int = 10
    """Steps of the sampler."""
    batch: int = 16
    """Noises that the embedding is fitted to."""
    save_every: int = 5
    """Updates between saves of the state that --resume starts from."""
    flow_vit: str | None = None
    """The weights of the flow ViT, mnist_flow_vit.npz of the shared data, in place of a checkpoint."""
    effects: tuple[str, ...] = ("slant:0.6", "style:bold", "image:8")
    """slant:NUMBER, style: with bold, thin, outline, hatched, stripes, checkerboard or inverted, image:CLASS or image:FILE.png, clip:TEXT."""
    clip: str | None = None
    """Of the effects clip: a folder of transformers' CLIPModel with its tokenizer, or the id org/name of one on the hub."""
    classifier: str | None = None
    """A folder with the classifier whose convolutions are the features of a style, and which reads; by default the embedded one of digits."""
    judge: str | None = None
    """Weights of a LeNet-5 (mnist_lenet5.npz of the shared data) that reads the samples too; by default nobody does."""
    radius: float | None = None
    """Of an l2 ball about the first embedding, in norms of it; by default there is none."""
    engine: str = "kept"
    """How the gradient is taken; see `adjoint_jax.experiments.engines`."""
    compared: tuple[str, ...] = ("deis:5", "last-k:1")
    """Engines that are only audited."""
    iterations: int = 25
    """Updates of each tuning."""
    learning_rate: float = 0.05
    """Learning rate of Adam."""
    fresh: int = 50
    """Fresh noises."""


class Model(NamedTuple):
    """A sampler and its arrays, embeddings of the classes `[C, E]` (or any tree of rows; a prompt is one class), the shape of x, and its images
    in [-1, 1]."""

    sampler: Sampler
    given: Given
    classes: Any
    shape: tuple[int, ...]
    images: Callable[[Any], Any]


def model(options: Options) -> Model:
    """The embedded digits, a checkpoint or the flow ViT."""
    if options.flow_vit is None:
        sampler, given, variables = _build.sampler(options)
        if "embedding" not in variables:
            raise ValueError("This checkpoint is unconditional and has no embedding to tune.")
        if options.prompt is not None:
            text, null = mesh.fetched((variables["embedding"], given.null))
            classes = jax.tree.map(lambda text, null: jnp.concatenate([text[:1], null]), text, null)
        else:
            classes = mesh.fetched(given.params["class_embedding"]["embedding"])
        return Model(sampler, given, classes, variables["x_T"].shape[1:], lambda x: x)
    finite(options, "guidance")
    term, params = chosen_flow_vit(options.flow_vit, options.checkpoint)
    solver = made("sampler", options.sampler, _build.SAMPLERS, "", options)
    grid = getattr(grids, known("grid", options.grid, _build.GRIDS))
    times = grids.check(term.process, grid(term.process, options.steps, t_start=options.t_start, t_end=options.t_end))
    sampler = Sampler(term.network, term.process, term.prediction, times, solver, guided=options.guidance != 1)
    table = params["y_encoder.weight"]
    devices = mesh.make(options.mesh, options.batch)
    given = Given(mesh.weights(params, devices), *mesh.everywhere((jnp.float32(options.guidance), table[NULL], None), devices))
    return Model(sampler, given, table, (28, 28, 1), lambda x: 2 * x - 1)


def samples(found: Model, given: Given, embedding: Any, noise: Any, adjoint: Any = None) -> Any:
    """Images `[B, H, W, C]` in [-1, 1], all given one embedding, a tree of arrays without a batch."""
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(noise["x_T"]), *leaf.shape)), embedding)
    return found.images(found.sampler(given, {**noise, "embedding": rows}, adjoint))


class Effect(NamedTuple):
    """A metric of images `[B]` as a `Partial`, and what else is measured, with its name."""

    metric: Any
    measured: str
    measure: Callable[[Any], np.ndarray]


def effect(name: str, options: Options, found: Model, features: Any, read: dict[str, Callable], own: Callable[[int], Any]) -> Effect:
    """(2), (3) or (4); `features` are those of a style, and `own(c)` samples class c."""
    kind, _, what = name.partition(":")
    size = found.sampler.like(jax.ShapeDtypeStruct((1, *found.shape), jnp.float32)).shape[1:]
    if kind == "clip":
        cosine = _scoring.agreement(options.clip, what, size)
        return Effect(jax.tree_util.Partial(short_of_one, cosine), "brightness", lambda images: ink(images).mean(axis=(1, 2)))
    if options.prompt is not None and not what.endswith(".png"):
        raise ValueError(f"The effect {name} is one of digits: with --prompt use image:FILE.png or clip:TEXT.")
    if kind == "slant":
        try:
            lean = float(what)
        except ValueError:
            raise ValueError(f"The effect slant:{what} is no shear: give a number, as slant:0.6.") from None
        return Effect(jax.tree_util.Partial(leaning, jnp.float32(lean)), "shear", upright)
    if kind == "style":
        wanted = EFFECTS[known("effects style:", what, list(EFFECTS))](own(label(options)))
        return Effect(style_of(features, wanted), "thickness in pixels", thickness)
    if kind != "image":
        raise ValueError(f"The effect {name} is not known: use slant:NUMBER, style:NAME, image:CLASS, image:FILE.png or clip:TEXT.")
    if what.endswith(".png"):
        target = jnp.asarray(pictures.load(what, size))
        return Effect(jax.tree_util.Partial(metrics.closeness, target), "ink a pixel", lambda images: ink(images).mean(axis=(1, 2)))
    if not what.isdecimal() or int(what) >= count(found.classes):
        raise ValueError(f"The effect {name} names no class: give image: and a number below {count(found.classes)}.")
    who, reader = list(read.items())[-1]
    metric = jax.tree_util.Partial(metrics.closeness, jnp.mean(own(int(what)), axis=0))
    return Effect(metric, f"read as {what} by {who}", lambda images: (reader(images) == int(what)).astype(float))


def leaning(lean: Any, images: Any) -> Any:
    return -((slant(images) - lean) ** 2)  # (2)


def short_of_one(cosine: Any, images: Any) -> Any:
    return cosine(images) - 1  # (5)


def count(classes: Any) -> int:
    """The number of classes; the last row is the null one's."""
    return len(jax.tree.leaves(classes)[0]) - 1


def label(options: Options) -> int:
    if options.prompt is not None:
        return 0
    return _build.LABEL if options.label is None else options.label


@dataclass(frozen=True)
class Tuning:
    """The problem (1); `norms` are those of the arrays of e*."""

    found: Model
    optimiser: optax.GradientTransformation
    radius: float | None
    norms: Any

    def gradient(self, given: Given, metric: Any, embedding: Any, noise: Any, key: Any, name: str) -> tuple[Any, Any]:
        """The gradient of minus (1) by the engine `name`, and the scores `[B]`."""

        def objective(embedding: Any) -> Any:
            scores = metric(samples(self.found, given, embedding, noise, drawn(engine(name), key)))
            return -jnp.mean(scores), scores

        return jax.grad(objective, has_aux=True)(embedding)

    def applied(self, gradient: Any, embedding: Any, inner: Any, start: Any) -> tuple[Any, Any, Any]:
        """One step of the optimiser, then the projection of (1)."""
        moved, inner, norm = applied(self.optimiser, gradient, embedding, inner)
        if self.radius is not None:
            onto = projection("l2", self.radius)
            moved = jax.tree.map(lambda leaf, first, norm: onto(leaf, first, norm, tuple(range(first.ndim))), moved, start, self.norms)
        return moved, inner, norm


class Setting(NamedTuple):
    """Everything that a run needs: the problem, the effects by name, the first embedding, the fixed and the fresh noise, the readers."""

    tuning: Tuning
    effects: dict[str, Effect]
    start: Any
    noise: Any
    fresh: Any
    read: dict[str, Callable]
    key: Any


def setting(options: Options) -> Setting:
    """Everything built and checked."""
    at_least(options, 1, "iterations", "save_every", "batch")
    at_least(options, 2, "fresh")
    positive(options, "learning_rate", "radius")
    if GREEDY in (options.engine, *options.compared):
        raise ValueError("--engine greedy leaves the sampler out, and the embedding acts in every step of it: use another.")
    for name in (options.engine, *options.compared):
        engine(name)
    if not options.effects or len(set(options.effects)) < len(options.effects):
        raise ValueError(f"--effects are different ones, at least one; got {options.effects}.")
    mesh.make(options.mesh, options.fresh)
    refuse_on_a_mesh(options.mesh, (options.engine, *options.compared))
    if options.clip is not None and not any(name.startswith("clip:") for name in options.effects):
        raise ValueError("--clip is for the effects clip:TEXT, of which there is none: leave it out.")
    if options.prompt is not None and options.flow_vit is not None:
        raise ValueError("--flow-vit takes no --prompt: leave one of them out.")
    if options.prompt is not None and (options.classifier is not None or options.judge is not None):
        raise ValueError("--classifier and --judge read images of classes, and those of a --prompt have none: leave them out.")
    if options.flow_vit is not None and (options.size is not None or options.negative is not None):
        raise ValueError("--flow-vit says how large its images are and knows no text: leave --size and --negative out.")
    found, key = model(options), jax.random.key(options.seed)
    if not 0 <= label(options) < count(found.classes):
        raise ValueError(f"The network has the classes 0 to {count(found.classes) - 1}; got --label {label(options)}: give one of them.")
    row = lambda c: jax.tree.map(lambda leaf: leaf[c], found.classes)  # noqa: E731
    sampled = jax.jit(lambda given, embedding, noise: samples(found, given, embedding, noise))
    made_of = found.sampler.noises(jax.random.fold_in(key, MADE), (options.fresh, *found.shape))
    own = lambda c: sampled(found.given, row(c), made_of)  # noqa: E731
    features, read = (None, {}) if options.prompt is not None else classified(options.classifier, options.judge, found.shape)
    effects = {name: effect(name, options, found, features, read, own) for name in options.effects}
    start = mesh.everywhere(row(label(options)), mesh.of(found.given))
    tuning = Tuning(found, optax.adam(options.learning_rate), options.radius, jax.tree.map(lambda leaf: float(np.linalg.norm(leaf)), start))
    noise, fresh = (
        mesh.spread(found.sampler.noises(jax.random.fold_in(key, stream), (count, *found.shape)), mesh.of(found.given))
        for stream, count in ((FIXED, options.batch), (FRESH, options.fresh))
    )
    return Setting(tuning, effects, start, noise, fresh, read, key)


def main(options: Options) -> None:
    config = recorded(options)
    run = Run(Path(options.out), config, options.resume, options.checkpointer)
    at = setting(options)
    tuning, given = at.tuning, at.tuning.found.given
    gradient, apply = jax.jit(tuning.gradient, static_argnums=5), jax.jit(tuning.applied)

    def update(name: str, i: int, embedding: Any, inner: Any) -> tuple[Any, Any, dict[str, Any]]:
        metric = at.effects[name].metric
        change, scores = gradient(given, metric, embedding, at.noise, jax.random.fold_in(at.key, 2**31 + i), options.engine)
        embedding, inner, norm = apply(change, embedding, inner, at.start)
        scores = mesh.fetched(scores)
        row = {"metric": float(np.mean(np.asarray(scores, np.float64))), "per_image": np.asarray(scores).tolist(), "gradient_norm": float(norm)}
        if not np.isfinite([row["metric"], row["gradient_norm"]]).all():
            raise FloatingPointError(f"Update {i} of {name} is not finite: {row['metric']}, {row['gradient_norm']}; lower --learning-rate.")
        return embedding, inner, row

    first, step, total = in_turn(dict.fromkeys(options.effects, options.iterations), at.start, tuning.optimiser, update)
    restored = run.restore(mesh.together(first))
    progress = run.follow(iterate(step, restored, total), restored, total, options.save_every, show="metric")
    sampled = jax.jit(lambda given, embedding, noise: samples(tuning.found, given, embedding, noise))
    embeddings = {"before": at.start, **progress.state.finished}
    fixed, fresh = (
        {name: mesh.fetched(sampled(given, embedding, noise)) for name, embedding in embeddings.items()} for noise in (at.noise, at.fresh)
    )
    print("Auditing the gradients in the embedding at the start and at the end ...", file=sys.stderr)
    name = options.effects[0]
    of = lambda engine, e: mesh.fetched(gradient(given, at.effects[name].metric, e, at.noise, at.key, engine)[0])  # noqa: E731
    ends = {"first": at.start, "last": embeddings[name]}
    audited = audited_against_exact(of, ends, (options.engine, *options.compared), f"embedding, {name}")
    results = summary(at, options, fixed, fresh, embeddings, audited)
    run.write({
        "final.npz": npz({**{f"embedding/{n}": e for n, e in flat(embeddings).items()}, **{f"fresh/{n}": images for n, images in fresh.items()}}),
        "fixed.png": pictures.table_of_images({name: images[:SHOWN] for name, images in fixed.items()}),
        "fresh.png": pictures.table_of_images({name: images[:SHOWN] for name, images in fresh.items()}),
        "metric.png": pictures.curves(climbs(progress.history), "update", "share of the distance to the effect that is left"),
        "results.json": layout.to_json(results),
    })  # fmt: skip
    run.write({"report.md": document(at, options, config, results, progress, audited)})
    print(f"{results['claim']} See {run.out / 'report.md'}.")


def flat(embeddings: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(embeddings)}


def summary(at: Setting, options: Options, fixed: Any, fresh: Any, embeddings: Any, audited: list[tuple[str, Any]]) -> dict[str, Any]:
    """The claims as numbers, the same for the same seed."""
    rows, groups = {}, {"fixed": fixed, "fresh": fresh}
    for name, each in at.effects.items():
        ends = {"before": "before", "after": name}
        strength = {f"{which} {when}": each.metric(images[key]).tolist() for which, images in groups.items() for when, key in ends.items()}
        first, last = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(embeddings[key])]) for key in ends.values())
        rows[name] = {
            **strength,
            "stronger": int(np.sum(np.asarray(strength["fresh after"]) > np.asarray(strength["fresh before"]))),
            "measured": {when: each.measure(fresh[key]).tolist() for when, key in ends.items()},
            "read": {who: [int(np.sum(by(fresh[key]) == label(options))) for key in ends.values()] for who, by in at.read.items()},
            "moved": float(np.linalg.norm(last - first) / np.linalg.norm(first)),
        }
    gains = ", ".join(
        f"{name} from {np.mean(r['fresh before']):.3g} to {np.mean(r['fresh after']):.3g} (stronger in {r['stronger']} of {options.fresh})"
        for name, r in rows.items()
    )
    claim = f"On {options.fresh} fresh noises, one embedding for all of them, fitted to {options.batch} others, raises {gains}."
    return {"claim": claim, "effects": rows, "audit": [[point, row.adjoint, row.relative_error, row.cosine] for point, row in audited]}


def climbs(history: Any) -> dict[str, Any]:
    """Of each effect, the metric over the one before the first update."""
    named = {name: [row["metric"] for row in history if row["tuning"] == name] for name in dict.fromkeys(row["tuning"] for row in history)}
    return {name: (list(range(len(rows))), [value / rows[0] for value in rows]) for name, rows in named.items()}


def told(values: Sequence[float]) -> str:
    """The mean of measurements, or where they are yes or no the share, with its interval."""
    return rate(int(sum(values)), len(values)) if set(values) <= {0.0, 1.0} else mean(values)


def document(at: Setting, options: Options, config: Any, results: Any, progress: Any, audited: Any) -> bytes:
    """The report."""
    strengths, checks = [], []
    for name, row in results["effects"].items():
        gain = np.subtract(row["fresh after"], row["fresh before"]).tolist()
        ends = [f"{np.mean(row[key]):.4g}" for key in ("fixed before", "fixed after", "fresh before", "fresh after")]
        strengths.append((name, *ends, mean(gain), rate(row["stronger"], options.fresh), f"{row['moved']:.2f}"))
        before, after = (told(row["measured"][key]) for key in ("before", "after"))
        kept = [f"{first} -> {rate(last, options.fresh)}" for first, last in row["read"].values()]
        checks.append((name, at.effects[name].measured, before, after, *kept))
    heads = ("effect", "fixed, before", "after", "fresh, before", "after", "gain on fresh noise", "fresh images that gain", "|e - e*| / |e*|")
    reads = [f"still read as {label(options)} by {who}" for who in at.read]
    return report.document(
        "A visual effect as an embedding",
        f"{results['claim']}\n\n"
        + report.picture("fresh.png", "Fresh noise, a column each: before, and with the embedding of each effect")
        + "\n\n"
        + report.picture("fixed.png", "The fixed noise that the embeddings were fitted to, likewise"),
        report.section("The effect's metric, higher is better", report.table(heads, strengths), "Means, some with 95 % intervals."),
        report.section("Measured otherwise, on fresh noise", report.table(("effect", "measurement", "before", "after", *reads), checks)),
        report.section("The climb", report.picture("metric.png", "Share of the distance that is left, on the fixed noise")),
        report.audited(audited),
        report.cost(progress.seconds, evaluations(at.tuning.found.sampler, engine(options.engine))),
        report.options(config),
    )


if __name__ == "__main__":
    command(main, Options)
