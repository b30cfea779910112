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
from .lu import dc_solver, dpm_solver, dpm_solver_v3, lu_blocks, sa_solver, unipc, usf
from .runs import Missing as Missing, Run as Run, levels, network, table
from .schedulers import diffusers
from .tables import HEUN, TABLEAUX, Root, Stitched, Tabulated


def edm(case: Case) -> Run:
    meta, process = case.meta, aj.EDM()
    if meta["sampler"] == "edm_sampler":
        grid = aj.grids.edm(process, meta["num_steps"], t_start=80.0, t_end=0.002)
        run = Run(network(case, process), process, "eps", grid, HEUN, scale=80.0)
        if "S_churn" not in meta:
            return run
        churned = aj.solvers.Churn(HEUN, meta["S_churn"] / meta["num_steps"], meta["S_min"], meta["S_max"], meta["S_noise"])
        return run._replace(solver=churned, noise=case.array("noise"))
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
    """Where no noise is added the steps draw none: those into sigma = 0, and all where eta = 0."""
    meta, process = case.meta, aj.EDM()
    name, eta = meta["sampler"].removeprefix("sample_"), meta.get("eta", 0.0)
    if name in ("dpm_fast", "dpm_adaptive"):
        return _continuous(case)
    grid = case.array("sigmas")
    two = aj.solvers.ExponentialStages
    solver = {
        "euler": aj.DDIM(),
        "heun": HEUN,
        "lms": aj.DEIS(4, "rho"),
        "dpm_2": two(2, np.inf),
        "dpmpp_2m": aj.DPMSolverPP(2),
        "dpmpp_2m_sde": aj.SDEDPMSolverPP(2, np.sqrt(eta), meta.get("solver_type", "midpoint")),
        "dpmpp_3m_sde": aj.SDEDPMSolverPP(3, np.sqrt(eta), "heun", published=True),
        "dpmpp_sde": aj.solvers.DPMSolverPPSDE(eta),
        "euler_ancestral": aj.DDIM(eta),
        "dpm_2_ancestral": aj.solvers.Ancestral(two(2, np.inf), eta),
        "dpmpp_2s_ancestral": aj.solvers.Ancestral(two(2, 0.0), eta),
    }[name]
    if "churn" in meta:
        churn = meta["churn"]
        solver = aj.solvers.Churn(solver, churn["s_churn"] / meta["n"], churn["s_tmin"], churn["s_tmax"], churn["s_noise"])
    run = Run(network(case, process), process, "eps", grid, solver)
    draws = aj.ExponentialRK(solver).draws if solver is HEUN else solver.draws
    if not draws:
        return run
    steps, given = len(grid) - 1, case.array("noise")
    noise = np.zeros((steps * draws, *given.shape[1:]))
    noise[: len(given)] = given
    return run._replace(noise=noise.reshape(steps, draws, *given.shape[1:]) if draws > 1 else noise)


def _continuous(case: Case) -> Run:
    """Steps even in log sigma, of order 3 and less at the end (DPM-Solver-fast), or adaptive ones."""
    meta, process = case.meta, aj.EDM()
    blocks = lu_blocks(meta.get("n", 1), 3, fixed=False)
    grid = np.exp(np.linspace(np.log(meta["sigma_max"]), np.log(meta["sigma_min"]), len(blocks) + 1))
    if "order" in meta:
        told = {"controller": "k-diffusion", "rtol": meta["rtol"], "atol": meta["atol"]}
        return Run(network(case, process), process, "eps", grid[[0, -1]], aj.solvers.ExponentialStages(meta["order"]), adaptive=told)
    return Run(network(case, process), process, "eps", grid, aj.solvers.ExponentialStages(3, np.inf, lower_order_final=tuple(blocks)))


def diff_sampler(case: Case) -> Run:
    meta, process, ts = case.meta, aj.EDM(), case.array("t_steps")
    name = meta["sampler"].removesuffix("_sampler")
    order = meta.get("max_order", 1)
    net = network(case, process, first_is_free=float(ts[0]) if meta.get("afs") else None)
    run = Run(net, process, "eps", ts, Missing(name), scale=float(ts[0]))
    if name == "deis" and meta["deis_mode"] == "tab":
        values = np.array(case.array("coeff_list"))
        values[0, 0] = ts[1] - ts[0]
        return run._replace(solver=Tabulated(np.ones(len(values)), values))
    if name in ("dpm_pp", "unipc") and meta.get("predict_x0", True):
        run = run._replace(network=network(case, process, "x0", threshold=(0.995, np.inf)), prediction="x0")
    if name == "dpm_pp":
        kind = aj.DPMSolverPP if meta.get("predict_x0", True) else aj.DPMSolver
        return run._replace(solver=kind(order, lower_order_final=True, published=True))
    if name == "unipc":
        return run._replace(solver=aj.UniPC(order, meta.get("variant", "bh2")))
    if name == "dpm_2":
        return run._replace(solver=aj.solvers.ExponentialStages(2, np.inf, nodes=(meta["r"],)))
    if name in ("euler", "heun"):
        return run._replace(solver=aj.DDIM() if name == "euler" else HEUN)
    if name == "ipndm":
        return run._replace(solver=aj.solvers.IPNDM(order))
    return run._replace(solver=aj.DEIS(order, "rho", published="ipndm_v" if name == "ipndm_v" else False))


# ---- deis, pndm, and the reversible ones ----------------------------------------------------------------------------------------


def deis(case: Case) -> Run:
    meta, ts = case.meta, case.array("rev_ts")
    process = aj.VPLinear()
    net = network(case, process)
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
        solver = aj.solvers.IPNDM()
    elif meta["method"] == "t_ab" and meta.get("sde_kind") == "disc":
        rows = case.array("ab_coef")  # its integrals are of alpha^2 linear between the steps
        solver = Tabulated(rows[:, 0], rows[:, 1:])
    elif meta["method"] == "t_ab":
        solver = aj.DEIS(meta["ab_order"] + 1, "t", published=True)
    else:
        solver = aj.DEIS(meta["ab_order"] + 1, "rho", published=True)
    return Run(net, process, "eps", ts, solver)


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
