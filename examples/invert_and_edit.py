"""Inversion and editing: images to noise and back, and to another class, by solvers that can be run in both directions.

    c = encode(x; y),    x' = decode(c; y),     the round trip, error |x' - x|                                       (1)
    e = decode(c; y', w),    y' != y,           a class edit, with guidance w                                        (2)
    max over |n - n*| <= R s of  min(z_{y'}(e(n)) - max_{k != y'} z_k(e(n)), kappa),    n* = c of cycle             (3)

ddim    inversion by DDIM's own step, asked for the noise at the wrong end of each step: an error of order 1
bdia    BDIA with gamma = 1: the state and its neighbour are stored, inverse to rounding
rex     Rex on the midpoint rule: two chains, inverse to rounding
cycle   CycleDiffusion: the noises with which DDPM's ancestral sampling makes the image, inverse to rounding

Encoding is without guidance, under the image's own label y. (3) drives an edit's noise x_T and the noise of each step, each in an l_2 ball
about what was encoded, by the exact gradient through the sampler. Beside the edits stands a sample of y' from new noise, which keeps nothing
of the image: an edit is one that is read as y' and is nearer to its original than that.

Sources: Song, Meng & Ermon, DDIM (ICLR 2021); Zhang, Lewis & Kleijn, BDIA (2023); Blasingame & Liu, Rex (2025); Wu & De la Torre,
CycleDiffusion (ICCV 2023).

    python examples/invert_and_edit.py --config configs/invert_and_edit.toml --out runs/invert_and_edit
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from edit_tables import DRIVEN, EDIT, FRESH, TRIP, Item, Outcome, document, results, views
from jax.sharding import Mesh
from judges import Judge, judges
from labelled import Labelled, labelled

import adjoint_jax as aj
from adjoint_jax._misfits import at_least, finite, known, positive
from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments import OnMesh, Run, command, iterate, mesh, npz, pictures, recorded
from adjoint_jax.experiments.engines import evaluations
from adjoint_jax.experiments.metrics import margin
from adjoint_jax.guide import Given, Steering, audit
from adjoint_jax.solvers.cycle import encode_noise

METHODS = ("ddim", "bdia", "rex", "cycle")
AUDITED = 10
"""Images of the gradient's audit."""


@dataclass(frozen=True)
class Options(OnMesh):
    """Round trips from images to noise and class edits, by DDIM, BDIA, Rex and CycleDiffusion."""

    out: str = "runs/invert_and_edit"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    checkpoint: str | None = None
    """A class-conditional checkpoint in diffusers' layout, its last class the null one; by default the embedded digits."""
    size: int | None = None
    """Height and width of the images in pixels; by default the checkpoint's sample_size."""
    images: str = "../shared/data/mnist.npz"
    """An archive with x_test `[n, 28, 28]` and y_test; where it is absent, or the checkpoint draws another size, its own samples are edited."""
    classifier: str | None = None
    """A folder with a ConvClassifier, which reads the edits; by default the embedded one."""
    lenet: str = "../shared/data/mnist_lenet5.npz"
    """Weights of LeNet-5, which reads them too; where they are absent, so are its columns."""
    per_class: int = 5
    """Images of each class; those that the first classifier reads right."""
    methods: tuple[str, ...] = METHODS
    """Of ddim, bdia, rex and cycle."""
    steps: tuple[int, ...] = (10, 20, 50)
    """Steps of the round trips, even in lam."""
    edit_steps: int = 20
    """Steps of the edits."""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """w of (2)."""
    radius: float = 4.0
    """R of (3), an image and a step, in standard deviations of the noise."""
    kappa: float = 3.0
    """The margin at which (3) is content."""
    iterations: int = 10
    """Updates of (3); 0 leaves it out."""
    learning_rate: float = 0.05
    """Of Adam in (3)."""


class Problem(NamedTuple):
    """The network, the images `[B, H, W, C]`, their classes and those that they are to become `[B]`, the readers, and two sentences."""

    drawn: Labelled
    images: Any
    own: np.ndarray
    new: np.ndarray
    judges: dict[str, Judge]
    note: str


