"""The solver of each scheduler, which diffusers lets depend on the number of steps."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import diffrax
import numpy as np

from ..processes import VPDiscrete
from ..solvers import (
    DDIM,
    DEIS,
    PNDM,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSDE,
    ExponentialRK,
    ExponentialStages,
    PlainRK,
    Prescribed,
    SASolver,
    SDEDPMSolver,
    SDEDPMSolverPP,
    UniPC,
)
from . import _ladders
from ._ladders import Ladder
from ._options import one_of

FEW = 15  # below this number of steps the last are of lower order


class Request(NamedTuple):
    """What a plan is made for: the options, the process, the number of steps, DDIM's eta, the shift of time, and whether formulas are the published."""

    options: Mapping[str, Any]
    process: Any
    steps: int
    eta: float
    shift: float
    published: bool


class Plan(NamedTuple):
    """A ladder, the solver, and further times at which its stages read the network, `[m]`, with what they are told."""

    ladder: Ladder
    solver: Any
    stages: tuple[np.ndarray, np.ndarray] | None = None


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


def ddim(request: Request) -> Plan:
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    if ladder.still and request.options.get("clip_sample"):
        raise ValueError(
            f"{request.options['_class_name']} with clip_sample and set_alpha_to_one=False clips at its last step, t = 0: set one of them."
        )
    solver = DDIM(request.eta)
    return Plan(ladder, solver if np.array_equal(ends, ladder.ts[1:]) else Prescribed(solver, ends))


def ddim_inverse(request: Request) -> Plan:
    """The same grid, run through by `aj.invert`; the network is told the time at which a step ends."""
    one_of(request.options, "clip_sample", False)
    one_of(request.options, "timestep_spacing", "leading", "trailing")
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    _chained(request, ladder, ends)
    return Plan(ladder, DDIM(), (ladder.ts[1:], ladder.ts[:-1]))


def _chained(request: Request, ladder: Ladder, ends: np.ndarray) -> None:
    if not np.array_equal(ends, ladder.ts[1:]):
        name, total = request.options["_class_name"], request.options["num_train_timesteps"]
        raise ValueError(f"{name} goes from a training step to another than its next on {request.steps} steps: use a number that divides {total}.")


def ddpm(request: Request) -> Plan:
    """DDIM with eta = 1; "fixed_large" takes beta for the variance of the noise, 1 - abar_i / abar_{i+1}."""
    options, process = request.options, request.process
    ts = _ladders.training_steps(options, process, request.steps)
    if one_of(options, "variance_type", "fixed_small", "fixed_small_log", "fixed_large") != "fixed_large":
        return Plan(Ladder(ts), DDIM(1.0))
    noise = np.sqrt(-np.expm1(2 * np.diff(process.log_alpha(ts)) * -1))
    noise[-1] = noise[-1] if ts[-2] > 0 else 0.0
    return Plan(Ladder(ts), Prescribed(DDIM(1.0), noise=noise))


def cogvideo_dpm(request: Request) -> Plan:
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    _chained(request, ladder, ends)
    return Plan(ladder, SDEDPMSolverPP(2, lower_order_final="euler"))


def pndm(request: Request) -> Plan:
    one_of({"prediction_type": "epsilon", **request.options}, "prediction_type", "epsilon")
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    _chained(request, ladder, ends)
    if request.options["skip_prk_steps"]:
        return Plan(ladder, PNDM(4, "heun"))
    if request.options["num_train_timesteps"] // request.steps % 2 or request.steps < 4:
        raise ValueError(f"PNDMScheduler starts with half strides, which {request.steps} steps do not have: set skip_prk_steps to true.")
    return Plan(ladder, PNDM(4))


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


def one_step(make: Callable[[], Any], middle: str | None = None) -> Callable[[Request], Plan]:
    """The plan of a solver of levels; `middle`: its stages lie in the middle in lam, of each step ("ode") or of its deterministic part ("ancestral")."""

    def plan(request: Request) -> Plan:
        process = request.process
        if isinstance(process, VPDiscrete):
            ladder = _ladders.sigmas(request.options, process, request.steps)
        else:
            ladder = _ladders.karras(request.options, request.steps, spacing_in_sigma(request.options))
        if middle is None:
            return Plan(ladder, make())
        rho = np.exp(-process.lam(ladder.ts[:-1]))
        down = rho[1:] ** 2 / rho[:-1] if middle == "ancestral" else rho[1:]
        between = process.t_of_lam(-np.log(rho[:-1] * down) / 2)
        return Plan(ladder, make(), (between, _ladders.grids.model_times(process, between)))

    return plan


def spacing_in_sigma(options: Mapping[str, Any]) -> str:
    """The spacing of Euler's levels where they are not those of a table."""
    rule = _ladders.spacing_of_levels(options)
    if rule is None or options["sigma_max"] is None or options["sigma_min"] is None:
        raise ValueError("EulerDiscreteScheduler with timestep_type='continuous' needs use_karras_sigmas, sigma_min and sigma_max here.")
    return rule


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


def flow(solver: Any) -> Callable[[Request], Plan]:
    def plan(request: Request) -> Plan:
        one_of({"invert_sigmas": False, **request.options}, "invert_sigmas", False)
        one_of({"stochastic_sampling": False, **request.options}, "stochastic_sampling", False)
        return Plan(_ladders.flow(request.options, request.process, request.steps, request.shift), PlainRK(solver))

    return plan


PLANS: dict[str, Callable[[Request], Plan]] = {
    **dict.fromkeys(("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"), ddim),
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler"), ddpm),
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"), edm),
    "DDIMInverseScheduler": ddim_inverse,
    "CogVideoXDPMScheduler": cogvideo_dpm,
    "PNDMScheduler": pndm,
    "DPMSolverMultistepScheduler": dpm_multistep,
    "DPMSolverMultistepInverseScheduler": dpm_inverse,
    "DPMSolverSinglestepScheduler": dpm_singlestep,
    "DEISMultistepScheduler": deis,
    "UniPCMultistepScheduler": unipc,
    "SASolverScheduler": sa,
    "EulerDiscreteScheduler": one_step(DDIM),
    "EulerAncestralDiscreteScheduler": one_step(lambda: DDIM(1.0)),
    "HeunDiscreteScheduler": one_step(lambda: ExponentialRK(diffrax.Heun())),
    "KDPM2DiscreteScheduler": one_step(lambda: ExponentialStages(2), "ode"),
    "KDPM2AncestralDiscreteScheduler": one_step(lambda: Ancestral(ExponentialStages(2)), "ancestral"),
    "DPMSolverSDEScheduler": one_step(DPMSolverPPSDE, "ode"),
    "LMSDiscreteScheduler": one_step(lambda: DEIS(4, "rho")),
    "FlowMatchEulerDiscreteScheduler": flow(diffrax.Euler()),
    "FlowMatchHeunDiscreteScheduler": flow(diffrax.Heun()),
}
LEVELLED = tuple(name for name in PLANS if name.startswith(("Euler", "HeunD", "KDPM2", "DPMSolverSDE", "LMS")))
"""The schedulers that hold x/alpha."""
FIXED = tuple(name for name, plan in PLANS.items() if plan is edm)
"""The schedulers of EDM's levels."""
