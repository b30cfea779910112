"""Testing recognisers of faces against morphing attacks: does a sampler's gradient make one image that passes as two people?

    python examples/morph_faces.py --config configs/morph_faces.toml --out runs/morph_faces

Two people of the ORL faces, one image each, are encoded by a diffusion autoencoder (`examples/train_faces.py`), averaged, and the average is
driven down the loss of a recogniser, equations (1) to (5) of `examples/morphing.py`, by each of several gradients of the same sampler. A
morph succeeds where it is more alike to *other* images of both people than all but one in a thousand pairs of two people are: MMPMR at FMR
0.1 %, equations (3) to (5) of `examples/recognition.py`, of the recogniser that was optimised against, MobileFace, and of one that was not,
local binary patterns. Morphs are judged as 8-bit images.

An iterate is one batch of pairs under one method and one sampler, so that a killed run loses one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from morphing import Greedy, Model, between, encoded, identity_loss, score
from morphing_report import written
from own_network.mobileface import load_mobileface, recognise
from recognition import chi_square, histograms
from train_faces import orl_faces, pixels
from tuning import least_seconds

import adjoint_jax as aj
from adjoint_jax import checkpoints
from adjoint_jax._misfits import at_least, known, positive
from adjoint_jax.experiments import OnMesh, Progress, Run, command, iterate, mesh, pictures, recorded
from adjoint_jax.experiments.engines import engine, evaluations, steady
from adjoint_jax.guide import Given, Sampler, Steering, audit

SAMPLERS = {"ode": aj.DPMSolverPP(order=2), "sde": aj.SDEDPMSolverPP(order=2), "sde-own": aj.SDEDPMSolverPP(order=2)}
PLAIN, GREEDY = "none", "greedy-dim:"
BETAS = (0.5, 0.9)  # those of Greedy-DiM; the usual ones go on where the loss has turned


@dataclass(frozen=True)
class Options(OnMesh):
    """Morphs of pairs of people, by several gradients, judged by two recognisers."""

    data: str = "../shared/data"
    """The folder of orl_faces.npz, mobileface_v2.npz and MobileFace_Identification_V2-symbol.json."""
    model: str = "examples/faces"
    """The folder of the diffusion autoencoder, with `unet` and `encoder`."""
    size: int = 64
    """Pixels along a side of the images that the model knows."""
    recogniser_size: int = 112
    """Pixels along a side of the images that the recogniser knows."""
    samplers: tuple[str, ...] = ("ode",)
    """ode (DPM-Solver++ 2M); sde (SDE-DPM-Solver++ 2M): injected noises are encoded, along one path for both people, and driven too; sde-own:
    along a path for each."""
    methods: tuple[str, ...] = ("none", "greedy-dim:10", "published-1:5", "deis:5", "kept")
    """none (the averaged start), greedy-dim:K (K updates of the predicted noise at each step of the sampler), or gradients by the names of
    `adjoint_jax.experiments.engines`."""
    pairs: int = 100
    """Pairs of different people, drawn without repetition."""
    batch: int = 20
    """Pairs at a time; a divisor of the pairs."""
    image: int = 0
    """Which of a person's ten images is encoded; the others are the probes."""
    unseen: int = 2
    """How many of a person's last images the model was not trained on."""
    steps: int = 10
    """Steps of the sampler."""
    encoding_steps: int = 50
    """Steps of the inversion of the ODE."""
    iterations: int = 8
    """Updates of x_T, z and noises."""
    equal_work: bool = False
    """Of each gradient as many updates as cost, in evaluations of the network, what those of the last of --methods do."""
    learning_rate: float = 0.03
    """Of Adam(0.5, 0.9), for x_T, whose entries have variance 1. Adam does not see a gradient's scale, in favour of wrong ones."""
    noise_rate: float = 0.0067
    """Of the same, for the injected noises: N of them move sqrt(N) times as far as x_T alone would."""
    embedding_rate: float = 0.01
    """Of the same, for z."""
    greedy_rate: float = 0.01
    """Of the same, for the predicted noise of greedy-dim."""
    goal: float | None = None
    """The mean loss that the gradients race for; by default twice the distance at the threshold, where a morph matches both encoded images."""
    match_rate: float = 1e-3
    """The false match rate that sets the thresholds."""
    cells: int = 4
    """Cells of the local binary patterns along a side."""


class Judge(NamedTuple):
    """A recogniser as a guard has it: `templates(images)` of images `[n, H, W]` of bytes, and `compare(templates, others)` `[A, B]`, larger is
    more alike."""

    name: str
    templates: Callable[[np.ndarray], Any]
    compare: Callable[[Any, Any], np.ndarray]


