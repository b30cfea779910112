"""The multistep and singlestep schedulers in half log-SNR: DPM-Solver and its inversion, DEIS, UniPC, SA-Solver, and those of EDM's levels."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ..solvers import DDIM, DEIS, DPMSolver, DPMSolverPP, ExponentialStages, SASolver, SDEDPMSolver, SDEDPMSolverPP, UniPC
from . import _ladders
from ._ladders import Ladder, Plan, Request
from ._options import one_of

FEW = 15  # below this number of steps the last are of lower order


def orders(options: Mapping[str, Any], order: int, ladder: Ladder) -> tuple[int, ...]:
    """The order of each step: 1 in the last and 2 in the one before where `lower_order_final` says so, or the last goes to zero."""
    count = len(ladder.ts) - 1 + ladder.still
    few = options["lower_order_final"] and count < FEW
    found = [order] * count
    if few and count > 1:
        found[-2] = min(2, order)
    if few or options.get("euler_at_final") or options.get("final_sigmas_type") == "zero":
        found[-1] = 1
    return tuple(found[: len(ladder.ts) - 1])


def dpm_multistep(request: Request) -> Plan:
    options, rule, kind = _dpm(request)
    ladder = _ladders.multistep(options, request.process, request.steps, request.shift)
    order, published = options["solver_order"], request.published
    lower = orders(options, order, ladder)
    if kind == "sde-dpmsolver":
        one_of(options, "solver_order", 1, 2)
        solver = SDEDPMSolver(order, 1.0, rule, lower)
    elif kind == "sde-dpmsolver++":
        solver = SDEDPMSolverPP(order, 1.0, rule, lower, "diffusers" if order == 3 and published else False)
    else:
        solver = (DPMSolverPP if kind == "dpmsolver++" else DPMSolver)(order, rule, lower, published)
    return Plan(ladder, solver)


def dpm_inverse(request: Request) -> Plan:
    """DPM-Solver from data to noise, on a grid for `aj.invert`."""
    options, rule, kind = _dpm(request)
    one_of({**options, "algorithm_type": kind}, "algorithm_type", "dpmsolver", "dpmsolver++")
    ladder, order = _ladders.inverse(options, request.process, request.steps), options["solver_order"]
    lower = orders(options, order, ladder)
    return Plan(ladder, (DPMSolverPP if kind == "dpmsolver++" else DPMSolver)(order, rule, lower, request.published))


def _dpm(request: Request) -> tuple[Mapping[str, Any], str, str]:
    """The options, with solver_type and algorithm_type of DPM-Solver."""
    options = request.options
    renamed = {"deis": "dpmsolver++", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
    options = {**options, **{key: renamed.get(options[key], options[key]) for key in ("solver_type", "algorithm_type")}}
    one_of({"variance_type": None, **options}, "variance_type", None)
    rule = one_of(options, "solver_type", "midpoint", "heun")
    kind = one_of(options, "algorithm_type", "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    if not kind.endswith("++") and "final_sigmas_type" in options:
        one_of(options, "final_sigmas_type", "sigma_min")
    return options, rule, kind


def dpm_singlestep(request: Request) -> Plan:
    """A step of theirs is a stage of ours: the grid is that of the blocks' ends; a block of one identity step is left out."""
    options, rule, kind = _dpm(request)
    one_of(options, "algorithm_type", "dpmsolver", "dpmsolver++")
    order, ladder = options["solver_order"], _ladders.multistep(options, request.process, request.steps, request.shift)
    ts = np.append(ladder.ts, ladder.ts[-1:]) if ladder.still else ladder.ts
    to_zero = options["final_sigmas_type"] == "zero"
    blocks = [order] * (request.steps // order) + ([request.steps % order] if request.steps % order else [])
    lower = options["lower_order_final"] or request.steps % order or to_zero
    if lower and order > 1 and request.steps % order == 0:
        blocks = [*blocks[:-1], order - 1, 1]
    elif to_zero and blocks[-1] > 1:  # the last step is of first order
        blocks = [*blocks[:-1], *[1] * blocks[-1]]
    ends = np.cumsum([0, *blocks])
    if ts[ends[-1]] == ts[ends[-2]]:
        blocks, ends = blocks[:-1], ends[:-1]
    lams = request.process.lam(ts)
    r = [(lams[i + 1 : j] - lams[i]) / (lams[j] - lams[i]) if j > i + 1 else lams[:0] for i, j in pairwise(ends)]
    if order == 3 and any(len(given) == 1 and given[0] == 1 for given in r):
        raise ValueError(
            f"{options['_class_name']} of order 3 has its last, identical step within a block of {request.steps} steps: use another number."
        )
    filled = [(*given, *np.linspace(given[-1] if len(given) else 0.0, 1.0, order - len(given) + 1)[1:-1]) for given in r]
    inner = "midpoint" if rule == "midpoint" and request.published else "exact"
    given = tuple(tuple(float(node) for node in each) for each in filled)
    width = 0.0 if kind == "dpmsolver++" else np.inf
    solver = ExponentialStages(order, width, solver_type=rule, nodes=given, lower_order_final=tuple(blocks), inner=inner)
    told = ladder.ts[:-1] if ladder.told is None else ladder.told
    times = ts[: len(told)]
    return Plan(Ladder(ts[ends]), solver, (times, told))


def deis(request: Request) -> Plan:
    options = request.options
    one_of(options, "algorithm_type", "deis", "dpmsolver", "dpmsolver++")
    one_of(options, "solver_type", "logrho", "midpoint", "heun", "bh1", "bh2")
    one_of(options, "solver_order", 1, 2, 3)
    ladder = _ladders.multistep(options, request.process, request.steps, request.shift)
    return Plan(ladder, DEIS(options["solver_order"], "lam", orders(options, options["solver_order"], ladder)))


def unipc(request: Request) -> Plan:
    options = request.options
    one_of(options, "solver_p", None)
    variant = one_of(options, "solver_type", "bh1", "bh2", "midpoint", "heun", "logrho")
    ladder = _ladders.multistep(options, request.process, request.steps, request.shift)
    more = {"lower_order_final": bool(options["lower_order_final"]), "uncorrected": tuple(options["disable_corrector"])}
    solver = UniPC(options["solver_order"], "bh1" if variant == "bh1" else "bh2", 0.0 if options["predict_x0"] else np.inf, **more)
    return Plan(ladder, solver)


def sa(request: Request) -> Plan:
    """tau = 1 while the network is told a time from 200 to 800, unless tau_func says otherwise."""
    options = request.options
    one_of(options, "variance_type", None)
    data = one_of(options, "algorithm_type", "data_prediction", "noise_prediction") == "data_prediction"
    ladder = _ladders.multistep(options, request.process, request.steps, request.shift)
    tau = options["tau_func"]
    rule: Callable = (lambda t: 200 <= t <= 800) if tau is None else tau if callable(tau) else lambda t: tau
    taus = tuple(float(rule(t)) for t in (ladder.ts[:-1] if ladder.told is None else ladder.told))
    variant, width = ("few_steps", 0.0) if data and request.published else ("exact", 0.0 if data else np.inf)
    lower = bool(options["lower_order_final"])
    return Plan(ladder, SASolver(options["predictor_order"], options["corrector_order"], taus, width, variant, lower))


def edm(request: Request) -> Plan:
    options = request.options
    rule = one_of(options, "sigma_schedule", "karras", "exponential")
    ladder = _ladders.karras(options, request.steps, rule, options["rho"])
    if options["_class_name"] == "EDMEulerScheduler":
        return Plan(ladder, DDIM())
    order, published = options["solver_order"], request.published
    lower = orders(options, order, ladder)
    _, solver_type, kind = _dpm(request._replace(options={"algorithm_type": "sde-dpmsolver++", **options}))
    if one_of({**options, "algorithm_type": kind}, "algorithm_type", "dpmsolver++", "sde-dpmsolver++") == "dpmsolver++":
        return Plan(ladder, DPMSolverPP(order, solver_type, lower, published))
    one_of(options, "solver_order", 1, 2)
    return Plan(ladder, SDEDPMSolverPP(order, 1.0, solver_type, lower))
