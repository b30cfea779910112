"""The schedulers of diffusers, one function a class."""

import itertools
from typing import Any

import numpy as np

import adjoint_jax as aj

from .cases import Case
from .lu import stages
from .runs import Missing, Run, levels, network, table
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
    solver = aj.DDIM(meta["eta"])
    if config.get("clip_sample", True):
        solver = Missing("x0 clipped, its eps not")
    noise = case.array("noise") if meta["eta"] else None
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
    noise = case.array("noise")[: len(grid) - 1] if solver.draws else None
    net = network(case, process, prediction, times=grid[: len(lams)], lams=lams[: len(grid)], **more)
    return Run(net, process, prediction, grid, solver, noise)


def _lowered(case: Case, order: int, zero: bool) -> Any:
    """`lower_order_final`: on grids of fewer than 15 steps, or the last step alone; an identity at the end counts as a step of theirs."""
    config, n, sigmas = case.meta["cfg"], case.meta["steps"], case.array("sigmas")
    if config.get("lower_order_final", True):
        if n < 15 and np.isclose(sigmas[-1], sigmas[-2], rtol=1e-12, atol=0):
            return tuple(int(each) for each in np.minimum(order, np.arange(n, 1, -1)))
        if n < 15:
            return 15
    return "euler" if zero or config.get("euler_at_final", False) else False


def _dpmm(case: Case) -> Run:
    config = case.meta["cfg"]
    order, kind = config.get("solver_order", 2), config.get("algorithm_type", "dpmsolver++")
    rule = config.get("solver_type", "midpoint")
    lower = _lowered(case, order, config.get("final_sigmas_type", "zero") == "zero")
    if kind.startswith("sde"):
        if kind == "sde-dpmsolver":
            return _discrete(case, aj.solvers.SDEDPMSolver(order, 1.0, rule, lower))
        return _discrete(case, aj.SDEDPMSolverPP(order, 1.0, rule, lower, "diffusers" if order == 3 else False))
    solver = aj.DPMSolverPP if kind == "dpmsolver++" else aj.DPMSolver
    return _discrete(case, solver(order, rule, lower, published=True))


def _dpms(case: Case) -> Run:
    """A step of theirs is a stage of ours: the grid is that of the blocks' ends, a block of one identity step is left out."""
    config, n = case.meta["cfg"], case.meta["steps"]
    order, rule = config["solver_order"], config.get("solver_type", "midpoint")
    sigma_data = 0.0 if config.get("algorithm_type", "dpmsolver++") == "dpmsolver++" else np.inf
    run = _discrete(case, aj.DDIM())
    blocks = [order] * (n // order) + ([n % order] if n % order else [])
    if order > 1 and n % order == 0:
        blocks = [*blocks[:-1], *([2] if order == 3 else [1]), 1]
    full = np.append(run.grid, run.grid[-1:] * np.ones(n + 1 - len(run.grid)))
    ends = np.cumsum([0, *blocks])
    lams = run.process.lam(full)
    if full[ends[-1]] == full[ends[-2]]:
        blocks, ends = blocks[:-1], ends[:-1]
    inner = [lams[first + 1 : last] for first, last in itertools.pairwise(ends)]
    nodes = stages(lams[ends], inner, order)
    inside = "midpoint" if rule == "midpoint" else "exact"
    solver = aj.solvers.ExponentialStages(order, sigma_data, solver_type=rule, nodes=nodes, lower_order_final=tuple(blocks), inner=inside)
    return run._replace(grid=full[ends], solver=solver)


def _deis(case: Case) -> Run:
    order = case.meta["cfg"]["solver_order"]
    return _discrete(case, aj.DEIS(order, "lam", _lowered(case, order, False)))


def _unipc(case: Case) -> Run:
    config = case.meta["cfg"]
    sigma_data = 0.0 if config.get("predict_x0", True) else np.inf
    off = tuple(config.get("disable_corrector", ()))
    lower = config.get("lower_order_final", True)
    return _discrete(case, aj.UniPC(config["solver_order"], config.get("solver_type", "bh2"), sigma_data, lower_order_final=lower, uncorrected=off))


def _sa(case: Case) -> Run:
    config = case.meta["cfg"]
    tau = float(config["tau_func"].split()[1])
    return _discrete(case, aj.solvers.SASolver(config["predictor_order"], config["corrector_order"], tau, variant="few_steps"))


def _exploding(case: Case, solver: Any) -> Run:
    """Schedulers in the coordinates x / alpha; the state's sigma and the model's timestep are interpolated by different rules."""
    process, sigmas = aj.EDM(), case.array("sigmas")
    lams = _table_of(case).lam(case.array("timesteps"))
    times = sigmas[: len(lams)]
    _, index = np.unique(times[::-1], return_index=True)
    index = len(times) - 1 - index[::-1]
    grid = np.append(times[index], 0.0)
    return Run(network(case, process, times=grid[:-1], lams=lams[index]), process, "eps", grid, solver)


def _kdpm2(case: Case) -> Run:
    """DPM-Solver-2; what the model was told at the states and between them is in the order of its calls."""
    run = _exploding(case, aj.solvers.ExponentialStages(2, np.inf))
    between = np.sqrt(run.grid[:-2] * run.grid[1:-1])
    times = np.append(np.stack([run.grid[:-2], between], axis=1).ravel(), run.grid[-2])
    return run._replace(network=network(case, run.process, times=times, lams=case.array("lam_eval")))


def _edm_dpm(case: Case) -> Run:
    order, process = case.meta["cfg"]["solver_order"], aj.EDM()
    lower = _lowered(case, order, True)
    solver = aj.SDEDPMSolverPP(order, lower_order_final=lower) if case.meta.get("sde") else aj.DPMSolverPP(order, "midpoint", lower, True)
    noise = case.array("noise") if solver.draws else None
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
    "KDPM2DiscreteScheduler": _kdpm2,
    "LMSDiscreteScheduler": lambda case: _exploding(case, aj.DEIS(4, "rho")),
    "EDMEulerScheduler": lambda case: Run(network(case, aj.EDM()), aj.EDM(), "eps", case.array("sigmas"), aj.DDIM()),
    "EDMDPMSolverMultistepScheduler": _edm_dpm,
    "FlowMatchEulerDiscreteScheduler": lambda case: _flow(case, aj.DPMSolverPP(1)),
    "FlowMatchHeunDiscreteScheduler": lambda case: _flow(case, Missing("Heun in t of the flow")),
    "PNDMScheduler": _pndm,
    "IPNDMScheduler": _ipndm,
}
