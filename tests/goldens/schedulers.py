"""The schedulers of diffusers, one function a class."""

from typing import Any

import numpy as np

import adjoint_jax as aj

from .cases import Case
from .runs import LMS, Missing, Run, levels, network, table
from .tables import HEUN


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
    """Stages in the middle of a step and repeated calls count as timesteps; the last step goes to t = 0, where the identity is left out."""
    process, told, stride = _table_of(case), case.array("timesteps"), 1000 // case.meta["steps"]
    main = np.unique(told[(told - told[-1]) % stride == 0])[::-1]
    grid = np.append(main, 0.0) if main[-1] > 0 else main
    warmup = "heun" if case.meta["cfg"].get("skip_prk_steps", False) else "runge-kutta"
    return Run(network(case, process), process, "eps", grid, aj.solvers.PNDM(4, warmup))


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
