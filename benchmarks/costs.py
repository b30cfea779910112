"""What the adjoints cost: memory, work, time beside the network's own, compilation; and whether the plan's choice is the fastest.

    python benchmarks/costs.py --out runs/costs

Bytes are the temporaries of compiled programs; work is flops of products and convolutions, a loop's body times its trips; times are minima of runs
that take turns. Prints tables as they are found and writes them to `costs.md`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from gradient_peers import bytes_of
from problems import PROBLEMS, Problem

import adjoint_jax as aj
from adjoint_jax._traced import in_order
from adjoint_jax._work import flops
from adjoint_jax.adjoints import InterpolatedAdjoint

ADJOINTS = {
    "DiscreteAdjoint": (aj.DiscreteAdjoint(), aj.DPMSolverPP(2)),
    'DiscreteAdjoint(states="multilevel")': (aj.DiscreteAdjoint(states="multilevel"), aj.DPMSolverPP(2)),
    "ReversibleAdjoint(2), BDIA": (aj.ReversibleAdjoint(2), aj.BDIA()),
    "ReversibleAdjoint(2), BELM": (aj.ReversibleAdjoint(2), aj.solvers.BELM()),
    "ReversibleAdjoint(2), EDICT": (aj.ReversibleAdjoint(2), aj.solvers.EDICT()),
    "ReversibleAdjoint(2), Rex (midpoint)": (aj.ReversibleAdjoint(2), aj.Rex(diffrax.Midpoint())),
    "AdjointDEIS(steps=12)": (aj.AdjointDEIS(steps=12), aj.DPMSolverPP(2)),
    "InterpolatedAdjoint(steps=12)": (InterpolatedAdjoint(steps=12), aj.DPMSolverPP(2)),
}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/costs")
    shared: Path = Path("../shared/data")
    parts: tuple[str, ...] = ("memory", "compilation", "choice", "work", "times")
    network: str = "digits"
    """For memory, compilation and choice."""
    large: str = "unet64"
    """For work and times."""
    images: int = 1
    steps: int = 8
    """Of work and times."""
    rounds: int = 3


def gradient(problem: Problem, steps: int, adjoint: Any, solver: Any = None, grid: Any = None) -> Callable:
    """(x_T, args) -> dL/dx_T, L = 1/2 ||x_0||^2."""
    grid = problem.even(steps) if grid is None else grid
    solver = aj.DPMSolverPP(2) if solver is None else solver
    return jax.grad(lambda x, args: 0.5 * jnp.sum(aj.sample(problem.term, x, args, grid=grid, solver=solver, adjoint=adjoint) ** 2))


def through_diffeqsolve(problem: Problem, steps: int, adjoint: Any) -> Callable:
    """The same through diffrax's loop."""
    grid = jnp.asarray(problem.even(steps), problem.x_T.dtype)

    def loss(x: Any, args: Any) -> Any:
        control: Any = {"stepsize_controller": diffrax.StepTo(grid), "adjoint": adjoint, "max_steps": steps + 1}
        ys: Any = diffrax.diffeqsolve(problem.term, aj.DPMSolverPP(2), grid[0], grid[-1], None, x, args=args, **control).ys
        return 0.5 * jnp.sum(ys[-1] ** 2)

    return jax.grad(loss)


