"""Stylisation by fine-tuning: the weights of a sampler's network, or a LoRA of them, move until its samples have a style, and keep what they show.

With x_0(z, c; W) the sample of noise z and class or text c, W* the weights to start from, style and likeness as in `adjoint_jax.experiments.metrics`:

    minimise over W   E_{z, c}  S(x_0(z, c; W)) + w (1 - likeness(x_0(z, c; W), x_0(z, c; W*)))                        (1)
    S(x) = sum_l mean (G_l(x) - G_l)^2 / mean G_l^2,   G_l the mean Gram matrix of the style's images                  (2)

With --prompt, of a text-to-image pipeline, W are the weights of its unet alone: what encodes the text and what decodes the latents stay.

Each update draws new noise from the number of the update alone, the same for every engine, so that a killed run goes on to the same end. The
engines are the ways to take the gradient of (1) in W through the sampler: exact, the last K steps (DRaFT-K), AdjointDEIS, and the others of
`adjoint_jax.experiments.engines`. All are given the same work: updates in inverse proportion to the network evaluations of one, a backward
one counted as two. What is reported is measured on held-out noise.

Sources: Pan et al., AdjointDPM (ICLR 2024), section 5 (gradients in weights through the sampler; stylisation); Gatys, Ecker & Bethge (CVPR 2016)
for (2); Clark, Vicol, Swersky & Fleet (ICLR 2024) for DRaFT-K and LoRA; Hu et al. (2021) for LoRA.

    python examples/stylise.py --config configs/stylise.toml --out runs/stylise
    python examples/stylise.py --config configs/stylise_weights.toml --out runs/stylise_weights
    python examples/stylise.py --config configs/stylise_text_to_image.toml --out runs/stylise_text_to_image
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tuning import EFFECTS, applied, audited_against_exact, classified, in_turn, least_seconds, refuse_on_a_mesh, thickness

from adjoint_jax import _build, _scoring, checkpoints
from adjoint_jax._misfits import at_least, known, positive
from adjoint_jax._options import Sample
from adjoint_jax.audit import AuditRow
from adjoint_jax.checkpoints import _files as layout, lora
from adjoint_jax.experiments import OnMesh, Run, command, iterate, mesh, metrics, npz, pictures, recorded, report
from adjoint_jax.experiments.engines import GREEDY, drawn, engine, evaluations
from adjoint_jax.experiments.features import style_of
from adjoint_jax.experiments.statistics import mean, rate
from adjoint_jax.guide import Given, Sampler, Variables

HELD, STYLE, FACTORS = 2**31, 2**31 + 1, 2**31 + 2
"""Streams of noise beside that of the updates: of what is reported, of the samples that the style is made of, and of a LoRA to begin with."""
SHOWN = 10


@dataclass(frozen=True)
class Options(OnMesh, Sample):
    """Fine-tunes the weights of a sampler's network until its samples have a style."""

    out: str = "runs/stylise"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    label: int | None = None
    """The class that is tuned and looked at; by default all of them in turn."""
    batch: int = 10
    """Samples in an update."""
    steps: int = 10
    """Steps of the sampler."""
    save_every: int = 10
    """Updates between saves of the state that --resume starts from."""
    style: str = "hatched"
    """bold, thin, outline, hatched, stripes, checkerboard or inverted, made by a formula of the network's own samples; or a PNG of their size."""
    classifier: str | None = None
    """A folder with the ConvClassifier whose convolutions are the features of the style, and which reads; by default the embedded one of digits."""
    clip: str | None = None
    """A folder of transformers' CLIPModel, or the id org/name of one on the hub, whose image tower has the features of the style
    in the place of the convolutions."""
    judge: str | None = None
    """Weights of a LeNet-5 (mnist_lenet5.npz of the shared data) that reads the samples too; by default nobody does."""
    content: float = 1.0
    """Weight w of the term that keeps what the samples show."""
    blur: float = 2.0
    """Standard deviation in pixels of the blur under which the likeness is measured."""
    rank: int = 0
    """Rank of the LoRA that is tuned; 0 tunes the weights themselves."""
    targets: str = ""
    """Of a LoRA: a regular expression searched for in the kernels' paths; by default it finds all."""
    engines: tuple[str, ...] = ("kept", "deis:5", "last-k:1", "last-k:3", "low-variance:2")
    """How the gradient is taken, each in its own tuning with the same work; the first one's outcome is saved."""
    iterations: int = 60
    """Updates of the first engine; the others' follow from it."""
    learning_rate: float = 5e-4
    """Learning rate of Adam."""
    held: int = 40
    """Held-out samples."""
    looks: int = 10
    """How often a tuning is looked at on them, at equal parts of its work; at least twice."""
    goal: float = 0.5
    """The share of the objective before, by which it is asked which engine gets there first."""


