"""The README's table: error of each adjoint's dL/dx_T and dL/dcond on the embedded digit network, against the exact gradient of the sampler.

    python benchmarks/adjoints.py --out runs/adjoints

float32, DPM-Solver++(2M), N = 48 steps on a grid uniform in lam and on one uniform in t; M adjoint
steps at the nodes nearest to uniform in lam and in t;
16 seeds, one image each; L = -log p(target class) by the embedded classifier, the condition a class embedding
for each image. Prints the median error and
cosine over the seeds; `results.json` is written after every entry and resumed from.
"""

import json
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import adjoint_jax as aj
from adjoint_jax.adjoints._nodes import Nodes, choose, lay_out
from adjoint_jax.adjoints.deis import adams
from adjoint_jax.audit import compare
from adjoint_jax.checkpoints import EMBEDDED, load_model

GRIDS = {"lam": aj.grids.log_snr, "t": aj.grids.uniform}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/adjoints")
    steps: int = 48
    adjoint_steps: tuple[int, ...] = (6, 12, 24, 48)
    seeds: int = 16
    quick: bool = False
    """Only M = 12 on lam nodes."""


def methods(steps: int, nodes: str) -> dict[str, aj.AdjointDEIS]:
    table = {f"published {order}": aj.AdjointDEIS(order, np.inf, steps, nodes, published=True) for order in (1, 2)}
    for c in (0.5, 1.0):
        table |= {f"c={c:g} AB{order}": aj.AdjointDEIS(order, c, steps, nodes, mode="AB") for order in (2, 3)}
        table |= {f"c={c:g} PECE{order}": aj.AdjointDEIS(order, c, steps, nodes) for order in (2, 3, 4)}
    return table


class Problem:
    """The sampler, its loss, its states on each grid, and the gradient by any adjoint."""

    def __init__(self, config: Config):
        network, self.params, process, prediction = aj.load()
        self.term = aj.DiffusionTerm(network, process, prediction)
        self.classifier, self.weights = load_model(EMBEDDED / "classifier")
        self.grids = {name: make(process, config.steps) for name, make in GRIDS.items()}
        self.x_T = jax.random.normal(jax.random.key(0), (config.seeds, 28, 28, 1))
        labels = jnp.arange(config.seeds) % 10
        self.cond, self.target = self.params["class_embedding"]["embedding"][labels], (labels + 5) % 10
        self.paths = {name: aj.sample(self.term, self.x_T, self.args(self.cond), grid=grid, save=True).xs for name, grid in self.grids.items()}
        self.ends = {name: jax.jit(jax.grad(self.loss))(path[-1]) for name, path in self.paths.items()}

    def args(self, cond):
        return {"params": self.params, "cond": cond}

    def loss(self, images):
        logits: Any = self.classifier.apply({"params": self.weights}, images)
        scores = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.take_along_axis(scores, self.target[:, None], axis=1))

    def public(self, adjoint, grid: str):
        """dL/dx_T and dL/dcond through `aj.sample`."""
        objective = lambda x, cond: self.loss(aj.sample(self.term, x, self.args(cond), grid=self.grids[grid], adjoint=adjoint))  # noqa: E731
        return rows(jax.jit(jax.grad(objective, (0, 1)))(self.x_T, self.cond))

    def stored(self, adjoint: aj.AdjointDEIS, grid: str):
        """The same from the stored states, the weights being data: one compiled program for all of a rule and a number of nodes."""
        ts, process = self.grids[grid], self.term.process
        index = choose(ts, process.lam(ts), adjoint.steps, adjoint.nodes)
        nodes, _ = lay_out(self.term, adjoint.splitting, ts, index, adjoint.rule)
        nodes = Nodes(*(jnp.asarray(value, jnp.float32) for value in nodes))
        visited = index[: len(index) - (adjoint.mode == "AB")]
        return rows(self._backward(self.ends[grid], self.paths[grid][visited], nodes, adjoint.rule))

    @partial(jax.jit, static_argnums=(0, 4))
    def _backward(self, end, kept, nodes, rule):
        def linearise(x, t, _):
            pull = jax.vjp(lambda x, cond: self.term.predict(t, x, self.args(cond)), x, self.cond)[1]
            return lambda of_p: (*pull(of_p), None)

        return adams(linearise, end, jnp.zeros_like(self.cond), kept, None, nodes, rule=rule)[:2]


def rows(gradients):
    """One row a seed."""
    return tuple(np.asarray(g).reshape(len(g), -1) for g in gradients)


def entries(config: Config):
    for grid in GRIDS:
        for steps in (12,) if config.quick else config.adjoint_steps:
            for nodes in ("lam", "t"):
                if nodes == "t" and (config.quick or steps == config.steps):
                    continue
                for name, adjoint in methods(steps, nodes).items():
                    yield grid, nodes, steps, name, adjoint


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    problem, exact = Problem(config), {}
    warnings.filterwarnings("ignore", "The published AdjointDEIS")
    for grid, nodes, steps, name, adjoint in tqdm(list(entries(config)), mininterval=30):
        key = f"{grid}/{nodes}/{steps}/{name}"
        if key in results:
            continue
        if grid not in exact:
            exact[grid] = problem.public(aj.DiscreteAdjoint(), grid)
            check = aj.AdjointDEIS(2, 1.0, 12)
            for one, two in zip(problem.public(check, grid), problem.stored(check, grid), strict=True):
                print(f"aj.sample against the stored states, grid {grid}: relative difference {compare(two, one)[0]:.1e}", flush=True)
        found = problem.stored(adjoint, grid)
        results[key] = {
            kind: np.nanmedian([compare(one, two)[:2] for one, two in zip(f, e, strict=True)], axis=0).tolist()
            for kind, f, e in zip(("x_T", "cond"), found, exact[grid], strict=True)
        }
        path.write_text(json.dumps(results, indent=1))
    show(results, config)


def show(results: dict, config: Config) -> None:
    """Median error (median cosine) in x_T / in cond."""
    for grid in GRIDS:
        for nodes in ("lam", "t"):
            steps = [m for m in config.adjoint_steps if any(key.startswith(f"{grid}/{nodes}/{m}/") for key in results)]
            if not steps:
                continue
            print(f"\nSampler's grid uniform in {grid}, adjoint's nodes uniform in {nodes}; N = {config.steps}\n")
            print("| method | " + " | ".join(f"M = {m}" for m in steps) + " |\n|" + "---|" * (len(steps) + 1))
            for name in methods(1, "lam"):
                cells = []
                for m in steps:
                    (ex, cx), (ec, cc) = (results[f"{grid}/{nodes}/{m}/{name}"][kind] for kind in ("x_T", "cond"))
                    cells.append(f"{ex:.1e} ({cx:.3f}) / {ec:.1e} ({cc:.3f})")
                print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(Config))
