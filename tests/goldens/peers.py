"""The table from a published case to a call of this package: one small function a peer.

Each returns a `Run`: the network, process, prediction and grid, the scale from the peer's coordinates to ours, and the solver.
Where this version has no such solver, the `solver` is `Missing(what)`.

A peer's grid of noise levels rho = sigma/alpha becomes times of ours by t(lam = -log rho); the lam that its model was told at those
times, where it is another (rounded timesteps), is written down in the network.
"""

from typing import Any

import diffrax
import numpy as np

import adjoint_jax as aj

from .cases import Case
from .lu import dc_solver, dpm_solver, dpm_solver_v3, sa_solver, unipc, usf
from .runs import EXACT, LMS, RIEMANN, Missing as Missing, Run as Run, levels, network, table
from .schedulers import diffusers
from .tables import HEUN, TABLEAUX, Root, Tabulated


def edm(case: Case) -> Run:
    meta, process = case.meta, aj.EDM()
    if meta["sampler"] == "edm_sampler":
        grid = aj.grids.edm(process, meta["num_steps"], t_start=80.0, t_end=0.002)
        churn = "S_churn" in meta
        noise = case.array("noise") if churn else None
        return Run(network(case, process), process, "eps", grid, Missing("EDM Heun, churned") if churn else HEUN, noise, scale=80.0)
    rho = np.unique(np.exp(-case.array("lam_eval")).round(14))[::-1]
    keep = np.append(np.diff(rho) < -1e-9 * rho[1:], True)
    grid = np.append(rho[keep], 0.0)
    solver = diffrax.Euler() if meta["solver"] == "euler" else HEUN
    if (meta["schedule"], meta["scaling"]) == ("vp", "vp"):
        first, last = np.log1p(grid[0] ** 2), np.log1p(grid[-2] ** 2)
        slope = 2 * (last / 1e-3 - first) / (1e-3 - 1)
        process = aj.VPLinear(first - slope / 2, first + slope / 2)
    elif meta["schedule"] == "ve":
        process = Root()
    if meta["schedule"] == "linear":
        return Run(network(case, process), process, "eps", grid, solver, scale=grid[0])
    return _in_its_own_t(case, process, grid, solver)


def _in_its_own_t(case: Case, process: Any, rho: Any, solver: Any) -> Run:
    """Plain steps in (x, t) of a schedule, whose times are those of the noise levels."""
    grid = levels(process, rho)
    scale = float(process.sigma(grid[0]))
    return Run(network(case, process), process, "eps", grid, aj.solvers.PlainRK(solver), scale=scale)


def k_diffusion(case: Case) -> Run:
    meta, process = case.meta, aj.EDM()
    name, eta = meta["sampler"].removeprefix("sample_"), meta.get("eta", 0.0)
    solvers = {"euler": aj.DDIM(), "heun": HEUN, "lms": Missing(LMS), "dpmpp_2m": aj.DPMSolverPP(2)}
    solver = solvers.get(name, Missing(name))
    if "churn" in meta:
        solver = Missing(f"{name}, churned")
    if eta == 0 and name == "euler_ancestral":
        solver = aj.DDIM()
    if eta == 0 and name == "dpmpp_2m_sde":
        solver = aj.DPMSolverPP(2) if meta["solver_type"] == "midpoint" else aj.Exponential(2, 0.0)
    grid = case.array("sigmas") if case.has("sigmas") else np.array([meta["sigma_max"], meta["sigma_min"]])
    stochastic = eta > 0 or "churn" in meta
    return Run(network(case, process), process, "eps", grid, solver, case.array("noise") if stochastic else None)


def diff_sampler(case: Case) -> Run:
    meta, process, ts = case.meta, aj.EDM(), case.array("t_steps")
    name = meta["sampler"].removesuffix("_sampler")
    order = meta.get("max_order")
    net = network(case, process, first_is_free=float(ts[0]) if meta.get("afs") else None)
    run = Run(net, process, "eps", ts, Missing(name), scale=float(ts[0]))
    if name == "deis" and meta["deis_mode"] == "tab":
        values = np.array(case.array("coeff_list"))
        values[0, 0] = ts[1] - ts[0]
        return run._replace(solver=Tabulated(np.ones(len(values)), values))
    solvers = {"euler": aj.DDIM(), "heun": HEUN}
    if name == "deis" or (name == "ipndm_v" and order == 2):
        solvers[name] = aj.DEIS(order, "rho")
    return run._replace(solver=solvers.get(name, Missing(f"{name}, order {order}")))


