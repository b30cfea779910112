"""The grid of each scheduler, and the times that it tells its network.

A ladder is a grid of the process and what the network is told at each of its times but the last, in training steps. Where the published last
step goes nowhere (sigma_min after a grid that ends there) it is left out, which `still` says. Five rules:

    chain       training steps, a stride of floor(T / N) taken from each: DDIM, DDPM, PNDM, CogVideoX
    multistep   N + 1 nodes, N of them kept: DPM-Solver, DEIS, UniPC, SA-Solver
    sigmas      levels at fractional training steps, then 0: Euler, Heun, DPM-Solver-2, LMS
    karras      levels in EDM's range: the EDM schedulers, and Euler's that is told log(sigma) / 4
    flow        shifted times of a straight path
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import grids
from ..processes import EDM, FlowMatching, VPDiscrete
from ._options import one_of, spacing_of_levels

SPACINGS = {"karras": grids.karras, "exponential": grids.exponential, "lu": grids.lu, "beta": grids.beta}
NEARLY_NOISE = 1e-6


class Ladder(NamedTuple):
    """`ts` `[n + 1]`; `told` of the first of these, None for the times of `ts` themselves; whether a last step that goes nowhere was left out."""

    ts: np.ndarray
    told: np.ndarray | None = None
    still: bool = False


class Request(NamedTuple):
    """What a plan is made for; `shift` is that of time, `published` whether the formulas are diffusers' own."""

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


def nodes(rule: str, process: Any, count: int, start: float, end: float) -> np.ndarray:
    """`count` times from start to end by a spacing in levels."""
    return SPACINGS[rule](process, count - 1, t_start=start, t_end=end) if count > 1 else np.array([start])


def training_steps(
    options: Mapping[str, Any], process: VPDiscrete, steps: int, final: Any = "append_zero", t_start: float | None = None
) -> np.ndarray:
    """The grid of a spacing in whole training steps."""
    spacing = one_of({"timestep_spacing": "linspace", **options}, "timestep_spacing", "linspace", "leading", "trailing")
    if spacing == "linspace" and final == "append_zero" and steps == 1:
        return np.array([0.0, -1.0])  # as there: the one step starts next to the data
    more = {"offset": options["steps_offset"]} if spacing == "leading" else {}
    return getattr(grids, spacing)(process, steps, t_start=t_start, final=final, **more)


def chain(options: Mapping[str, Any], process: VPDiscrete, steps: int) -> tuple[Ladder, np.ndarray]:
    """The ladder, and the time at which each step ends."""
    told = training_steps(options, process, steps)[:-1]
    clean = -1.0 if options.get("set_alpha_to_one", True) else 0.0
    ends = told - options["num_train_timesteps"] // steps
    ends = np.where(ends < 0, clean, ends)
    if told[-1] > ends[-1]:
        return Ladder(np.append(told, ends[-1])), ends
    return Ladder(told, still=True), ends[:-1]


def ends_of(options: Mapping[str, Any], process: Any, first: float, last: float) -> tuple[float, float]:
    """Where a spacing in levels begins and ends: the levels sigma_max and sigma_min, if given, or these times. Raises ValueError beyond the table."""
    given = [options.get("sigma_max"), options.get("sigma_min")]
    times = [t if sigma is None else float(process.t_of_lam(-np.log(sigma))) for sigma, t in zip(given, (first, last), strict=True)]
    for key, sigma, t in zip(("sigma_max", "sigma_min"), given, times, strict=True):
        if sigma is not None and not np.isclose(-process.lam(t), np.log(sigma), rtol=0, atol=1e-6):
            raise ValueError(f"{options['_class_name']} with {key}={sigma!r} has levels beyond its table of betas: set {key} within it, or to null.")
    return times[0], times[1]


def multistep(options: Mapping[str, Any], process: Any, steps: int, shift: float) -> Ladder:
    name, rule = options["_class_name"], spacing_of_levels(options)
    to_zero = one_of({"final_sigmas_type": "sigma_min", **options}, "final_sigmas_type", "zero", "sigma_min") == "zero"
    if isinstance(process, FlowMatching):
        return _flow_multistep(options, process, steps, shift, to_zero)
    least = options.get("lambda_min_clipped", -np.inf)
    start = process.range[1] - np.searchsorted(process.lam(np.arange(process.range[1] + 1))[::-1], least)
    if rule is None:
        if start < process.range[1]:
            one_of({"timestep_spacing": "linspace", **options}, "timestep_spacing", "linspace", "leading")
        return Ladder(training_steps(options, process, steps, "replace_by_zero" if to_zero else "sigma_min", start))
    levels = nodes(rule, process, steps, *ends_of(options, process, *process.span))
    whole = rule in ("karras", "lu") and not (name == "DPMSolverMultistepScheduler" and options.get("beta_schedule") == "squaredcos_cap_v2")
    told = grids.model_times(process, levels, rounding="round" if whole else "truncate")
    if to_zero:
        return Ladder(np.append(levels, process.range[0]), told)
    if name in ("UniPCMultistepScheduler", "SASolverScheduler"):
        raise ValueError(f"{name} with a {rule} spacing corrects the state after its last step: set final_sigmas_type to zero.")
    return Ladder(levels, told, still=True)