class Arrays(NamedTuple):
    """What stays as it is: the weights to start from and the guidance, the classes (or a tree of rows; a prompt is one class), the style as a
    `Partial`, and the key of all noise."""

    given: Given
    labels: Any
    style: Any
    key: Any


@dataclass(frozen=True)
class Tuning:
    """The problem (1). What is tuned is the tree of the weights or, `kept_apart`, a LoRA without its scales; of a pipeline, those of its network
    `part`. `devices` is a mesh or None."""

    sampler: Sampler
    optimiser: optax.GradientTransformation
    shape: tuple[int, ...]
    content: float
    blur: float
    kept_apart: bool
    devices: Any = None
    part: str | None = None

    @property
    def seen(self) -> tuple[int, ...]:
        """`[H, W, C]` of the images, as `shape` is of what is sampled."""
        return self.sampler.like(jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)).shape[1:]

    def weights(self, given: Given) -> Any:
        """Those of the network that is tuned."""
        return given.params if self.part is None else given.params[self.part]

    def given(self, arrays: Arrays, tuned: Any) -> Given:
        """The network with what was tuned in its place."""
        found = lora.merge(self.weights(arrays.given), whole(tuned)) if self.kept_apart else tuned
        return arrays.given._replace(params=found if self.part is None else {**arrays.given.params, self.part: found})

    def variables(self, arrays: Arrays, key: Any, count: int, first: Any = 0) -> Variables:
        """Noise for `count` samples, of the classes in turn from the number `first`."""
        drawn = self.sampler.noises(key, (count, *self.shape))
        if arrays.labels is None:
            return drawn
        return {**drawn, "embedding": jax.tree.map(lambda rows: rows[(first + jnp.arange(count)) % len(rows)], arrays.labels)}

    def parts(self, arrays: Arrays, tuned: Any, variables: Variables, adjoint: diffrax.AbstractAdjoint | None = None) -> tuple[Any, Any, Any]:
        """Images `[B, H, W, C]`, their distances from the style (2), and those from the layout of the original samples."""
        images = self.sampler(self.given(arrays, tuned), variables, adjoint)
        original = jax.lax.stop_gradient(self.sampler(arrays.given, variables))
        return images, -arrays.style(images), 1 - metrics.likeness(self.blur, original, images)

    def gradient(self, arrays: Arrays, tuned: Any, k: Any, batch: int, name: str) -> tuple[Any, tuple[Any, Any]]:
        """The gradient of (1) by the engine `name` on the noise of update k, and the two means in (1)."""
        key = jax.random.fold_in(arrays.key, k)
        variables = self.variables(arrays, key, batch, k * batch)

        def objective(tuned: Any, arrays: Arrays, key: Any, variables: Variables) -> Any:
            _, style, content = self.parts(arrays, tuned, variables, drawn(engine(name), key))
            return jnp.sum(style) / batch + self.content * (jnp.sum(content) / batch), (style, content)

        summed = mesh.gradient(objective, self.devices, (None, None, mesh.image_axes(variables)))
        (_, seen), found = summed(tuned, arrays, jax.random.fold_in(key, 2), variables)
        return found, jax.tree.map(jnp.mean, seen)


def bare(correction: Any) -> Any:
    """The two factors of each kernel; their scale stays 1."""
    return {name: factors._replace(scale=None) for name, factors in correction.items()}


def whole(correction: Any) -> Any:
    """The inverse of `bare`."""
    return {name: factors._replace(scale=jnp.ones(())) for name, factors in correction.items()}


