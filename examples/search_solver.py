"""Solver search (S^3): schedules found for a network at a few evaluations, against the multistep samplers in use, on noises not seen before.

The error of a sampler at n evaluations, x(T) -> x_b, r_b the reference by many steps of UniPC-2, over a batch of B noises:

    E = prod_b (|x_b - r_b| / |r_b|)^(1/B)                                                                            (1)

1. The usual samplers (`aj.search.usual`: DDIM, DEIS, DPM-Solver, DPM-Solver++, UniPC and exponential Adams methods in several splittings) on the
   usual grids are ranked by (1) on some noises.
2. `aj.search_schedule` starts from the best of them and varies order, splitting, variable, rule, corrector and time of each step, on these noises.
3. The schedule found and the best of the usual ones are measured on fresh noises; of each usual sampler the best grid counts.
4. What it means for gradients: with the loss of each image to the next image of the reference, n its entries,

    L = sum_b |x_b - r_{b+1}|^2 / n,                                                                                  (2)

   dL/dx_T through the schedule and through the best usual sampler, both exact (`DiscreteAdjoint`), against that through the reference.

Sources: Liu et al., A unified sampling framework for solver searching of diffusion probabilistic models (S^3, 2023);
Zhao et al., UniPC (NeurIPS 2023); Lu et al., DPM-Solver++ (2022); Zhang & Chen, DEIS (ICLR 2023).

    python examples/search_solver.py --config configs/search_solver.toml --out runs/search_solver
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from own_network.flow_vit import chosen_flow_vit
from search_report import FINALISTS, NAMES, Key, claim, errors_picture, loaded, reported, rows_of, samples_picture

import adjoint_jax as aj
from adjoint_jax import _build, checkpoints
from adjoint_jax._misfits import at_least
from adjoint_jax.audit import compare
from adjoint_jax.checkpoints._files import to_json
from adjoint_jax.experiments import OnMesh, Run, command, iterate, mesh, npz, recorded

SPLITTINGS = ("data", "noise", 1.0)


@dataclass(frozen=True)
class Options(OnMesh):
    """Searches for solver schedules and compares them with the usual samplers."""

    out: str = "runs/search_solver"
    """The folder to write; must be absent or empty, or hold the run to --resume."""
    checkpoint: str | None = None
    """A folder in diffusers' layout, or the id org/name of one on the Hugging Face hub; by default the embedded digits."""
    flow_vit: str | None = None
    """The weights of the flow ViT, mnist_flow_vit.npz of the shared data, in place of a checkpoint."""
    size: int | None = None
    """Height and width of the images in pixels; by default the checkpoint's sample_size."""
    t_end: float | None = None
    """Where samples end; by default at the process's data end."""
    nfe: tuple[int, ...] = (5, 8, 10)
    """Network evaluations, which are steps, to search a schedule for."""
    images: int = 16
    """Noises of the search."""
    fresh: int = 32
    """Fresh noises, on which samplers are compared."""
    shown: int = 6
    """Images of each sampler in the picture."""
    tries: int = 160
    """Schedules that the evolution tries for each number of evaluations."""
    descents: int = 1
    """Of the best schedules, those whose times are improved by gradient."""
    starts: int = 8
    """Of the usual samplers, the best on the noises of the search, from which it starts."""
    fine_steps: int = 60
    """Steps of the fine grid between whose nodes those of the schedules lie."""
    reference_steps: int = 400
    """Steps of the reference; of a network that was trained on whole times as many of these."""
    gradient_nfe: int = 8
    """One of --nfe: where gradients are compared."""
    gradient_images: int = 8
    """Fresh noises for the gradients."""
    schedules: str | None = None
    """A folder with schedule_N.json of an earlier run, which are compared instead of searching anew."""


