"""Error of every adjoint's gradient against its cost: mixture, digits, flow ViT and 64x64 UNet, ODE and SDE, beside diffrax's and torchdiffeq's.

    python benchmarks/gradients.py --out runs/gradients

N steps of DPM-Solver++(2M), or SDE-DPM-Solver++(2M), on a grid uniform in log(alpha/sigma); L = 1/2 ||x_0 - y||^2, y noise; a batch of images,
each its own seed. An error is ||g - g_exact|| / ||g_exact|| of an image's dL/dx_T or of its condition's gradient, g_exact that of the sampler
that ran. Costs are network evaluations, F forward and B backward, counted in runs on the mixture, in units of C = 2N F + N B with the network's
own ratio B/F in flops. Fitted adjoints are fitted to one other batch of noise, with other conditions. Writes `results.json` after every entry
and resumes from it; `gradients.md` and `gradients.png` in the end.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from gradient_peers import PEERS, bytes_of
from gradient_report import write
from problems import PROBLEMS, Problem

import adjoint_jax as aj
from adjoint_jax._work import flops
from adjoint_jax.adjoints import InterpolatedAdjoint, LastK, fit_interpolation

EXACT = {"DiscreteAdjoint": aj.DiscreteAdjoint(), 'DiscreteAdjoint(keep="all")': aj.DiscreteAdjoint(keep="all")}
COUNTED = {"F": 0, "B": 0}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/gradients")
    shared: Path = Path("../shared/data")
    networks: tuple[str, ...] = ("mixture", "digits", "flow", "unet64")
    steps: tuple[int, ...] = (10, 20, 50)
    nodes: tuple[int, ...] = (4, 6, 8, 12, 24)
    kinds: tuple[str, ...] = ("ode", "sde")
    images: int = 8
    large_images: int = 1
    repeats: int = 3
    """Runs of which the shortest is the time."""
    methods: tuple[str, ...] = ()
    """Names of the rows to run; all where none is given."""


@dataclass
class Case:
    """A network, a sampler and its exact gradient."""

    problem: Problem
    pilot: Problem
    kind: str
    steps: int
    extra: dict = field(default_factory=dict)

    @cached_property
    def solver(self) -> Any:
        return aj.DPMSolverPP(2) if self.kind == "ode" else aj.SDEDPMSolverPP(2)

    @property
    def grid(self) -> np.ndarray:
        return self.problem.even(self.steps)

    def key(self, seed: int) -> dict[str, Any]:
        return {} if self.kind == "ode" else {"key": jax.random.key(seed)}

    @property
    def cond(self) -> Any:
        return self.problem.args.get("cond")

    def gradient(self, adjoint: Any, term: Any = None) -> Callable:
        """(x_T, cond, other arguments) -> dL/d(x_T, cond)."""
        target = jax.random.normal(jax.random.key(5), self.problem.x_T.shape)
        more = self.key(3)

        def loss(x: Any, cond: Any, args: Any) -> Any:
            args = args if cond is None else {**args, "cond": cond}
            out = aj.sample(term or self.problem.term, x, args, grid=self.grid, solver=self.solver, adjoint=adjoint, **more)
            return 0.5 * jnp.sum((out - target) ** 2)

        return jax.grad(loss, (0,) if self.cond is None else (0, 1))

    @property
    def given(self) -> tuple:
        return self.problem.x_T, self.cond, {name: value for name, value in self.problem.args.items() if name != "cond"}

    def fitted(self, steps: int, keep: bool) -> Any:
        """Fitted to the pilot, once for both ways of keeping."""
        if steps not in self.extra:
            p = self.pilot
            self.extra[steps] = fit_interpolation(p.term, p.x_T, p.args, grid=self.grid, solver=self.solver, steps=steps, pilots=2, **self.key(9))
        return InterpolatedAdjoint(keep=keep, fitted=self.extra[steps].fitted)


def methods(case: Case, nodes: tuple[int, ...]) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(name, M, what makes the adjoint)."""
    n = case.steps
    for name, adjoint in EXACT.items():
        yield name, n, lambda adjoint=adjoint: adjoint
    for m in (*(m for m in nodes if m < n), n):
        yield "AdjointDEIS-2M, published", m, lambda m=m: aj.AdjointDEIS(2, np.inf, m, published=True)
        yield "AdjointDEIS, c = 1", m, lambda m=m: aj.AdjointDEIS(3, 1.0, m)
        yield "AdjointDEIS, c = 1, kept", m, lambda m=m: aj.AdjointDEIS(3, 1.0, m, keep=True)
        if case.kind == "ode":
            yield "AdjointDPM (Heun)", m, lambda m=m: aj.AdjointDPM(steps=m)
        yield "last M steps (DRaFT-K)", m, lambda m=m: LastK(m)
        yield "interpolated", m, lambda m=m: InterpolatedAdjoint(3, 1.0, m)
    for m in sorted({*(m for m in nodes if m < n), *(round(share * n) for share in (0.25, 0.4, 0.5, 0.6, 0.7, 0.75))}):
        yield "fitted", m, lambda m=m: case.fitted(m, False)
        yield "fitted, kept", m, lambda m=m: case.fitted(m, True)


