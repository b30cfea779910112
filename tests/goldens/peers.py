"""The table from a published case to a call of this package: one small function a peer.

Each returns a `Run`: the network, process, prediction and grid, the scale from the peer's coordinates to ours, and the solver.
Where this version has no such solver, the `solver` is `Missing(what)`.

A peer's grid of noise levels rho = sigma/alpha becomes times of ours by t(lam = -log rho); the lam that its model was told at those
times, where it is another (rounded timesteps), is written down in the network.
"""

from typing import Any, NamedTuple

import diffrax
import numpy as np

import adjoint_jax as aj

from .cases import Case
from .networks import Golden

EXACT = (1e-10, 1e-8)
"""Relative tolerances of x_0 and of the gradients."""
RIEMANN = (5e-4, 5e-4)
"""Those where the peer's weights are left Riemann sums of 10 000 nodes and ours are exact."""


class Missing(NamedTuple):
    """A solver, or a rule of one, that this version does not have."""

    what: str


class Run(NamedTuple):
    """`aj.sample` of a case: x_T = scale * the peer's; `pieces` are samples taken one after the other, each on its own grid."""

    network: Golden
    process: Any
    prediction: str
    grid: Any
    solver: Any
    noise: Any = None
    scale: float = 1.0
    reverse: bool = False
    pieces: bool = False
    tolerance: tuple[float, float] = EXACT


LMS = "DEIS(4, rho) of full order into sigma = 0"


class Tabulated(aj.DEIS):
    """DEIS with weights of the peer's own, `ratios` `[N]` and `values` `[N, order]`: it takes them from Riemann sums of 10 000 nodes."""

    ratios: Any
    values: Any

    def __init__(self, ratios: Any, values: Any):
        super().__init__(values.shape[1], "rho")
        self.ratios, self.values = ratios, values

    def table(self, process: Any, prediction: str, ts: Any) -> Any:
        return super().table(process, prediction, ts)._replace(ratio=self.ratios, weights=self.values)


def betas(name: str, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """The 1000 betas of a training schedule."""
    if name == "linear":
        return np.linspace(first, last, 1000)
    if name == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    angle = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - angle[1:] / angle[:-1], 0.999)


def table(name: str) -> aj.VPDiscrete:
    return aj.VPDiscrete(np.cumprod(1 - betas(name)))


def levels(process: Any, rho: Any) -> np.ndarray:
    """The times at which sigma/alpha is rho; the clean end where rho = 0."""
    rho = np.asarray(rho, np.float64)
    times = process.t_of_lam(-np.log(np.where(rho > 0, rho, 1.0)))
    return np.where(rho > 0, times, process.range[0])


def network(case: Case, process: Any, prediction: str = "eps", times: Any = None, lams: Any = None, **more: Any) -> Golden:
    if times is not None:
        times, lams = np.asarray(times, np.float64), np.asarray(lams, np.float64)
    return Golden(case.model, prediction, process, times, lams, **more)


# ---- dpm-solver, unipc, sa-solver, dc-solver, usf: schedules of Lu's code --------------------------------------------------------


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
    return Run(network(case, process), process, "eps", grid, Missing("DCSolver"))


def usf(case: Case) -> Run:
    meta = case.meta
    process, start, end = _lu_schedule(meta)
    grid = lu_grid(process, start, end, meta["skip_type"], len(meta["decisions"]["orders"]))
    return Run(network(case, process), process, "eps", grid, Missing("USF: an order, a kind and a relaxation for each step"))


def sa_solver(case: Case) -> Run:
    process = aj.VPLinear()
    grid = aj.grids.log_snr(process, case.meta["steps"], t_start=1.0, t_end=1e-3)
    return Run(network(case, process), process, "eps", grid, Missing("SASolver"), noise=case.array("noise"))


def dpm_solver_v3(case: Case) -> Run:
    process = aj.VPLinear()
    return Run(network(case, process), process, "eps", case.array("timesteps"), Missing("DPMSolverV3"))


# ---- diffusers ------------------------------------------------------------------------------------------------------------------


def diffusers(case: Case) -> Run:
    return DIFFUSERS[case.meta["scheduler"]](case)


def _table_of(case: Case) -> aj.VPDiscrete:
    name = case.meta["cfg"].get("beta_schedule", "linear")
    return table("cosine" if name == "squaredcos_cap_v2" else name)


