"""The table from a published case to a call of this package: one small function a peer.

Each returns a `Run`: the network, process, prediction and grid, the scale from the peer's coordinates to ours, and the solver.
Where this version has no such solver, the `solver` is `Missing(what)`.

A peer's grid of noise levels rho = sigma/alpha becomes times of ours by t(lam = -log rho); the lam that its model was told at those
times, where it is another (rounded timesteps), is written down in the network.
"""

import numpy as np

import adjoint_jax as aj

from .cases import Case
from .lu import dc_solver, dpm_solver, dpm_solver_v3, sa_solver, unipc, usf
from .runs import EXACT, LMS, RIEMANN, Missing as Missing, Run as Run, levels, network, table
from .schedulers import diffusers
from .tables import HEUN, TABLEAUX, Stitched, Tabulated


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
    solver = aj.DDIM() if meta["solver"] == "euler" else HEUN
    if (meta["schedule"], meta["scaling"]) != ("linear", "none"):
        solver = Missing("Euler and Heun in t of a schedule of one's own")
    return Run(network(case, process), process, "eps", grid, solver, scale=grid[0])


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
    name = case.meta["sampler"]
    net = network(case, process, times=grid[:-1], lams=process.lam(told))
    return Run(net, process, "eps", grid, aj.DDIM() if name == "DDIM" else Missing(name))


def belm(case: Case) -> Run:
    """The last state is clean; inversions tell the model t = 1 there."""
    process, name = table("scaled_linear"), case.meta["sampler"]
    told = case.array("timesteps")
    grid = np.append(told, -1.0)
    inverse = "inversion" in name
    net = network(case, process, times=grid, lams=process.lam(np.append(told, 1.0)))
    p, gamma = case.meta.get("p", 0.93), case.meta.get("gamma", 1.0)
    solvers = {"DDIM": aj.DDIM(), "BDIA": aj.BDIA(gamma), "O-BELM": aj.solvers.BELM(), "EDICT": aj.solvers.EDICT(p, leapfrog=False)}
    solver = next(solver for start, solver in solvers.items() if name.startswith(start))
    return Run(net, process, "eps", grid, solver, reverse=inverse)


def edict(case: Case) -> Run:
    """Step i goes from t_i to t_i - 1000 / N; alpha^2 is interpolated with its two weights exchanged, and kept from t = 0 below."""
    process, told = table("scaled_linear"), case.array("timesteps")
    below = np.maximum(told - 1000 / len(told), 0.0)
    low, high, share = np.floor(below).astype(int), np.ceil(below).astype(int), below % 1
    squared = process.alphas_cumprod[low] * np.where(share > 0, share, 1.0) + process.alphas_cumprod[high] * np.where(share > 0, 1 - share, 0.0)
    ends = levels(process, np.sqrt((1 - squared) / squared))
    return Run(network(case, process), process, "eps", np.append(told, -1.0), Stitched(case.meta["p"], ends))


def cycle_diffusion(case: Case) -> Run:
    """The image is clean, and its last step, to t = 0 of the table and from there deterministic, is not part of what is published."""
    process, grid = table("linear"), np.append(case.array("seq")[::-1].astype(float), -1.0)
    return Run(network(case, process), process, "eps", grid, aj.DDIM(case.meta["eta"]), noise=case.array("noise"), encodes=True)


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
