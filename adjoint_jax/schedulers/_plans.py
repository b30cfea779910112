"""The solver of each scheduler, which diffusers lets depend on the number of steps."""

from collections.abc import Callable, Mapping
from typing import Any

import diffrax
import numpy as np

from ..grids import model_times
from ..processes import VPDiscrete
from ..solvers import (
    DDIM,
    DEIS,
    PNDM,
    Ancestral,
    DPMSolverPP,
    DPMSolverPPSDE,
    ExponentialRK,
    ExponentialStages,
    PlainRK,
    Prescribed,
    SDEDPMSolverPP,
)
from . import _ladders, _multistep
from ._ladders import Ladder, Plan, Request
from ._options import one_of, spacing_of_levels


def ddim(request: Request) -> Plan:
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    if ladder.still and request.options.get("clip_sample"):
        raise ValueError(
            f"{request.options['_class_name']} with clip_sample and set_alpha_to_one=False clips at its last step, t = 0: set one of them."
        )
    solver = _first_order(request.options, request.eta)
    return Plan(ladder, solver if np.array_equal(ends, ladder.ts[1:]) else Prescribed(solver, ends))


def _first_order(options: Mapping[str, Any], eta: float) -> Any:
    """DDIM; out of alpha = 0, where its eps is not determined, the same step written in x0."""
    if not options["rescale_betas_zero_snr"]:
        return DDIM(eta)
    if eta not in (0, 1):
        raise ValueError(f"{options['_class_name']} with rescale_betas_zero_snr steps out of alpha = 0 with eta 0 or 1 here; got eta={eta}.")
    return SDEDPMSolverPP(1) if eta else DPMSolverPP(1)


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
    ts, solver = _ladders.training_steps(options, process, request.steps), _first_order(options, 1.0)
    if one_of(options, "variance_type", "fixed_small", "fixed_small_log", "fixed_large") != "fixed_large":
        return Plan(Ladder(ts), solver)
    noise = np.sqrt(-np.expm1(2 * np.diff(process.log_alpha(ts)) * -1))
    noise[-1] = noise[-1] if ts[-2] > 0 else 0.0
    return Plan(Ladder(ts), Prescribed(solver, noise=noise))


def cogvideo_dpm(request: Request) -> Plan:
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    _chained(request, ladder, ends)
    steps = len(ladder.ts) - 1
    lower = [2] * (steps - 1) + [1]
    if request.options["rescale_betas_zero_snr"] and ladder.ts[0] == request.process.range[1]:
        lower[1:2] = [1]  # the step before, out of alpha = 0, is infinitely long in lam
    return Plan(ladder, SDEDPMSolverPP(2, lower_order_final=tuple(lower)))


def pndm(request: Request) -> Plan:
    one_of({"prediction_type": "epsilon", **request.options}, "prediction_type", "epsilon")
    one_of(request.options, "set_alpha_to_one", False)  # its last step into sigma = 0 is of first order here
    ladder, ends = _ladders.chain(request.options, request.process, request.steps)
    _chained(request, ladder, ends)
    if request.options["skip_prk_steps"]:
        return Plan(ladder, PNDM(4, "heun"))
    if request.options["num_train_timesteps"] // request.steps % 2 or request.steps < 4:
        raise ValueError(f"PNDMScheduler starts with half strides, which {request.steps} steps do not have: set skip_prk_steps to true.")
    return Plan(ladder, PNDM(4))


def one_step(make: Callable[[], Any], middle: str | None = None) -> Callable[[Request], Plan]:
    """A solver of levels; `middle`: its stages lie in the middle in lam, of each step ("ode") or of its deterministic part ("ancestral")."""

    def plan(request: Request) -> Plan:
        process = request.process
        if middle == "ancestral":  # the middle is at the level of the next step, where the network would be told two times
            one_of(request.options, "use_karras_sigmas", False)
        if isinstance(process, VPDiscrete):
            ladder = _ladders.sigmas(request.options, process, request.steps)
        else:
            ladder = _ladders.karras(request.options, request.steps, spacing_in_sigma(request.options))
        if middle is None:
            return Plan(ladder, make())
        rho = np.exp(-process.lam(ladder.ts[:-1]))
        down = rho[1:] ** 2 / rho[:-1] if middle == "ancestral" else rho[1:]
        between = process.t_of_lam(-np.log(rho[:-1] * down) / 2)
        return Plan(ladder, make(), (between, model_times(process, between)))

    return plan


def spacing_in_sigma(options: Mapping[str, Any]) -> str:
    """The spacing of Euler's levels where they are not those of a table."""
    rule = spacing_of_levels(options)
    if rule is None or options["sigma_max"] is None or options["sigma_min"] is None:
        raise ValueError("EulerDiscreteScheduler with timestep_type='continuous' needs use_karras_sigmas, sigma_min and sigma_max here.")
    return rule


def flow(solver: Any) -> Callable[[Request], Plan]:
    def plan(request: Request) -> Plan:
        one_of({"invert_sigmas": False, **request.options}, "invert_sigmas", False)
        one_of({"stochastic_sampling": False, **request.options}, "stochastic_sampling", False)
        return Plan(_ladders.flow(request.options, request.process, request.steps, request.shift), PlainRK(solver))

    return plan


PLANS: dict[str, Callable[[Request], Plan]] = {
    **dict.fromkeys(("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"), ddim),
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler"), ddpm),
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"), _multistep.edm),
    "DDIMInverseScheduler": ddim_inverse,
    "CogVideoXDPMScheduler": cogvideo_dpm,
    "PNDMScheduler": pndm,
    "DPMSolverMultistepScheduler": _multistep.dpm_multistep,
    "DPMSolverMultistepInverseScheduler": _multistep.dpm_inverse,
    "DPMSolverSinglestepScheduler": _multistep.dpm_singlestep,
    "DEISMultistepScheduler": _multistep.deis,
    "UniPCMultistepScheduler": _multistep.unipc,
    "SASolverScheduler": _multistep.sa,
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
FIXED = tuple(name for name, plan in PLANS.items() if plan is _multistep.edm)
"""The schedulers of EDM's levels."""