def problem(options: Options) -> Problem:
    """What is edited. Raises ValueError for options that do not fit."""
    at_least(options, 1, "per_class", "edit_steps", "save_every")
    at_least(options, 0, "iterations")
    positive(options, "radius", "kappa", "learning_rate")
    for method in options.methods:
        known("methods", method, METHODS)
    if not options.steps or min(options.steps) < 1:
        raise ValueError(f"--steps are the steps of round trips, each at least 1; got {options.steps}.")
    finite(options, "guidance")
    if not options.methods or not options.guidance:
        raise ValueError(f"--methods and --guidance need one entry at least; got {options.methods} and {options.guidance}.")
    drawn = labelled(options)
    readers, note = judges(options.classifier, options.lenet, drawn.shape, drawn.classes)
    images, own, origin = chosen(options, drawn, next(iter(readers.values())))
    offsets = np.random.default_rng(options.seed).integers(1, drawn.classes, len(own))
    return Problem(drawn, images, own, (own + offsets) % drawn.classes, readers, f"{origin} {note}")


def chosen(options: Options, drawn: Labelled, judge: Judge) -> tuple[Any, np.ndarray, str]:
    """The images, `per_class` of each class, their classes, and where they are from. Raises ValueError where too few are read right."""
    path = Path(options.images)
    if path.is_file() and (drawn.shape, drawn.classes) == ((28, 28, 1), 10):
        with np.load(path) as file:
            picked = np.random.default_rng(options.seed).permutation(len(file["y_test"]))[: 40 * options.per_class * drawn.classes]
            images, labels = pictures.from_bytes(file["x_test"][picked, :, :, None]), file["y_test"][picked].astype(int)
        origin = f"The images are drawn from the test set of {path.name}, among those that the {judge.name} classifier reads right."
    else:
        sampler, given = drawn.sampler(aj.DPMSolverPP(2), options.edit_steps, 1.0)
        labels = np.tile(np.arange(drawn.classes), 4 * options.per_class)
        variables = {**sampler.noises(jax.random.key(options.seed), (len(labels), *drawn.shape)), "embedding": drawn.table[labels]}
        images = np.asarray(jax.jit(lambda given, variables: sampler(given, variables))(given, variables))
        origin = (
            f"The images are the sampler's own, those that the {judge.name} classifier reads as asked for: there are none to edit in {path.name}."
        )
    right = judge.read(images) == labels
    found = [np.flatnonzero(right & (labels == label))[: options.per_class] for label in range(drawn.classes)]
    if short := [str(label) for label, rows in enumerate(found) if len(rows) < options.per_class]:
        raise ValueError(f"Of the classes {', '.join(short)} fewer than {options.per_class} images are read right: give a lower --per-class.")
    rows = np.stack(found, axis=1).ravel()
    return jnp.asarray(images[rows]), labels[rows], origin


def solver_of(method: str) -> Any:
    return {"ddim": aj.DDIM(), "bdia": aj.BDIA(), "rex": aj.Rex(), "cycle": aj.DDIM(1.0)}[method]


def encode(method: str, term: aj.DiffusionTerm, x: Any, args: Any, grid: Any, key: Any) -> Any:
    """c of (1): noise, a pair, or noise and the noises of the steps, of which `key` draws the path."""
    if method == "cycle":
        return encode_noise(term, x, args, grid=grid, solver=solver_of(method), key=key)
    return aj.invert(term, x, args, grid=grid, solver=solver_of(method))


def decode(method: str, term: aj.DiffusionTerm, code: Any, args: Any, grid: Any) -> Any:
    """The image of a code."""
    if method == "cycle":
        return aj.sample(term, code[0], args, grid=grid, solver=solver_of(method), noise=code[1])
    found = aj.sample(term, code, args, grid=grid, solver=solver_of(method))
    return found.x if isinstance(found, aj.Paired) else found