def _ddim(case: Case) -> Run:
    """Step i goes from t_i to t_i - 1000 // N; the next starts from its own t."""
    meta, process, ts = case.meta, _table_of(case), case.array("timesteps")
    stride, config = 1000 // len(ts), meta["cfg"]
    ends = ts - stride
    last = -1.0 if config.get("set_alpha_to_one", True) else 0.0
    pieces = [np.array([start, end if end >= 0 else last]) for start, end in zip(ts, ends, strict=True)]
    chained = np.allclose(ends[:-1], ts[1:])
    grid = np.append(ts, pieces[-1][-1]) if chained else pieces
    prediction = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[meta.get("pred", "epsilon")]
    solver = aj.DDIM()
    if meta["eta"]:
        solver = Missing("DDIM, eta > 0")
    if config.get("clip_sample", True):
        solver = Missing("x0 clipped, its eps not")
    noise = case.array("noise") if case.has("noise") else None
    return Run(network(case, process, prediction), process, prediction, grid, solver, noise, pieces=not chained)


def _discrete(case: Case, solver: Any, **more: Any) -> Run:
    """A scheduler of sigmas on the training table, whose model is told its timesteps (`mode` t) or its noise level."""
    meta, process = case.meta, _table_of(case)
    config, sigmas = meta["cfg"], case.array("sigmas")
    prediction = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[meta.get("pred", "epsilon")]
    if meta["space"] == "flow":
        process, prediction = aj.FlowMatching(), "flow"
        grid = sigmas
        told = case.array("timesteps") / 1000
        lams = process.lam(told)
    else:
        grid = levels(process, sigmas)
        lams = process.lam(case.array("timesteps")) if meta.get("mode", "t") == "t" else process.lam(grid[:-1])
    if np.isclose(sigmas[-1], sigmas[-2], rtol=1e-12, atol=0):  # the last step is the identity
        grid = grid[:-1]
    if config.get("thresholding"):
        more["threshold"] = (config["dynamic_thresholding_ratio"], config["sample_max_value"])
        prediction = "x0"
    noise = case.array("noise") if case.has("noise") else None
    net = network(case, process, prediction, times=grid[: len(lams)], lams=lams[: len(grid)], **more)
    return Run(net, process, prediction, grid, solver, noise)


def _dpmm(case: Case) -> Run:
    meta, n = case.meta, case.meta["steps"]
    config = meta["cfg"]
    order, kind = config.get("solver_order", 2), config.get("algorithm_type", "dpmsolver++")
    rule = config.get("solver_type", "midpoint")
    zero = config.get("final_sigmas_type", "zero") == "zero"
    lower = config.get("lower_order_final", True) and n < 15
    first = order > 1 and not zero and (lower or config.get("euler_at_final", False))
    if kind.startswith("sde"):
        solver = Missing(f"{kind}, order {order}, {rule}")
    elif order == 1:
        solver = aj.DDIM()
    elif order == 3 or first:
        solver = Missing(f"{kind}, order {order}, published, lower orders at the end")
    elif rule == "heun":
        solver = aj.Exponential(2, 0.0 if kind == "dpmsolver++" else np.inf)
    else:
        solver = aj.DPMSolverPP(2) if kind == "dpmsolver++" else Missing("DPMSolver, order 2, midpoint")
    return _discrete(case, solver)


def _dpms(case: Case) -> Run:
    config = case.meta["cfg"]
    solver = aj.DDIM() if config["solver_order"] == 1 else Missing(f"{config.get('algorithm_type', 'dpmsolver++')}, singlestep by evaluations")
    return _discrete(case, solver)


def _deis(case: Case) -> Run:
    config, n = case.meta["cfg"], case.meta["steps"]
    order = config["solver_order"]
    run = _discrete(case, aj.DEIS(order, "lam"))
    identity_last = len(run.grid) == n
    lower = config.get("lower_order_final", True) and n < 15
    if lower and order > (2 if identity_last else 1):
        return run._replace(solver=Missing(f"DEIS, order {order}, lower orders at the end"))
    return run


def _unipc(case: Case) -> Run:
    config = case.meta["cfg"]
    return _discrete(case, Missing(f"UniPC, order {config['solver_order']}, {config.get('solver_type', 'bh2')}"))