class Problem(NamedTuple):
    """What is sampled: the network's part of `args`, the number of classes (0 without), the shape of an image, and its pixels in [-1, 1]."""

    term: aj.DiffusionTerm
    params: Any
    classes: int
    shape: tuple[int, ...]
    pixels: Callable[[Any], Any]
    t_end: float | None

    def batch(self, key: Any, count: int) -> tuple[Any, dict[str, Any]]:
        """x_T, and what `args` holds of each image: classes in turn."""
        spread = float(self.term.process.sigma(self.fine(2)[0]))
        x_T = spread * jax.random.normal(key, (count, *self.shape), jnp.float32)
        return x_T, {"cond": jnp.arange(count) % self.classes} if self.classes else {}

    def fine(self, steps: int) -> np.ndarray:
        return aj.search.fine_grid(self.term.process, steps, t_end=self.t_end)

    def finest(self, steps: int) -> np.ndarray:
        """The reference's grid: on the whole times of training where a network knows only these."""
        if not isinstance(self.term.process, aj.VPDiscrete):
            return self.fine(steps)
        return np.unique(np.round(aj.grids.quadratic(self.term.process, steps, t_end=self.t_end)))[::-1]


def problem_of(options: Options) -> Problem:
    if options.flow_vit is not None:
        if options.size is not None:
            raise ValueError("--flow-vit says how large its images are: leave --size out.")
        term, params = chosen_flow_vit(options.flow_vit, options.checkpoint)
        return Problem(term, params, 10, (28, 28, 1), lambda x: 2 * x - 1, options.t_end)
    path = _build.DIGITS if options.checkpoint is None else checkpoints.fetched(options.checkpoint)
    network, params, process, prediction = checkpoints.load(path)
    table = params.get("class_embedding", {}).get("embedding")
    shape = _build.image_shape(options, path, params)
    return Problem(aj.DiffusionTerm(network, process, prediction), params, 0 if table is None else len(table) - 1, shape, lambda x: x, options.t_end)


def checked(options: Options) -> Options:
    at_least(options, 1, "images", "shown", "starts", "save_every")
    at_least(options, 2, "fresh", "gradient_images", "reference_steps")
    at_least(options, 0, "tries", "descents", "seed")
    if not options.nfe or not all(1 < n < options.fine_steps for n in options.nfe):
        raise ValueError(f"--nfe are numbers from 2 to one less than --fine-steps, {options.fine_steps}; got {options.nfe}.")
    if options.gradient_nfe not in options.nfe:
        raise ValueError(f"--gradient-nfe must be one of --nfe, {options.nfe}; got {options.gradient_nfe}.")
    for count in (options.images, options.fresh, options.gradient_images):
        mesh.make(options.mesh, count)
    if max(options.shown, options.gradient_images) > options.fresh:
        raise ValueError(f"--shown and --gradient-images are of the --fresh noises, {options.fresh}; got {options.shown}, {options.gradient_images}.")
    return options


def mean_error(x: np.ndarray, reference: np.ndarray) -> float:
    """(1)."""
    return float(np.exp(np.mean(np.log(aj.search.distances(x, reference)))))


def solved(problem: Problem, x_T: Any, args: Any, grid: Any, solver: Any) -> np.ndarray:
    return mesh.host(jax.jit(lambda x, args: aj.sample(problem.term, x, args, grid=grid, solver=solver))(x_T, args))


def gradient(problem: Problem, x_T: Any, args: Any, wanted: Any, grid: Any, solver: Any, adjoint: Any = None) -> np.ndarray:
    """dL/dx_T of (2), `wanted` being r_{b+1}."""

    def loss(x: Any, args: Any, wanted: Any) -> Any:
        return jnp.sum((aj.sample(problem.term, x, args, grid=grid, solver=solver, adjoint=adjoint) - wanted) ** 2) / wanted[0].size

    return mesh.host(jax.jit(jax.grad(loss))(x_T, args, wanted))


