"""Peers on the schedules of Lu's code: dpm-solver, unipc, sa-solver, dc-solver, usf, dpm-solver-v3."""

from typing import Any

import numpy as np

import adjoint_jax as aj

from .cases import Case
from .runs import Run, network, table


def _lu_schedule(meta: Any) -> tuple[Any, float, float]:
    """(process, first time, last time)."""
    name = meta.get("schedule", "linear")
    if name == "linear":
        return aj.VPLinear(), 1.0, meta.get("t_end", 1e-3)
    return table({"discrete": "linear", "discrete_scaled": "scaled_linear"}[name]), 999.0, 0.0


def lu_grid(process: Any, start: float, end: float, skip: str, steps: int) -> np.ndarray:
    rules = {"logSNR": aj.grids.log_snr, "time_uniform": aj.grids.uniform, "time_quadratic": aj.grids.quadratic}
    return rules[skip](process, steps, t_start=start, t_end=end)


def _lu_multistep(meta: Any) -> Any:
    kind = aj.DPMSolverPP if meta["algorithm_type"] == "dpmsolver++" else aj.DPMSolver
    rule = "heun" if meta.get("solver_type") == "taylor" else "midpoint"
    lower = 10 if meta.get("lower_order_final", True) else False
    return kind(meta["order"], rule, lower_order_final=lower, published=True)


def _lu_singlestep(meta: Any, blocks: list[int], process: Any, grid: np.ndarray, skip: str) -> Any:
    """The stages lie on the grid of each block."""
    sigma_data = 0.0 if meta["algorithm_type"] == "dpmsolver++" else np.inf
    rule = "heun" if meta.get("solver_type") == "taylor" else "midpoint"
    order = meta["order"]
    inner = [lu_grid(process, start, end, skip, block)[1:-1] for start, end, block in zip(grid[:-1], grid[1:], blocks, strict=True)]
    nodes = stages(process.lam(grid), [process.lam(times) for times in inner], order)
    return aj.solvers.ExponentialStages(order, sigma_data, solver_type=rule, nodes=nodes, lower_order_final=tuple(blocks))


def stages(ends: np.ndarray, inner: list[np.ndarray], order: int) -> tuple[tuple[float, ...], ...]:
    """The nodes r_j of each block, from the half log-SNR at its ends and within; blocks of lower order are filled up with nodes that are not used."""
    given = [(lam - first) / (last - first) for first, last, lam in zip(ends[:-1], ends[1:], inner, strict=True)]
    filled = [[*r, *np.linspace(r[-1] if len(r) else 0.0, 1.0, order - len(r) + 1)[1:-1]] for r in given]
    return tuple(tuple(float(node) for node in r) for r in filled)


def dpm_solver(case: Case) -> Run:
    meta = case.meta
    process, start, end = _lu_schedule(meta)
    steps = meta.get("steps", 1)
    skip = meta.get("skip_type", "time_uniform")
    if meta["method"] == "adaptive":
        return _lu_adaptive(case, process, np.array([start, end]))
    if meta["method"] in ("singlestep", "singlestep_fixed"):
        blocks = lu_blocks(steps, meta["order"], meta["method"] == "singlestep_fixed")
        if skip == "logSNR":
            grid = lu_grid(process, start, end, skip, len(blocks))
        else:
            grid = lu_grid(process, start, end, skip, steps)[np.cumsum([0, *blocks])]
        solver = _lu_singlestep(meta, blocks, process, grid, skip)
    else:
        grid = lu_grid(process, start, end, skip, steps)
        solver = _lu_multistep(meta)
    guidance = (meta["cfg_scale"], (0, 1)) if "cfg_scale" in meta else None
    threshold = (meta["thr"], np.inf) if "thr" in meta else None
    prediction = "x0" if threshold else "eps"
    net = network(case, process, prediction, guidance=guidance, threshold=threshold)
    return Run(net, process, prediction, grid, solver, reverse=meta.get("inverse", False))