def counting(term: aj.DiffusionTerm) -> aj.DiffusionTerm:
    """A term whose network counts its evaluations in `COUNTED`."""

    def tick(name: str, x: Any) -> None:  # of x, for else it would leave the loop
        jax.debug.callback(lambda _: COUNTED.update({name: COUNTED[name] + 1}), x.ravel()[0])

    @jax.custom_vjp
    def counted(x: Any) -> Any:
        tick("F", x)
        return x

    def forward(x: Any) -> Any:
        tick("F", x)
        return x, None

    def backward(_: Any, cotangent: Any) -> Any:
        tick("B", cotangent)
        return (cotangent,)

    counted.defvjp(forward, backward)
    return aj.DiffusionTerm(lambda x, t, args: term.network(counted(x), t, args), term.process, term.prediction)


def evaluations(case: Case, adjoint: Any) -> tuple[int, int]:
    """F and B of one gradient in x_T."""
    COUNTED.update(F=0, B=0)
    x, cond, args = case.given
    jax.block_until_ready(jax.jit(lambda x: case.gradient(adjoint, counting(case.problem.term))(x, cond, args))(x))
    jax.effects_barrier()
    return COUNTED["F"], COUNTED["B"]


def errors(found: Any, exact: Any) -> list[float]:
    """Median and worst relative error and median cosine over the images."""
    g, e = (np.asarray(value, np.float64).reshape(len(value), -1) for value in (found, exact))
    with np.errstate(all="ignore"):
        away, cosine = aj.search.distances(g, e), np.sum(g * e, axis=1) / np.linalg.norm(e, axis=1) / np.linalg.norm(g, axis=1)
    return [float(np.median(away)), float(np.max(away)), float(np.median(cosine))]


def measured(config: Config, case: Case, adjoint: Any, exact: Any) -> dict[str, Any]:
    program = jax.jit(case.gradient(adjoint)).lower(*case.given).compile()
    times, found = [], ()
    for _ in range(1 if case.problem.large else config.repeats):
        begin = time.perf_counter()
        found = jax.block_until_ready(program(*case.given))
        times.append(time.perf_counter() - begin)
    entry = {"bytes": bytes_of(program), "seconds": min(times)}
    if exact is None:
        return entry | {"found": found}
    return entry | {name: errors(*pair) for name, *pair in zip(("x_T", "cond"), found, exact, strict=False)}


def ratio(problem: Problem) -> float:
    """B/F of the network in flops."""
    x, args = problem.x_T, problem.args
    predict = lambda x: problem.term.network(x, jnp.asarray(problem.end, x.dtype), args)  # noqa: E731
    forward = flops(predict, x)
    return flops(lambda x: jax.vjp(predict, x)[1](x), x) / forward - 1 if forward else 1.0


def run(config: Config, name: str, counts: dict, results: dict, save: Callable) -> None:
    images = config.large_images if name == "unet64" else config.images
    problem, pilot = (embedded(PROBLEMS[name](config.shared, images, seed), shift) for seed, shift in ((1, 0), (2, 5)))
    place = results.setdefault(name, {"ratio": ratio(problem)})
    for kind in config.kinds:
        for steps in config.steps:
            case = Case(problem, pilot, kind, steps)
            rows, exact = place.setdefault(kind, {}).setdefault(str(steps), {}), None
            for row, m, make in methods(case, config.nodes):
                label = f"{row} | {m}"
                if label in rows or (config.methods and row not in config.methods):
                    continue
                if exact is None:
                    exact = measured(config, case, EXACT["DiscreteAdjoint"], None)["found"]
                adjoint = make()
                if name == "mixture":
                    counts[f"{kind} {steps} {label}"] = evaluations(case, adjoint)
                rows[label] = measured(config, case, adjoint, exact) | {"F B": counts[f"{kind} {steps} {label}"]}
                save()
                jax.clear_caches()  # hundreds of programs would use up the memory maps of one process
            print(name, kind, steps, "done", flush=True)
    for peer, measure in PEERS.items():
        for steps in config.steps:
            if name in measure.networks and f"{peer} | {steps}" not in place.setdefault("peers", {}):
                place["peers"][f"{peer} | {steps}"] = measure(problem, steps, errors)
                save()


def embedded(problem: Problem, shift: int) -> Problem:
    """Conditions as vectors, one an image, rather than labels."""
    if problem.name == "mixture" or "cond" not in problem.args:
        return problem
    labels, params = (problem.args["cond"] + shift) % 10, problem.args["params"]
    table = params["y_encoder.weight"] if problem.name == "flow" else params["class_embedding"]["embedding"]
    return Problem(problem.name, problem.term, {**problem.args, "cond": table[labels]}, problem.x_T, problem.start, problem.end, problem.betas)


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "The published|AdjointDPM")
    path = config.out / "results.json"
    stored = json.loads(path.read_text()) if path.exists() else {"counts": {}, "networks": {}}
    for name in config.networks:
        run(config, name, stored["counts"], stored["networks"], lambda: path.write_text(json.dumps(stored, indent=1)))
    write(stored["networks"], config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