def problem(options: Options) -> tuple[Tuning, Arrays, Any, dict[str, Callable]]:
    """The problem, its arrays, what is tuned before the first update, and who reads the samples; everything checked."""
    at_least(options, 1, "iterations", "save_every")
    at_least(options, 2, "looks", "held")
    at_least(options, 0, "content", "rank")
    positive(options, "learning_rate", "blur", "goal")
    if options.prompt is not None and options.judge is not None:
        raise ValueError("--judge reads digits and takes no --prompt: leave one of them out.")
    if options.prompt is not None and options.clip is not None and options.classifier is not None:
        raise ValueError("With --prompt --classifier has the features of the style, and so has --clip: leave one of them out.")
    if options.targets and not options.rank:
        raise ValueError("--targets chooses the kernels of a LoRA: give its --rank, or leave --targets out.")
    if not options.engines or any(engine(name) == GREEDY for name in options.engines) or len(set(options.engines)) < len(options.engines):
        raise ValueError(f"--engines are different ways through the sampler's steps, at least one and none of them greedy; got {options.engines}.")
    mesh.make(options.mesh, options.held)
    refuse_on_a_mesh(options.mesh, options.engines)
    sampler, given, variables = _build.sampler(replace(options, label=options.label or 0) if _classes(options) else options)
    labels, part = None, None
    if options.prompt is not None:
        labels, part = jax.tree.map(lambda rows: jnp.asarray(rows[:1]), mesh.fetched(variables["embedding"])), "unet"
    elif "embedding" in variables:
        classes = len(given.params["class_embedding"]["embedding"])
        # the last class of a guided or an embedded network is the null one
        labels = jnp.arange(classes - 1) if options.label is None else jnp.asarray([options.label])
        given = given._replace(null=jnp.asarray(classes - 1))
    adam = optax.adam(options.learning_rate)
    devices = mesh.of(variables)
    tuning = Tuning(sampler, adam, variables["x_T"].shape[1:], options.content, options.blur, options.rank > 0, devices, part)
    arrays = Arrays(given, labels, None, jax.random.key(options.seed))
    features, read = seeing(options, tuning.seen)
    start = tuning.weights(given)
    if options.rank:
        start = mesh.weights(bare(lora.init_lora(start, options.targets, options.rank, jax.random.fold_in(arrays.key, FACTORS))), devices)
    style = style_of(features, mesh.fetched(styled(options, tuning, arrays)))
    return tuning, arrays._replace(style=mesh.everywhere(style, devices)), start, read


def seeing(options: Options, shape: tuple[int, ...]) -> tuple[Any, dict[str, Callable]]:
    """The features of the style, as a `Partial` of images of `shape` `[H, W, C]`, and who reads these; nobody where they show a text."""
    clip = None if options.clip is None else _scoring.patches(options.clip, shape)
    if clip is not None and options.prompt is not None:
        return clip, {}
    features, read = classified(options.classifier, options.judge, shape)
    return (features if clip is None else clip), (read if options.prompt is None else {})


def _classes(options: Options) -> bool:
    """Whether the checkpoint has classes."""
    path = _build.DIGITS if options.checkpoint is None else checkpoints.fetched(options.checkpoint)
    return bool(layout.read_json(layout.folders(path)[0] / layout.CONFIG).get("num_class_embeds"))


def styled(options: Options, tuning: Tuning, arrays: Arrays) -> Any:
    """The style's images: a PNG, or what a formula makes of samples of the network."""
    if Path(options.style).suffix == ".png":
        return jnp.asarray(pictures.load(options.style, tuning.seen))[None]
    made = EFFECTS[known("style", options.style, list(EFFECTS))]
    variables = tuning.variables(arrays, jax.random.fold_in(arrays.key, STYLE), options.held)
    return made(jax.jit(tuning.sampler.__call__)(arrays.given, variables))


def work(counts: tuple[int, int]) -> int:
    """Of (forward, backward) evaluations; a backward one costs two."""
    return counts[0] + 2 * counts[1]