def network_alone(problem: Problem, steps: int, recompute: bool, ordered: bool) -> Callable:
    """The gradient of x -> network(x) iterated: 2N forward and N backward evaluations, or N and N; `ordered`: convolutions as in ours."""
    times = jnp.asarray(problem.even(steps)[:-1], problem.x_T.dtype)

    def loss(x: Any, args: Any) -> Any:
        step = lambda x, t: problem.term.network(x, t, args)  # noqa: E731
        step = jax.checkpoint(step, prevent_cse=False) if recompute else step
        return 0.5 * jnp.sum(jax.lax.scan(lambda x, t: (step(x, t), None), x, times)[0] ** 2)

    def gradient(x: Any, args: Any) -> Any:
        value, transpose = jax.vjp(lambda x: loss(x, args), x)
        return (in_order(transpose) if ordered else transpose)(jnp.ones_like(value))[0]

    return gradient


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def built(function: Callable, problem: Problem) -> tuple[Any, float]:
    """The compiled program, and the seconds that tracing and compiling it took."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(problem.x_T, problem.args).compile()
    return program, time.perf_counter() - begin


def fastest(programs: dict[str, Any], problem: Problem, rounds: int) -> dict[str, float]:
    """The least seconds of each, all of them run once in every round."""
    least = dict.fromkeys(programs, np.inf)
    for turn in range(rounds + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(problem.x_T, problem.args))
            if turn:  # the first warms up
                least[name] = min(least[name], time.perf_counter() - begin)
    return least


def memory(config: Config, problem: Problem) -> str:
    counts, rows = (16, 64, 256, 1024), []
    state = problem.x_T.nbytes
    for name, (adjoint, solver) in ADJOINTS.items():
        found = [bytes_of(built(gradient(problem, n, adjoint, solver), problem)[0]) for n in counts]
        rows.append([name, *(f"{b / 2**20:.2f}" for b in found), f"{(found[-1] - found[0]) / (counts[-1] - counts[0]) / state:.2f}"])
    return table(["MiB of temporaries", *(f"N = {n}" for n in counts), "states a step"], rows)


def compilation(config: Config, problem: Problem) -> str:
    ours = {n: built(gradient(problem, n, aj.DiscreteAdjoint()), problem)[1] for n in (10, 100, 1000)}
    theirs = {
        "diffeqsolve, RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint(),
        "diffeqsolve, DirectAdjoint": diffrax.DirectAdjoint(),
        "diffeqsolve, our DiscreteAdjoint": aj.DiscreteAdjoint(),
    }
    rows = [[f"aj.sample, N = {n}", f"{seconds:.1f}", f"{seconds / ours[10]:.2f}"] for n, seconds in ours.items()]
    for name, adjoint in theirs.items():
        seconds = built(through_diffeqsolve(problem, 10, adjoint), problem)[1]
        rows.append([f"{name}, N = 10", f"{seconds:.1f}", f"{seconds / ours[10]:.2f}"])
    return table(["gradient", "seconds to trace and compile", "ratio"], rows)


def choice(config: Config, problem: Problem) -> str:
    """Budgets for all linearisations, for about half of them, for the states, and for a little less."""
    grid, solver = problem.even(20), aj.BDIA()
    ask = lambda budget: aj.plan(problem.term, problem.x_T, problem.args, grid=grid, solver=solver, budget_bytes=budget, wrt=("x_T",))  # noqa: E731
    whole = {row.name: row for row in ask(2**40)}
    base, most = whole["keep=0"].bytes, whole['keep="all"'].bytes
    rows = []
    for budget in (most, (base + most) // 2, base, int(0.999 * base)):
        plan = ask(budget)
        fitting = {row.name: row for row in plan if row.exact and row.fits}
        programs = {name: built(gradient(problem, 20, row.adjoint, solver), problem)[0] for name, row in fitting.items()}
        seconds = fastest(programs, problem, config.rounds)
        for name, row in fitting.items():
            mark = ("chosen" if row.adjoint is plan.best else "") + (" fastest" if seconds[name] == min(seconds.values()) else "")
            size = bytes_of(programs[name])
            rows.append([f"{budget / 2**20:.1f}", name, f"{row.bytes / 2**20:.2f}", f"{size / 2**20:.2f}", f"{row.cost:.2f}"])
            rows[-1] += [f"{seconds[name] / min(seconds.values()):.2f}", mark]
    return table(["budget, MiB", "exact adjoint", "predicted MiB", "compiled MiB", "cost / C", "time / least", ""], rows)


def work(config: Config, problem: Problem) -> str:
    n, x, args = config.steps, problem.x_T, problem.args
    predict = lambda x: problem.term.network(x, jnp.asarray(problem.end, x.dtype), args)  # noqa: E731
    forward = flops(predict, x)
    backward = flops(lambda x: jax.vjp(predict, x)[1](x), x) - forward
    exact, kept = n * (2 * forward + backward), n * (forward + backward)
    given = {
        "DiscreteAdjoint": (aj.DiscreteAdjoint(), exact),
        'DiscreteAdjoint(keep="all")': (aj.DiscreteAdjoint(keep="all"), kept),
        "ReversibleAdjoint, BDIA": (aj.ReversibleAdjoint(), exact),
    }
    rows = []
    for name, (adjoint, least) in given.items():
        found = flops(gradient(problem, n, adjoint, aj.BDIA() if "BDIA" in name else None), x, args)
        rows.append([name, f"{found / 1e9:.1f}", f"{least / 1e9:.1f}", f"{found / least:.4f}"])
    return table(["adjoint", "GFLOP", "of the network's evaluations alone", "ratio"], rows)


def times(config: Config, problem: Problem) -> str:
    n, keep = config.steps, 'DiscreteAdjoint(keep="all")'
    programs = {"DiscreteAdjoint": gradient(problem, n, aj.DiscreteAdjoint()), keep: gradient(problem, n, aj.DiscreteAdjoint(keep="all"))}
    alone = {"DiscreteAdjoint": "network alone, recomputed", keep: "network alone, kept"}
    for ordered, as_written in ((True, ""), (False, ", convolutions as JAX writes them")):
        for name in alone.values():
            programs[name + as_written] = network_alone(problem, n, "recomputed" in name, ordered)
    least = fastest({name: built(function, problem)[0] for name, function in programs.items()}, problem, config.rounds)
    rows = [[name, f"{s:.2f}", f"{s / least[alone[name]]:.3f}" if name in alone else ""] for name, s in least.items()]
    return table(["program", "seconds", "ratio to the network alone"], rows)


PARTS = {"memory": memory, "compilation": compilation, "choice": choice, "work": work, "times": times}


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    parts = []
    for name in config.parts:
        problem = PROBLEMS[config.large if name in ("work", "times") else config.network](config.shared, config.images, 1)
        parts.append(f"## {name.capitalize()}: {problem.name}, {config.images} image(s)\n\n{PARTS[name](config, problem)}\n")
        print(parts[-1], flush=True)
        (config.out / "costs.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main(tyro.cli(Config))