def plan(options: Options) -> list[Item]:
    """The items in their order."""
    trips = [Item(TRIP, method, steps, 1.0) for method in options.methods for steps in options.steps]
    edits = [Item(EDIT, method, options.edit_steps, scale) for method in options.methods for scale in options.guidance]
    fresh = [Item(FRESH, "ddim", options.edit_steps, scale) for scale in options.guidance]
    return [*trips, *edits, *fresh, *([Item(DRIVEN, "cycle", options.edit_steps, 1.0)] if options.iterations else [])]


def confidence(kappa: float, logits: Any, labels: Any, images: Any) -> Any:
    """The metric of (3)."""
    return jnp.minimum(-margin(logits, labels, images), kappa)


class Editing:
    """What the run does: `step` is an item. Its state holds each item's images, `[items, B, H, W, C]`, on the host; the rest lies on `devices`."""

    def __init__(self, options: Options, setup: Problem, items: Sequence[Item], devices: Mesh | None = None):
        self.options, self.setup, self.items, self.devices, self.programs = options, setup, items, devices, {}
        self.params, self.null = mesh.weights(setup.drawn.params, devices), self.shared(setup.drawn.table[-1])
        self.images = self.spread(setup.images)

    def spread(self, values: Any) -> Any:
        """One of each image, `[B, ...]`, on the devices."""
        return mesh.batched(values, self.devices)

    def shared(self, value: Any) -> Any:
        """What all images share, on the devices."""
        return mesh.everywhere(value, self.devices)

    def asked(self, labels: np.ndarray) -> Any:
        """The embeddings of classes, one of each image."""
        return self.spread(self.setup.drawn.table[labels])

    def step(self, state: Any, k: int) -> tuple[Any, dict[str, Any]]:
        item = self.items[k]
        images = mesh.host(self.driven(item) if item.kind == DRIVEN else self.made(item))
        change = np.asarray(images, np.float64) - np.asarray(self.setup.images, np.float64)
        row = {
            **item._asdict(),
            "largest": float(np.abs(change).max()),
            "distance": np.sqrt(np.mean(change**2, axis=(1, 2, 3))).tolist(),
            "readings": {name: judge.read(images).tolist() for name, judge in self.setup.judges.items()},
        }
        return mesh.replaced(state, k, images), row

    def program(self, way: Callable, method: str, steps: int, guided: bool) -> Callable[..., Any]:
        """`encode` or `decode`, jitted: of (params, scale, x or code, embedding, null)."""
        drawn, which = self.setup.drawn, (way, method, steps, guided)
        grid = aj.grids.log_snr(drawn.process, steps)

        def run(params: Any, scale: Any, x: Any, embedding: Any, null: Any) -> Any:
            network = aj.cfg(drawn.network, scale) if guided else drawn.network
            args = {"params": params, "cond": embedding, **({"uncond": null} if guided else {})}
            key = (jax.random.key(self.options.seed),) if way is encode else ()
            return way(method, aj.DiffusionTerm(network, drawn.process, drawn.prediction), x, args, grid, *key)

        return self.programs.setdefault(which, jax.jit(run))

    def code(self, method: str, steps: int) -> Any:
        """c of (1)."""
        run = self.program(encode, method, steps, False)
        return run(self.params, self.shared(jnp.float32(1)), self.images, self.asked(self.setup.own), self.null)

    def made(self, item: Item) -> Any:
        """(1), (2), or a sample from new noise."""
        drawn, images = self.setup.drawn, self.setup.images
        if item.kind == FRESH:
            key = jax.random.fold_in(jax.random.key(self.options.seed), 1)
            spread = float(drawn.process.sigma(aj.grids.log_snr(drawn.process, item.steps)[0]))
            code = self.spread(spread * jax.random.normal(key, images.shape, images.dtype))
        else:
            code = self.code(item.method, item.steps)
        asked = self.asked(self.setup.own if item.kind == TRIP else self.setup.new)
        run = self.program(decode, item.method, item.steps, item.guidance != 1)
        return run(self.params, self.shared(jnp.float32(item.guidance)), code, asked, self.null)

    def steering(self, item: Item) -> tuple[Steering, Given, dict[str, Any]]:
        """(3): the problem, and where it starts."""
        setup, options, drawn = self.setup, self.options, self.setup.drawn
        sampler, given = drawn.sampler(solver_of(item.method), item.steps, item.guidance)
        judge = next(iter(setup.judges.values()))
        logits = jax.tree_util.Partial(judge.logits, judge.params)
        metric = jax.tree_util.Partial(confidence, options.kappa, logits, jnp.asarray(setup.new))
        given = Given(self.params, self.shared(given.scale), self.null, self.shared(metric))
        x_T, noise = self.code(item.method, item.steps)
        steering = Steering(sampler, aj.DiscreteAdjoint(), optax.adam(options.learning_rate), ("x_T", "noise"), "l2", options.radius)
        return steering, given, {"x_T": x_T, "noise": noise, "embedding": self.asked(setup.new)}

    def driven(self, item: Item) -> Any:
        """(3)."""
        steering, given, variables = self.steering(item)
        state = steering.start(variables).state
        update = mesh.staying(steering.jitted, state)
        for _ in range(self.options.iterations):
            state, _ = update(given, state)
        return jax.jit(lambda given, variables: steering.sampler(given, variables))(given, state.variables)

    def work(self, item: Item) -> tuple[int, int]:
        """(forward, backward) evaluations of the network by an item, guidance being two."""
        solver = solver_of(item.method)
        encoding = 0 if item.kind == FRESH else item.steps * len(solver.pattern.reads)
        sampler, _ = self.setup.drawn.sampler(solver, item.steps, item.guidance)
        sample, _ = evaluations(sampler, diffrax.DirectAdjoint())
        gradient = np.multiply(evaluations(sampler, aj.DiscreteAdjoint()), self.options.iterations if item.kind == DRIVEN else 0)
        forward, backward = gradient + (encoding + sample, 0)
        return int(forward), int(backward)

    def audited(self) -> list[tuple[str, Any]]:
        """The exact gradient of (3) in the noises, and the continuous one, where they start: of the first images that the edit (2) leaves misread."""
        item = self.items[-1]
        if item.kind != DRIVEN:
            return []
        judge, edit = next(iter(self.setup.judges.values())), Item(EDIT, item.method, item.steps, item.guidance)
        order = np.argsort(judge.read(mesh.fetched(self.made(edit))) == self.setup.new, kind="stable")[:AUDITED]
        few = {name: getattr(self.setup, name)[order] for name in ("images", "own", "new")}
        steering, given, variables = Editing(self.options, self.setup._replace(**few), self.items).steering(item)
        adjoints = {"exact, used": aj.DiscreteAdjoint(), f"AdjointDEIS(steps={item.steps})": aj.AdjointDEIS()}
        rows = audit(steering.sampler, given, {"as encoded": variables}, adjoints)
        return [(point, row) for point, row in rows if row.wrt != "embedding"]


def main(options: Options) -> None:
    run, setup, items = Run(Path(options.out), recorded(options), options.resume, options.checkpointer), problem(options), plan(options)
    editing = Editing(options, setup, items, mesh.make(options.mesh, len(setup.own)))
    restored = run.restore(np.zeros((len(items), *setup.images.shape), np.float32))
    progress = run.follow(iterate(editing.step, restored, len(items)), restored, len(items), options.save_every)
    found = Outcome(setup.own, setup.new, items, progress.history, [editing.work(item) for item in items])
    run.write({"final.npz": npz({"images": setup.images, "own": setup.own, "new": setup.new, "made": progress.state})})
    run.write({"results.json": to_json(results(found)), **views(found, np.asarray(setup.images), np.asarray(progress.state))})
    run.write({"report.md": document(found, setup.note, options, editing.audited(), progress.seconds)})


if __name__ == "__main__":
    command(main, Options)