def budget(options: Options, sampler: Sampler) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Of each engine: the evaluations in an update, the sample of the original weights among them, and its number of updates."""
    plain, _ = evaluations(sampler, diffrax.DirectAdjoint())
    counts = {name: (forward + plain, backward) for name in options.engines for forward, backward in [evaluations(sampler, engine(name))]}
    most = options.iterations * work(counts[options.engines[0]])
    return counts, {name: max(1, round(most / work(count))) for name, count in counts.items()}


def main(options: Options) -> None:
    config = recorded(options)
    run = Run(Path(options.out), config, options.resume, options.checkpointer)
    tuning, arrays, start, read = problem(options)
    counts, updates = budget(options, tuning.sampler)
    held = mesh.spread(tuning.variables(arrays, jax.random.fold_in(arrays.key, HELD), options.held), tuning.devices)
    gradient, apply, look = jax.jit(tuning.gradient, static_argnums=(3, 4)), jax.jit(partial(applied, tuning.optimiser)), jax.jit(tuning.parts)
    marks = {name: {round(i * count / options.looks) for i in range(options.looks)} for name, count in updates.items()}

    def update(name: str, i: int, tuned: Any, inner: Any) -> tuple[Any, Any, dict[str, Any]]:
        seen = [float(jnp.mean(part)) for part in look(arrays, tuned, held)[1:]] if i in marks[name] else None
        change, (style, content) = gradient(arrays, tuned, jnp.asarray(i), options.batch, name)
        tuned, inner, norm = apply(change, tuned, inner)
        row = {"style": float(style), "content": float(content), "gradient_norm": float(norm)}
        if not np.isfinite(list(row.values())).all():
            raise FloatingPointError(f"Update {i} by {name} is not finite: {row}; lower --learning-rate.")
        return tuned, inner, {**row, "held": seen}

    first, step, total = in_turn(updates, start, tuning.optimiser, update)
    restored = run.restore(mesh.together(first))
    progress = run.follow(iterate(step, restored, total), restored, total, options.save_every, show="style")
    finished = {"before": start, **progress.state.finished}
    outcome = {name: Outcome(*map(np.asarray, mesh.fetched(look(arrays, tuned, held)))) for name, tuned in finished.items()}
    print("Auditing the gradients in the weights at the start and at the end ...", file=sys.stderr)
    of = lambda name, tuned: mesh.fetched(gradient(arrays, tuned, jnp.asarray(0), options.batch, name)[0])  # noqa: E731
    ends = {"first": start, "last": finished[options.engines[0]]}
    audited = audited_against_exact(of, ends, options.engines, "LoRA" if options.rank else "weights")
    seconds = least_seconds({name: partial(of, name, start) for name in options.engines})
    labels = np.asarray(mesh.fetched(held["embedding"])) if read and "embedding" in held else None
    wanted = mesh.fetched(styled(options, tuning, arrays))
    results = summary(options, outcome, progress.history, counts, labels, read, audited)
    if wanted.shape[-1] == 1:
        seen = {**{name: each.images for name, each in outcome.items()}, "the style": wanted}
        results["thickness"] = {name: thickness(images).tolist() for name, images in seen.items()}
    run.write({
        "final.npz": npz({f"images/{name}": each.images for name, each in outcome.items()}),
        "samples.png": pictures.table_of_images({name: each.images[:SHOWN] for name, each in outcome.items()}),
        "style.png": pictures.sheet(wanted[:SHOWN], SHOWN),
        "held.png": pictures.curves(lines(options, results), "work: network evaluations, a backward one counted twice", "objective, held-out noise"),
        "results.json": layout.to_json(results),
    })  # fmt: skip
    save(options, run.out, mesh.fetched(finished[options.engines[0]]))
    run.write({"report.md": document(options, config, results, outcome, progress, seconds, read, labels, audited)})
    print(f"{results['claim']} See {run.out / 'report.md'}.")


class Outcome(NamedTuple):
    """Held-out images and the two distances of each."""

    images: Any
    style: Any
    content: Any

    def objective(self, weight: float) -> np.ndarray:
        return self.style.astype(np.float64) + weight * self.content


def save(options: Options, out: Path, tuned: Any) -> None:
    """The tuned network as a folder that `aj.load` reads, or the LoRA as a file; whole or not at all, by one process."""
    if not mesh.first():
        return
    path = _build.DIGITS if options.checkpoint is None else checkpoints.fetched(options.checkpoint)
    module, _ = checkpoints.load_model(path)
    if options.rank:
        if not (out / "lora.safetensors").exists():
            lora.save_lora(out / "lora.safetensors", {"unet": whole(tuned)}, {"unet": module})
    elif not (out / "model" / layout.CONFIG).exists():
        file = layout.folders(path)[1] / layout.SCHEDULER
        target = out / "model"
        for half in target.glob("*") if target.is_dir() else ():  # the configuration is written last
            half.unlink()
        checkpoints.save(target, module, tuned, layout.read_json(file) if file.is_file() else None)


def summary(
    options: Options, outcome: dict[str, Outcome], history: Any, counts: Any, labels: Any, read: Any, audited: list[tuple[str, AuditRow]]
) -> dict[str, Any]:
    """The claims as numbers, the same for the same seed."""
    value = {name: float(np.mean(each.objective(options.content))) for name, each in outcome.items()}
    goal, engines = options.goal * value["before"], {}
    for name, count in counts.items():
        rows = [row for row in history if row["tuning"] == name]
        looks = [(row["update"], row["held"][0] + options.content * row["held"][1]) for row in rows if row["held"]] + [(len(rows), value[name])]
        reached = next((i for i, seen in looks if seen <= goal), None)
        engines[name] = {"forward": count[0], "backward": count[1], "updates": len(rows), "looks": looks, "reached": reached}
    for name, each in outcome.items():
        readings = {} if labels is None else {who: int(np.sum(by(each.images) == labels)) for who, by in read.items()}
        engines.setdefault(name, {}).update(objective=value[name], style=float(each.style.mean()), content=float(each.content.mean()), read=readings)
    first = options.engines[0]
    best = min(options.engines, key=lambda name: value[name])
    race = {name: engines[name]["reached"] * work(counts[name]) for name in options.engines if engines[name]["reached"] is not None}
    fastest = "none comes to the goal"
    if race:
        soonest = min(race, key=lambda name: race[name])
        fastest = f"{soonest} is the first at {options.goal:g} of the objective before, for a work of {race[soonest]} evaluations,"
    claim = (
        f"By {first}, the distance from the style falls from {engines['before']['style']:.3f} to {engines[first]['style']:.3f} on held-out noise, "
        f"the likeness to the original sample being {1 - engines[first]['content']:.3f}; of {len(options.engines)} engines with the same work, "
        f"{fastest} and {best} ends lowest."
    )
    errors = [[point, row.adjoint, row.relative_error, row.cosine] for point, row in audited]
    return {"claim": claim, "goal": goal, "held": options.held, "tunings": engines, "audit": errors}


def lines(options: Options, results: Any) -> dict[str, Any]:
    """Of each engine, the objective on held-out noise against work."""
    found = {name: results["tunings"][name] for name in options.engines}
    return {name: ([i * work((t["forward"], t["backward"])) for i, _ in t["looks"]], [seen for _, seen in t["looks"]]) for name, t in found.items()}


def document(
    options: Options, config: Any, results: Any, outcome: dict[str, Outcome], progress: Any, seconds: Any, read: Any, labels: Any, audited: Any
) -> bytes:
    """The report."""
    tunings = results["tunings"]
    readers = list(read) if labels is not None else []
    thick = {name: [f"{np.mean(each):.2f}"] for name, each in results.get("thickness", {}).items()}
    also = f" The style's images are {thick['the style'][0]} pixels thick." if thick else ""
    heads = (*(["thickness in pixels"] if thick else []), "1 - likeness", *(f"read by {who}" for who in readers))
    rows = []
    for name, each in outcome.items():
        right = [rate(tunings[name]["read"][who], options.held) for who in readers]
        rows.append((name, mean(each.style.tolist()), *thick.get(name, ()), mean(each.content.tolist()), *right))
    race = []
    for name in options.engines:
        t, reached = tunings[name], tunings[name]["reached"]
        first = ("not reached", "") if reached is None else (reached, f"{reached * seconds[name]:.0f} s")
        race.append((name, f"{t['forward']} + {t['backward']}", t["updates"], f"{seconds[name]:.2f} s", f"{t['objective']:.4f}", *first))
    total = ", ".join(f"{sum(tunings[name][kind] * tunings[name]['updates'] for name in options.engines)} {kind}" for kind in ("forward", "backward"))
    what = f"a LoRA of rank {options.rank}" if options.rank else "all weights"
    what += "" if options.prompt is None else f" of the unet, which is told {options.prompt!r}"
    saved = "`lora.safetensors` holds the LoRA" if options.rank else "`model` holds the weights, which `aj.load` reads"
    return report.document(
        "Stylisation by fine-tuning",
        f"{results['claim']} What is tuned is {what}; {saved}.\n\n"
        + report.picture("samples.png", "Held-out noise, a column each: before, and after each tuning")
        + "\n\n"
        + report.picture("style.png", "What the style is taken from"),
        report.section(
            f"On {options.held} held-out noises",
            report.table(("tuning", "distance from the style", *heads), rows),
            f"Means, with 95 % intervals{'; last, the share read as its class' if readers else ''}. The distance is 0 for the same Gram matrices, "
            f"and 1 a layer where the features vanish.{also}",
        ),
        report.section(
            "Engines, with the same work",
            report.table(("engine", "evaluations", "updates", "one gradient", "objective at the end", "updates to the goal", "seconds to it"), race),
            f"Evaluations of the network are those in one update, forward + backward; the goal is an objective of {results['goal']:.3f}.",
            report.picture("held.png", "The objective against work"),
            "Seconds are those of one gradient, the least of three taken in turn with the others', and so many of them.",
        ),
        report.audited(audited),
        report.cost(progress.seconds, None, {"network evaluations in all, looks apart": total}),
        report.options(config),
    )


if __name__ == "__main__":
    command(main, Options)