def _flow_multistep(options: Mapping[str, Any], process: FlowMatching, steps: int, shift: float, to_zero: bool) -> Ladder:
    """Truncated times; UniPC goes from 1 to 1/T of a thousand steps before its zero, the others from just below 1."""
    name, rule, total = options["_class_name"], spacing_of_levels(options), options["num_train_timesteps"]
    if name == "UniPCMultistepScheduler":
        least = grids.shift_time(1 / total, shift)
        if rule:
            for key in ("use_exponential_sigmas", "use_beta_sigmas"):
                one_of(options, key, False)
            if options["sigma_min"] is None or options["sigma_max"] is None:
                raise ValueError(f"{name} with use_flow_sigmas and a {rule} spacing needs levels sigma_min and sigma_max: set both.")
            ts = np.append(nodes(rule, process, steps, *ends_of(options, process, 1.0, 0.0)), 0.0)
        else:
            terminal = options["shift_terminal"] or None
            ts = grids.shifted(process, steps, t_end=least, final="replace_by_zero", shift=shift, terminal=terminal)
            ts[0] -= NEARLY_NOISE if ts[0] > 1 - NEARLY_NOISE else 0.0
        one_of(options, "final_sigmas_type", "zero")
    elif rule:
        raise ValueError(f"{name} with use_flow_sigmas and a {rule} spacing takes the spacing of a table of betas: set one of the two to false.")
    else:
        ts = grids.shifted(process, steps, t_start=grids.shift_time(1 - 1 / total, shift), shift=shift)
        if name in ("DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler"):
            ts = ts[:-1]
        elif name == "SASolverScheduler":
            raise ValueError(f"{name} with use_flow_sigmas corrects the state after its last step, which has no equal here: use UniPC's.")
        else:
            one_of(options, "final_sigmas_type", "zero")
    return Ladder(ts, np.trunc(total * ts[:-1]), still=len(ts) == steps)


def sigmas(options: Mapping[str, Any], process: VPDiscrete, steps: int) -> Ladder:
    rule = spacing_of_levels(options)
    if options["timestep_spacing"] == "linspace":
        told = grids.uniform(process, steps - 1) if steps > 1 else np.zeros(1)
    else:
        told = training_steps(options, process, steps)[:-1]
    to_zero = one_of({"final_sigmas_type": "zero", **options}, "final_sigmas_type", "zero", "sigma_min") == "zero"
    if rule:
        levels = nodes(rule, process, steps, *ends_of(options, process, told[0], told[-1]))
        whole = rule == "karras" and options["_class_name"].startswith("KDPM2")
        told = grids.model_times(process, levels, rounding="round" if whole else None)
    elif one_of({"interpolation_type": "linear", **options}, "interpolation_type", "linear", "log_linear") == "log_linear":
        return Ladder(grids.log_snr(process, steps), told)
    else:
        levels = grids.at_model_times(process, told)
    if to_zero:
        return Ladder(np.append(levels, process.range[0]), told)
    if levels[-1] > 1e-9:
        return Ladder(np.append(levels, 0.0), told)
    return Ladder(levels, told, still=True)


def karras(options: Mapping[str, Any], steps: int, rule: str, rho: float = 7.0) -> Ladder:
    first, last = options["sigma_max"], options["sigma_min"]
    more = {"rho": rho} if rule == "karras" else {}
    ts = SPACINGS[rule](EDM(), steps - 1, t_start=first, t_end=last, **more) if steps > 1 else np.array([first])
    if one_of(options, "final_sigmas_type", "zero", "sigma_min") == "zero":
        return Ladder(np.append(ts, 0.0))
    return Ladder(ts, still=True)


def flow(options: Mapping[str, Any], process: FlowMatching, steps: int, shift: float) -> Ladder:
    """The least of the times is shifted twice unless the shift is dynamic: when the scheduler is made, and with the grid."""
    least, rule = 1 / options["num_train_timesteps"], spacing_of_levels(options)
    least = least if options.get("use_dynamic_shifting") else grids.shift_time(least, options["shift"])
    if steps == 1:
        return Ladder(np.array([1.0, 0.0]))
    terminal = options.get("shift_terminal") or None
    ts = grids.shifted(process, steps, t_end=grids.shift_time(least, shift), final="append_zero", shift=shift, terminal=terminal)
    if rule:  # levels here are the times themselves
        ts = np.append(nodes(rule, EDM(), steps, ts[0], ts[-2]), 0.0)
    return Ladder(ts)


def inverse(options: Mapping[str, Any], process: VPDiscrete, steps: int) -> Ladder:
    """The grid of DPM-Solver's inversion, from the noisiest step down; it is run through upwards."""
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"):
        one_of(options, key, False)
    one_of(options, "lambda_min_clipped", -float("inf"))
    spacing, last = one_of(options, "timestep_spacing", "linspace", "leading", "trailing"), process.range[1]
    if spacing == "linspace":
        return Ladder(training_steps(options, process, steps, "sigma_min"))
    if spacing == "trailing":
        return Ladder(training_steps(options, process, steps)[:-1], still=True)
    return Ladder(np.append(last, np.arange(steps)[::-1] * ((last + 1) // (steps + 1)) + options["steps_offset"]))