# ---- deis, pndm, and the reversible ones ----------------------------------------------------------------------------------------


def deis(case: Case) -> Run:
    meta, ts = case.meta, case.array("rev_ts")
    process = aj.VPLinear()
    net, tolerance = network(case, process), EXACT
    if meta.get("sde_kind") == "disc":
        # alpha^2, not log alpha, is linear between the steps of this peer's state; its model's table is ours
        process = table("linear")
        told = process.lam(ts)
        log_alpha = 0.5 * np.log(np.interp(ts, np.arange(1000), np.asarray(process.alphas_cumprod)))
        times = process.t_of_lam(log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha)))
        net, ts = network(case, process, times=times, lams=told), times
    if meta["method"] == "rho_rk":
        solver = TABLEAUX[meta["rk_method"]]
    elif meta["method"] == "ipndm":
        solver = Missing("IPNDM")
    elif meta["method"] == "t_ab":
        rows = case.array("ab_coef")
        solver = Tabulated(rows[:, 0], rows[:, 1:])
    else:
        solver, tolerance = aj.DEIS(meta["ab_order"] + 1, "rho"), RIEMANN
    return Run(net, process, "eps", ts, solver, tolerance=tolerance)


def pndm(case: Case) -> Run:
    """State i is at step t_i + 1 of the table, its model is told t_i; the last step goes to t = 0."""
    process, steps = table("linear"), case.meta["steps"]
    told = np.arange(0, 1000, 1000 // steps)[::-1].astype(float)
    grid = np.append(told + 1, 0.0)
    middles = np.append(told, told[:3] - 500 // steps)
    solvers = {
        "DDIM": aj.DDIM(),
        "F-PNDM": aj.solvers.PNDM(),
        "S-PNDM": aj.solvers.PNDM(2, "heun"),
        "FON": aj.solvers.FON(difference=1.0),
    }
    net = network(case, process, times=middles + 1, lams=process.lam(middles))
    return Run(net, process, "eps", grid, solvers[case.meta["sampler"]])


def belm(case: Case) -> Run:
    """The last state is clean; inversions tell the model t = 1 there."""
    process, name = table("scaled_linear"), case.meta["sampler"]
    told = case.array("timesteps")
    grid = np.append(told, -1.0)
    inverse = "inversion" in name
    net = network(case, process, times=grid, lams=process.lam(np.append(told, 1.0)))
    return Run(net, process, "eps", grid, aj.DDIM() if name.startswith("DDIM") else Missing(name), reverse=inverse)


def edict(case: Case) -> Run:
    """Step i goes from t_i to t_i - 1000 / N; alpha^2 is interpolated with its two weights exchanged, and kept from t = 0 below."""
    process, told = table("scaled_linear"), case.array("timesteps")
    below = np.maximum(told - 1000 / len(told), 0.0)
    low, high, share = np.floor(below).astype(int), np.ceil(below).astype(int), below % 1
    squared = process.alphas_cumprod[low] * np.where(share > 0, share, 1.0) + process.alphas_cumprod[high] * np.where(share > 0, 1 - share, 0.0)
    ends = levels(process, np.sqrt((1 - squared) / squared))
    return Run(network(case, process), process, "eps", np.stack([told, ends], 1), Missing("EDICT, leapfrog"), pieces=True)


def cycle_diffusion(case: Case) -> Run:
    process = table("linear")
    return Run(network(case, process), process, "eps", case.array("seq")[::-1].astype(float), Missing("DPM-encoder"), noise=case.array("noise"))


PEERS = {
    "belm": belm,
    "cycle-diffusion": cycle_diffusion,
    "dc-solver": dc_solver,
    "deis": deis,
    "diff-sampler": diff_sampler,
    "diffusers": diffusers,
    "dpm-solver": dpm_solver,
    "dpm-solver-v3": dpm_solver_v3,
    "edict": edict,
    "edm": edm,
    "k-diffusion": k_diffusion,
    "pndm": pndm,
    "sa-solver": sa_solver,
    "unipc": unipc,
    "usf": usf,
}


def run_of(case: Case) -> Run:
    return PEERS[case.peer](case)