def _sa(case: Case) -> Run:
    return _discrete(case, Missing("SASolver"))


def _exploding(case: Case, solver: Any) -> Run:
    """Schedulers in the coordinates x / alpha; the state's sigma and the model's timestep are interpolated by different rules."""
    process, sigmas = aj.EDM(), case.array("sigmas")
    lams = _table_of(case).lam(case.array("timesteps"))
    times = sigmas[: len(lams)]
    _, index = np.unique(times[::-1], return_index=True)
    index = len(times) - 1 - index[::-1]
    grid = np.append(times[index], 0.0)
    return Run(network(case, process, times=grid[:-1], lams=lams[index]), process, "eps", grid, solver)


def _edm_dpm(case: Case) -> Run:
    order, process = case.meta["cfg"]["solver_order"], aj.EDM()
    if case.meta.get("sde"):
        solver = Missing(f"sde-dpmsolver++, order {order}, midpoint")
    elif order == 3:
        solver = Missing("DPMSolverPP, order 3, published, lower orders at the end")
    else:
        solver = aj.DPMSolverPP(order)
    noise = case.array("noise") if case.has("noise") else None
    return Run(network(case, process), process, "eps", case.array("sigmas"), solver, noise)


def _flow(case: Case, solver: Any) -> Run:
    process, sigmas = aj.FlowMatching(), case.array("sigmas")
    return Run(network(case, process, "flow"), process, "flow", np.unique(sigmas)[::-1], solver)


def _pndm(case: Case) -> Run:
    process = _table_of(case)
    grid = np.unique(case.array("timesteps"))[::-1]
    return Run(network(case, process), process, "eps", grid, Missing("PNDM, Runge-Kutta or PLMS start"))


def _ipndm(case: Case) -> Run:
    process = aj.EDM()
    return Run(network(case, process), process, "eps", case.array("timesteps"), Missing("IPNDM of diffusers"))


DIFFUSERS = {
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpmm,
    "DPMSolverSinglestepScheduler": _dpms,
    "DEISMultistepScheduler": _deis,
    "UniPCMultistepScheduler": _unipc,
    "SASolverScheduler": _sa,
    "EulerDiscreteScheduler": lambda case: _exploding(case, aj.DDIM()),
    "HeunDiscreteScheduler": lambda case: _exploding(case, HEUN),
    "KDPM2DiscreteScheduler": lambda case: _exploding(case, Missing("DPM2, midpoint in log sigma")),
    "LMSDiscreteScheduler": lambda case: _exploding(case, Missing(LMS)),
    "EDMEulerScheduler": lambda case: Run(network(case, aj.EDM()), aj.EDM(), "eps", case.array("sigmas"), aj.DDIM()),
    "EDMDPMSolverMultistepScheduler": _edm_dpm,
    "FlowMatchEulerDiscreteScheduler": lambda case: _flow(case, aj.DPMSolverPP(1)),
    "FlowMatchHeunDiscreteScheduler": lambda case: _flow(case, Missing("Heun in t of the flow")),
    "PNDMScheduler": _pndm,
    "IPNDMScheduler": _ipndm,
}


# ---- noise levels as times: edm, k-diffusion, diff-sampler ---------------------------------------------------------------------


def _tableau(name: str, a: Any, b: Any) -> diffrax.AbstractSolver:
    """An explicit Runge-Kutta solver from its Butcher tableau."""
    a, b = [np.asarray(row, np.float64) for row in a], np.asarray(b, np.float64)
    fields = {"c": np.asarray([row.sum() for row in a]), "b_sol": b, "b_error": np.zeros_like(b), "a_lower": tuple(a)}
    methods = {"tableau": diffrax.ButcherTableau(**fields), "interpolation_cls": diffrax.ThirdOrderHermitePolynomialInterpolation.from_k}
    return type(name, (diffrax.AbstractERK,), {**methods, "order": lambda self, terms: len(b)})()


HEUN = diffrax.Heun()
TABLEAUX = {
    "2heun": HEUN,
    "3heun": _tableau("Heun3", [[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "3kutta": _tableau("Kutta3", [[1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6]),
    "3vdh": _tableau("VanDerHouwen3", [[8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0, 3 / 4]),
    "4rk": _tableau("RungeKutta4", [[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


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