@dataclass(frozen=True)
class Steps:
    """The iterates: the references, for each number of evaluations the search and the comparison, the gradients; their state is on the host."""

    options: Options
    problem: Problem

    @cached_property
    def devices(self) -> Mesh | None:
        return mesh.make(self.options.mesh, self.options.images)

    @cached_property
    def params(self) -> Any:
        return mesh.weights(self.problem.params, self.devices)

    @property
    def items(self) -> list[tuple[str, int]]:
        options = self.options
        return [("references", 0), *((kind, n) for n in options.nfe for kind in ("search", "compare")), ("gradients", options.gradient_nfe)]

    def start(self) -> dict[str, Any]:
        options, shape = self.options, self.problem.shape
        counts = {"trained": (options.images,), "reference": (options.fresh,)}
        counts |= {name: (len(options.nfe), options.fresh) for name in ("usual", "searched")}
        counts |= {f"gradient_{name}": (options.gradient_images,) for name in ("usual", "searched", "reference")}
        return {name: np.zeros((*count, *shape), np.float32) for name, count in counts.items()}

    def noises(self, fresh: bool, first: int | None = None) -> tuple[Any, Any]:
        """(x_T, args) of the comparison or of the search, or of the first so many of them, on the devices."""
        count = self.options.fresh if fresh else self.options.images
        x_T, args = self.problem.batch(jax.random.fold_in(jax.random.key(self.options.seed), int(fresh)), count)
        x_T, args = self.spread((x_T[:first], {name: value[:first] for name, value in args.items()}))
        return x_T, {"params": self.params, **args}

    def spread(self, values: Any) -> Any:
        """One of each image, on the devices."""
        return mesh.batched(values, self.devices)

    def usual(self, n: int) -> dict[Key, aj.Schedule]:
        found = aj.search.usual(self.problem.term.process, self.problem.fine(self.options.fine_steps), n, SPLITTINGS)
        return {Key(*key): schedule for key, schedule in found.items()}

    def __call__(self, state: dict[str, Any], history: Sequence[dict[str, Any]], k: int) -> tuple[dict[str, Any], dict[str, Any]]:
        kind, n = self.items[k]
        changed, row = getattr(self, f"_{kind}")(state, history, n)
        return state | changed, {"iteration": k, "item": kind, "evaluations": n, **row}

    def _references(self, state: dict[str, Any], history: Any, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The reference, and how far one of half its steps is from it."""
        steps, made = self.options.reference_steps, {}
        for name, fresh in (("trained", False), ("reference", True)):
            x_T, args = self.noises(fresh)
            made[name] = solved(self.problem, x_T, args, self.problem.finest(steps), aj.UniPC(2))
        half = solved(self.problem, x_T, args, self.problem.finest(steps // 2), aj.UniPC(2))
        return made, {"halved": mean_error(half, made["reference"]), "steps": len(self.problem.finest(steps)) - 1}

    def _search(self, state: dict[str, Any], history: Any, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The usual samplers ranked on the noises of the search, and the schedule found from the best of them."""
        options, (x_T, args) = self.options, self.noises(False)
        usual = self.usual(n)
        samples = zip(usual, aj.search.follow(self.problem.term, x_T, args, usual.values()), strict=True)
        errors = {key: mean_error(mesh.host(x), state["trained"]) for key, x in samples if x is not None}
        ranked = sorted((key for key in errors if np.isfinite(errors[key])), key=lambda key: errors[key])
        if options.schedules is not None:
            schedule = aj.Schedule.load(Path(options.schedules) / f"schedule_{n}.json")
        else:
            schedule = aj.search_schedule(
                self.problem.term, x_T, args, steps=n, grid=self.problem.fine(options.fine_steps), reference=self.spread(state["trained"]),
                evaluations=options.tries, descents=options.descents, splittings=SPLITTINGS,
                starts=[usual[key] for key in ranked[: options.starts]], seed=options.seed,
            )  # fmt: skip
        (found,) = aj.search.follow(self.problem.term, x_T, args, [schedule])
        order = [[*key, errors[key]] for key in ranked]
        return {}, {"error": mean_error(mesh.host(found), state["trained"]), "schedule": asdict(schedule), "ranked": order}

    def _compare(self, state: dict[str, Any], history: Any, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The schedule and the finalists on fresh noises."""
        (x_T, args), usual = self.noises(True), self.usual(n)
        ranked = [Key(*key[:3]) for key in history[-1]["ranked"]]
        shown = {key.family for key in ranked[:FINALISTS]} | set(NAMES.values())
        finalists = ranked[:FINALISTS] + [key for key in ranked[FINALISTS:] if key.family in shown]
        schedules = {key: usual[key] for key in finalists}
        best: dict[str, tuple[float, Any, Any]] = {}
        for key, x in zip(schedules, map(mesh.host, aj.search.follow(self.problem.term, x_T, args, schedules.values())), strict=True):
            error = mean_error(x, state["reference"])
            if key.family not in best or error < best[key.family][0]:
                best[key.family] = error, key, x
        name = min(best, key=lambda family: best[family][0])
        error, key, x = best[name]
        (found,) = map(mesh.host, aj.search.follow(self.problem.term, x_T, args, [loaded(history[-1]["schedule"])]))
        index = self.options.nfe.index(n)
        apart = [aj.search.distances(each, state["reference"]) for each in (x, found)]
        row = {
            "searched": mean_error(found, state["reference"]), "usual": error, "best": [*key], "best_name": name,
            "better": int(np.sum(apart[1] < apart[0])), "per_image": {"usual": apart[0].tolist(), "searched": apart[1].tolist()},
            "families": {family: [value[0], value[1].grid] for family, value in sorted(best.items(), key=lambda pair: pair[1][0])},
        }  # fmt: skip
        return {name: mesh.replaced(state[name], index, images) for name, images in (("usual", x), ("searched", found))}, row

    def _gradients(self, state: dict[str, Any], history: Any, n: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Three gradients of (2), and the exact one through the schedule by plain autodiff."""
        count = self.options.gradient_images
        (x_T, args), wanted = self.noises(True, count), self.spread(np.roll(state["reference"][:count], -1, axis=0))
        searched, compared = (rows_of(history, kind)[n] for kind in ("search", "compare"))
        schedule, best = loaded(searched["schedule"]), self.usual(n)[Key(*compared["best"])]
        along = lambda grid, solver, adjoint=None: gradient(self.problem, x_T, args, wanted, grid, solver, adjoint)  # noqa: E731
        exact = along(self.problem.finest(self.options.reference_steps), aj.UniPC(2))
        made = {"searched": along(np.array(schedule.times), schedule), "usual": along(np.array(best.times), best), "reference": exact}
        direct = along(np.array(schedule.times), schedule, aj.DirectAdjoint())
        measured = {name: compare(made[name], exact) for name in ("usual", "searched")}
        images = {name: [compare(g, e)[0] for g, e in zip(made[name], exact, strict=True)] for name in measured}
        row = {"gradients": measured, "per_image": images, "autodiff": compare(made["searched"], direct)}
        return {f"gradient_{name}": value for name, value in made.items()}, row


def main(options: Options) -> None:
    options = checked(options)
    run, config = Run(Path(options.out), recorded(options), options.resume, options.checkpointer), recorded(options)
    steps = Steps(options, problem_of(options))
    restored = run.restore(steps.start())
    total, rows = len(steps.items), list(restored.history)

    def step(state: Any, k: int) -> tuple[Any, dict[str, Any]]:
        following, row = steps(state, rows, k)
        rows.append(json.loads(json.dumps(row)))  # as it is after a restart
        return following, rows[-1]

    progress = run.follow(iterate(step, restored, total), restored, total, options.save_every)
    searches, comparisons = (rows_of(progress.history, kind) for kind in ("search", "compare"))
    run.write({f"schedule_{n}.json": loaded(row["schedule"]).text().encode() for n, row in searches.items()})
    results = {
        "reference": {key: progress.history[0][key] for key in ("steps", "halved")},
        "evaluations": {n: {key: row[key] for key in ("searched", "usual", "best_name", "better", "families")} for n, row in comparisons.items()},
        "on the noises of the search": {n: row["error"] for n, row in searches.items()},
        "gradients": {key: progress.history[-1][key] for key in ("gradients", "per_image", "autodiff")},
    }
    run.write({
        "samples.png": samples_picture(options, steps.problem.pixels, progress.state, comparisons),
        "errors.png": errors_picture(comparisons),
        "final.npz": npz(progress.state),
        "results.json": to_json(results),
        "report.md": reported(options, config, progress, results),
    })  # fmt: skip
    print(f"{claim(options, results)} See {run.out / 'report.md'}.")


if __name__ == "__main__":
    command(main, Options)