class State(NamedTuple):
    """`morphs` `[samplers, methods, pairs, H, W]`, bytes."""

    morphs: np.ndarray


@dataclass(frozen=True)
class Morphing:
    """All that the options stand for: images, pairs, model, recognisers, and the jobs."""

    options: Options

    @cached_property
    def faces(self) -> np.ndarray:
        """`[people, images, H, W]`, bytes."""
        return orl_faces(Path(self.options.data), self.options.size)

    @cached_property
    def pairs(self) -> np.ndarray:
        """`[pairs, 2]`, a seeded choice of all pairs of people."""
        first, second = np.triu_indices(len(self.faces), 1)
        chosen = np.random.default_rng(self.options.seed).permutation(len(first))[: self.options.pairs]
        return np.stack([first[chosen], second[chosen]], axis=1)

    @cached_property
    def model(self) -> Model:
        folder = Path(self.options.model)
        unet = checkpoints.load(folder / "unet")
        encoder, params = checkpoints.load_model(folder / "encoder")
        return Model(unet, lambda images: encoder.apply({"params": params}, images))

    @cached_property
    def devices(self) -> Mesh | None:
        return mesh.make(self.options.mesh, self.options.batch)

    @cached_property
    def recogniser(self) -> tuple[Callable, Any]:
        folder = Path(self.options.data)
        graph = folder / "MobileFace_Identification_V2-symbol.json"
        size = self.options.recogniser_size
        features, params = load_mobileface(folder / "mobileface_v2.npz", graph, size)
        try:
            jax.eval_shape(features, params, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
        except TypeError as error:
            raise ValueError(f"The recogniser does not take images of {size} x {size}, --recogniser-size: {error}") from error
        return partial(recognise, features, size), params

    @cached_property
    def features(self) -> Callable[[np.ndarray], np.ndarray]:
        """Of images `[n, H, W]` of bytes, in batches, `[n, D]`."""
        function, params = self.recogniser
        jitted = jax.jit(function)

        def features(images: np.ndarray) -> np.ndarray:
            size = min(50, len(images))
            padded = np.concatenate([images, images[: -len(images) % size]])
            parts = [jitted(params, as_states(padded[i : i + size])) for i in range(0, len(padded), size)]
            return np.concatenate(parts)[: len(images)]

        return features

    @cached_property
    def judges(self) -> tuple[Judge, Judge]:
        """The recogniser that is optimised against, and the one that is not, which takes the better of an image and its mirror image."""

        def patterns(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return histograms(images, self.options.cells), histograms(images[:, :, ::-1], self.options.cells)

        def compare(these: Any, those: Any) -> np.ndarray:
            return np.maximum(*(chi_square(each, those[0]) for each in these))

        return Judge("MobileFace", self.features, lambda these, those: these @ those.T), Judge("LBP", patterns, compare)

    @cached_property
    def jobs(self) -> list[tuple[int, int, int]]:
        """(sampler, method, batch) of each iterate, batch by batch."""
        batches = range(self.options.pairs // self.options.batch)
        return [(s, m, b) for b in batches for s in range(len(self.options.samplers)) for m in range(len(self.options.methods))]

    @lru_cache(maxsize=3)  # noqa: B019
    def sampler(self, kind: str) -> Sampler:
        unet = self.model.unet
        grid = aj.grids.log_snr(unet.process, self.options.steps)
        return Sampler(unet.network, unet.process, unet.prediction, grid, SAMPLERS[kind])

    @lru_cache(maxsize=3)  # noqa: B019
    def encoder(self, kind: str) -> Callable:
        """The jitted encoder of images, with paths for an SDE."""
        return jax.jit(lambda images, path: encoded(self.model, self.sampler(kind), images, self.options.encoding_steps, path))

    @cached_property
    def inverted(self) -> dict[str, Any]:
        """Each person's encoding by the ODE."""
        images, size = as_states(self.faces[:, self.options.image]), self.options.batch
        padded = jnp.concatenate([images, *[images[:1]] * (-len(images) % size)])
        parts = [self.encoder("ode")(part, None) for part in jnp.split(padded, len(padded) // size)]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(images)], *parts)

    def encodings(self, kind: str, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those of both people of the batch's pairs."""
        options, pairs = self.options, self.pairs[batch * self.options.batch :][: self.options.batch]
        if kind == "ode":
            return tuple(jax.tree.map(lambda leaf, k=k: leaf[pairs[:, k]], self.inverted) for k in (0, 1))
        key, shape = jax.random.fold_in(jax.random.key(options.seed), batch), (len(pairs), options.size // 2, options.size // 2, 4)
        paths = [jax.random.normal(jax.random.fold_in(key, k), (options.steps, *shape), jnp.float32) for k in (0, 1)]
        images = [as_states(self.faces[pairs[:, k], options.image]) for k in (0, 1)]
        return tuple(self.encoder(kind)(images[k], paths[k if kind == "sde-own" else 0]) for k in (0, 1))

    @lru_cache(maxsize=2)  # noqa: B019
    def start(self, kind: str, batch: int) -> tuple[Given, dict[str, Any]]:
        """The loss against the batch's pairs, and the averaged start, on the devices."""
        pairs = self.pairs[batch * self.options.batch :][: self.options.batch]
        wanted = [self.features(self.faces[pairs[:, k], self.options.image]) for k in (0, 1)]
        metric = jax.tree_util.Partial(self.score, mesh.everywhere(self.recogniser[1], self.devices), *mesh.batched(wanted, self.devices))
        given = Given(self.params, mesh.everywhere(jnp.float32(1), self.devices), None, metric)
        return given, mesh.spread(between(*self.encodings(kind, batch)), self.devices)

    @cached_property
    def params(self) -> Any:
        """The UNet's, on the devices."""
        return mesh.weights(self.model.unet.params, self.devices)

    @cached_property
    def score(self) -> Callable:
        return partial(score, self.recogniser[0])

    @lru_cache(maxsize=16)  # noqa: B019
    def sampled(self, kind: str, greedy_steps: int) -> Callable:
        """The jitted sampler, its network that of (5) where there are updates."""
        sampler = self.sampler(kind)
        if greedy_steps:
            greedy = Greedy(self.model.term, greedy_steps, optax.adam(self.options.greedy_rate, *BETAS))
            sampler = Sampler(greedy, sampler.process, "eps", sampler.grid, sampler.solver)
        return jax.jit(lambda given, variables: sampler(given, variables))

    @lru_cache(maxsize=64)  # noqa: B019
    def steering(self, kind: str, method: str) -> Steering:
        """How a method drives."""
        driven = ("x_T", "embedding") if kind == "ode" else ("x_T", "embedding", "noise")
        rates = {"x_T": self.options.learning_rate, "embedding": self.options.embedding_rate, "noise": self.options.noise_rate}
        optimiser = optax.partition({name: optax.adam(rates[name], *BETAS) for name in driven}, {name: name for name in driven})
        return Steering(self.sampler(kind), engine(method), optimiser, driven, "norm")

    def morph(self, kind: str, method: str, batch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The batch's morphs, bytes `[B, H, W]`, and the losses (4) `[B]` at each iterate and of the end."""
        given, variables = self.start(kind, batch)
        losses = []
        if is_gradient(method):
            state, update = self.driven(kind, method, variables)
            for _ in range(self.updates(kind, method)):
                state, seen = update(given, state)
                losses.append(-np.asarray(mesh.fetched(seen.scores)))
            variables = state.variables
        made = pictures.as_bytes(pixels(mesh.fetched(self.sampled(kind, greedy_steps(method))(self.told(given, method), variables)))[..., 0])
        wanted = mesh.fetched(given.metric.args[1:])
        losses.append(np.asarray(identity_loss(self.features(made), *wanted)))
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"{method} on the {kind} diverged in batch {batch}: use a lower --learning-rate.")
        return made, losses

    def driven(self, kind: str, method: str, variables: dict[str, Any]) -> tuple[Any, Callable[[Given, Any], tuple[Any, Any]]]:
        """The state that a gradient starts from, and its jitted update."""
        steering = self.steering(kind, method)
        state = steering.start(variables).state
        return state, mesh.staying(steering.jitted, state)

    def told(self, given: Given, method: str) -> Given:
        """What the sampler of a method takes: greedy-dim's network knows the metric."""
        return given._replace(params={"network": given.params, "metric": given.metric}) if greedy_steps(method) else given

    def begun(self) -> State:
        """Before the first iterate."""
        options = self.options
        return State(np.zeros((len(options.samplers), len(options.methods), options.pairs, *self.faces.shape[2:]), np.uint8))

    def step(self, state: State, k: int) -> tuple[State, dict[str, Any]]:
        s, m, b = self.jobs[k]
        kind, method = self.options.samplers[s], self.options.methods[m]
        made, losses = self.morph(kind, method, b)
        morphs = np.array(state.morphs)
        morphs[s, m, b * self.options.batch :][: len(made)] = made
        row = {"sampler": kind, "method": method, "batch": b, "loss": float(losses[-1].mean())}
        return State(morphs), row | {"losses": [float(each.mean()) for each in losses], "per_pair": losses[-1].tolist()}

    def counts(self, kind: str, method: str) -> tuple[int, int, int]:
        """(forward, backward) evaluations of the network and gradients of the recogniser, a morph."""
        options = self.options
        if not is_gradient(method):
            return options.steps, 0, options.steps * greedy_steps(method)
        (forward, backward), updates = evaluations(self.sampler(kind), engine(method)), self.updates(kind, method)
        return updates * forward + options.steps, updates * backward, updates

    def updates(self, kind: str, method: str) -> int:
        """How many a gradient gets."""
        if not self.options.equal_work:
            return self.options.iterations
        return ceil(self.options.iterations * self.work(kind, self.options.methods[-1]) / self.work(kind, method))

    def work(self, kind: str, method: str) -> int:
        """Evaluations of the network, forward and backward, by an update of a gradient, or by the sample of what has none."""
        return sum(evaluations(self.sampler(kind), engine(method))) if is_gradient(method) else self.options.steps

    def seconds(self) -> dict[tuple[str, str], float]:
        """Of one update of the first batch by each gradient, and of the whole of what has none."""
        calls = {}
        for kind, method in product(self.options.samplers, self.options.methods):
            given, variables = self.start(kind, 0)
            if is_gradient(method):
                state, update = self.driven(kind, method, variables)
                calls[kind, method] = partial(update, given, state)
            else:
                calls[kind, method] = partial(self.sampled(kind, greedy_steps(method)), self.told(given, method), variables)
        return least_seconds(calls, repeats=2)

    def audited(self) -> list[tuple[str, Any]]:
        """The gradients against the exact one at the starts of the first batch."""
        rows = []
        for kind in self.options.samplers:
            given, variables = self.start(kind, 0)
            adjoints = {method: engine(method) for method in self.options.methods if is_gradient(method)}
            rows += audit(self.sampler(kind), given, {f"start, {kind}": variables}, adjoints) if adjoints else []
        return rows


def is_gradient(method: str) -> bool:
    return method != PLAIN and not method.startswith(GREEDY)


def greedy_steps(method: str) -> int:
    """K of a method greedy-dim:K, 0 of others."""
    number = method.removeprefix(GREEDY)
    if method.startswith(GREEDY) and not (number.isdecimal() and int(number)):
        raise ValueError(f"The method {method} lacks a number of updates, at least 1: say greedy-dim:20.")
    return int(number) if method.startswith(GREEDY) else 0


def as_states(images: np.ndarray) -> Any:
    """Bytes `[n, H, W]` as images `[n, H, W, 1]` in [-1, 1]."""
    return pictures.from_bytes(jnp.asarray(images[..., None]))


def checked(options: Options) -> Morphing:
    """Raises ValueError for options that do not fit."""
    at_least(options, 1, "pairs", "batch", "steps", "encoding_steps", "iterations", "save_every", "cells")
    positive(options, *(["goal"] if options.goal is not None else []), "learning_rate", "noise_rate", "embedding_rate", "greedy_rate", "match_rate")
    for kind in options.samplers:
        known("samplers", kind, list(SAMPLERS))
    for method in options.methods:
        _ = steady(method) if is_gradient(method) else greedy_steps(method)
    made = Morphing(options)
    if not options.samplers or not options.methods:
        raise ValueError("Give at least one sampler and one method.")
    if options.equal_work and not is_gradient(options.methods[-1]):
        raise ValueError(f"--equal-work measures by the last of --methods, and {options.methods[-1]} has no updates: let a gradient be the last.")
    people, images = made.faces.shape[:2]
    if options.pairs > people * (people - 1) // 2 or options.pairs % options.batch:
        raise ValueError(f"--pairs must be at most {people * (people - 1) // 2}, and a multiple of --batch; got {options.pairs} and {options.batch}.")
    if not 1 <= options.unseen < images:
        raise ValueError(f"--unseen must be from 1 to {images - 1}; got {options.unseen}.")
    if not 0 <= options.image < images - options.unseen:
        raise ValueError(f"--image must be one of the {images - options.unseen} that the model was trained on, from 0; got {options.image}.")
    _ = made.model, made.recogniser, made.devices
    return made


def main(options: Options) -> None:
    run = Run(Path(options.out), recorded(options), options.resume, options.checkpointer)
    made = checked(options)
    restored: Progress = run.restore(made.begun())
    total = len(made.jobs)
    progress = run.follow(iterate(made.step, restored, total), restored, total, options.save_every, show="loss")
    sentence = written(run, made, progress)
    print(f"{sentence} See {run.out / 'report.md'}.")


if __name__ == "__main__":
    command(main, Options)