def _lu_adaptive(case: Case, process: Any, ends: np.ndarray) -> Run:
    meta = case.meta
    solver = aj.solvers.ExponentialStages(meta["order"], 0.0 if meta["algorithm_type"] == "dpmsolver++" else np.inf)
    told = {"controller": "dpm-solver", "rtol": meta["rtol"], "atol": meta["atol"]}
    return Run(network(case, process), process, "eps", ends, solver, adaptive=told, through=meta["variant"] != "detach_h")


def lu_blocks(evaluations: int, order: int, fixed: bool) -> list[int]:
    """The orders of the singlestep blocks that spend a number of network evaluations."""
    if fixed or order == 1:
        return [order] * (evaluations // order)
    if order == 2:
        return [2] * (evaluations // 2) + [1] * (evaluations % 2)
    whole = evaluations // 3 + 1
    return {0: [3] * (whole - 2) + [2, 1], 1: [3] * (whole - 1) + [1], 2: [3] * (whole - 1) + [2]}[evaluations % 3]


def unipc(case: Case) -> Run:
    meta = case.meta
    process, start, end = _lu_schedule(meta)
    grid = lu_grid(process, start, end, meta["skip_type"], meta["steps"])
    sigma_data = 0.0 if meta["algorithm_type"] == "data_prediction" else np.inf
    return Run(network(case, process), process, "eps", grid, aj.UniPC(meta["order"], meta["variant"], sigma_data))


def dc_solver(case: Case) -> Run:
    meta = case.meta
    process, start, end = _lu_schedule(meta)
    grid = lu_grid(process, start, end, meta["skip_type"], meta["steps"])
    solver = aj.solvers.DCSolver(meta["dc_ratios"], meta["order"], meta["dc_order"], meta["variant"])
    return Run(network(case, process), process, "eps", grid, solver)


def usf(case: Case) -> Run:
    meta = case.meta
    process, start, end = _lu_schedule(meta)
    decisions = meta["decisions"]
    grid = lu_grid(process, start, end, meta["skip_type"], len(decisions["orders"]))
    splittings = [kind.removesuffix("_prediction") for kind in decisions["prediction_types"]]
    relaxed = [kinds[0]["relaxation"] if kinds else None for kinds in decisions["derivative_types"]]
    rules = [{None: "exact", "unipc-bh1": "bh1", "unipc-bh2": "midpoint", "dpmsolver-2": "midpoint"}[rule] for rule in relaxed]
    return Run(network(case, process), process, "eps", grid, aj.Schedule(decisions["orders"], splittings, rules=rules))


def sa_solver(case: Case) -> Run:
    """The first of its draws is never used. For few steps the last is deterministic; for more, the corrected end is evaluated once more."""
    meta, process = case.meta, aj.VPLinear()
    steps, tau = meta["steps"], meta["tau"]
    grid = aj.grids.log_snr(process, steps, t_start=1.0, t_end=1e-3)
    noise = case.array("noise")[1 : steps + 1]
    if meta["few"]:
        solver = aj.solvers.SASolver(meta["po"], meta["co"], (tau,) * (steps - 1) + (0.0,), variant="few_steps")
    else:
        grid, noise = np.append(grid, 0.0), np.concatenate([noise, np.zeros_like(noise[:1])])
        solver = aj.solvers.SASolver(meta["po"], meta["co"], tau, denoise=True)
    return Run(network(case, process), process, "eps", grid, solver, noise if solver.draws else None)


def dpm_solver_v3(case: Case) -> Run:
    meta, process, grid = case.meta, aj.VPLinear(), case.array("timesteps")
    l, s, b = (np.asarray(case.array(f"ems_{name}")) for name in "lsb")  # noqa: E741
    if meta["degenerated"]:
        l, s, b = np.ones_like(l), 0 * s, 0 * b  # noqa: E741
    statistics = aj.solvers.ModelStatistics(np.linspace(process.lam(1.0), process.lam(grid[-1]), len(l)), l, s, b)
    corrector = ("pseudo" if meta["c_pseudo"] else "exact") if meta["use_corrector"] else None
    solver = aj.solvers.DPMSolverV3(statistics, meta["order"], corrector, meta["p_pseudo"], published=True)
    return Run(network(case, process), process, "eps", grid, solver)
