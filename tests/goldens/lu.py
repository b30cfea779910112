"""Peers on the schedules of Lu's code: dpm-solver, unipc, sa-solver, dc-solver, usf, dpm-solver-v3."""

from typing import Any

import numpy as np

import adjoint_jax as aj

from .cases import Case
from .runs import Missing, Run, network, table


def _lu_schedule(meta: Any) -> tuple[Any, float, float]:
    """(process, first time, last time)."""
    name = meta.get("schedule", "linear")
    if name == "linear":
        return aj.VPLinear(), 1.0, meta.get("t_end", 1e-3)
    return table({"discrete": "linear", "discrete_scaled": "scaled_linear"}[name]), 999.0, 0.0


def lu_grid(process: Any, start: float, end: float, skip: str, steps: int) -> np.ndarray:
    rules = {"logSNR": aj.grids.log_snr, "time_uniform": aj.grids.uniform, "time_quadratic": aj.grids.quadratic}
    return rules[skip](process, steps, t_start=start, t_end=end)


def _lu_solver(meta: Any, steps: int) -> Any:
    order, data = meta["order"], meta["algorithm_type"] == "dpmsolver++"
    kind = "DPMSolverPP" if data else "DPMSolver"
    method = meta["method"]
    if method == "adaptive":
        return Missing(f"{kind}, adaptive, order {order}")
    if method != "multistep":
        return aj.DDIM() if order == 1 else Missing(f"{kind}, singlestep, order {order}, {meta.get('solver_type', 'dpmsolver')}")
    if order == 1:
        return aj.DDIM()
    lower = meta.get("lower_order_final", True) and steps < 10
    if order == 3 or lower:
        return Missing(f"{kind}, order {order}, published, lower orders at the end")
    if meta.get("solver_type") == "taylor":
        return aj.Exponential(2, 0.0 if data else np.inf)
    return aj.DPMSolverPP(2) if data else Missing("DPMSolver, order 2, midpoint")


def dpm_solver(case: Case) -> Run:
    meta = case.meta
    process, start, end = _lu_schedule(meta)
    steps = meta.get("steps", 1)
    skip = meta.get("skip_type", "time_uniform")
    if meta["method"] in ("singlestep", "singlestep_fixed"):
        blocks = lu_blocks(steps, meta["order"], meta["method"] == "singlestep_fixed")
        if skip == "logSNR":
            grid = lu_grid(process, start, end, skip, len(blocks))
        else:
            grid = lu_grid(process, start, end, skip, steps)[np.cumsum([0, *blocks])]
    else:
        grid = lu_grid(process, start, end, skip, steps)
    guidance = (meta["cfg_scale"], (0, 1)) if "cfg_scale" in meta else None
    threshold = (meta["thr"], np.inf) if "thr" in meta else None
    prediction = "x0" if threshold else "eps"
    net = network(case, process, prediction, guidance=guidance, threshold=threshold)
    return Run(net, process, prediction, grid, _lu_solver(meta, steps), reverse=meta.get("inverse", False))


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
    kind = "x0" if meta["algorithm_type"] == "data_prediction" else "eps"
    return Run(network(case, process), process, "eps", grid, Missing(f"UniPC, order {meta['order']}, {meta['variant']}, {kind}"))


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
    process = aj.VPLinear()
    grid = aj.grids.log_snr(process, case.meta["steps"], t_start=1.0, t_end=1e-3)
    return Run(network(case, process), process, "eps", grid, Missing("SASolver"), noise=case.array("noise"))


def dpm_solver_v3(case: Case) -> Run:
    meta, process, grid = case.meta, aj.VPLinear(), case.array("timesteps")
    l, s, b = (np.asarray(case.array(f"ems_{name}")) for name in "lsb")  # noqa: E741
    if meta["degenerated"]:
        l, s, b = np.ones_like(l), 0 * s, 0 * b  # noqa: E741
    statistics = aj.solvers.ModelStatistics(np.linspace(process.lam(1.0), process.lam(grid[-1]), len(l)), l, s, b)
    corrector = ("pseudo" if meta["c_pseudo"] else "exact") if meta["use_corrector"] else None
    solver = aj.solvers.DPMSolverV3(statistics, meta["order"], corrector, meta["p_pseudo"], published=True)
    return Run(network(case, process), process, "eps", grid, solver)
