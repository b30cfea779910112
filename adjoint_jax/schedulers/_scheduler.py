"""A scheduler of diffusers as a process, grids, solvers and a wrapper around the network.

The state of every scheduler of a table of betas is the variance-preserving one here, x = alpha x0 + sigma eps: where diffusers holds x/alpha
(Euler, Heun, DPM-Solver-2, LMS) it divides it by sqrt(sigma^2 + 1) before the network, and every solver here is invariant under that change. EDM's
schedulers, and Euler's that is told log(sigma)/4, keep x = x0 + sigma eps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..grids import Grid
from ..networks import as_pytree, clip, edm_precondition, rounded_times, threshold
from ..networks.edges import keep_eps
from ..processes import EDM, FlowMatching
from ..processes.preserving import ABAR_FLOOR
from ..solvers.ddim import split
from . import _betas
from ._options import one_of, read
from ._plans import FIXED, LEVELLED, PLANS, Plan, Request

EXACT_ZERO = 1e-24  # abar at the end of a table of zero terminal SNR for the schedulers that keep the zero
KEEPS_EPS = ("DDIMScheduler", "DDIMParallelScheduler")


class _Raw(eqx.Module):
    """EDM's raw network with the sign of a scheduler, told `condition` in place of log(sigma)/4."""

    network: Any
    sign: float = eqx.field(static=True)
    condition: Any = eqx.field(static=True)

    def __call__(self, x: Any, t: Any, args: Any) -> Any:
        return self.sign * self.network(x, self.condition(t), args)


def _arctangent(quarter: Any) -> Any:
    """2 atan(sigma) / pi from log(sigma)/4."""
    return jnp.arctan(jnp.exp(4 * quarter)) * 2 / np.pi


def _same(quarter: Any) -> Any:
    return quarter


@dataclass(frozen=True, eq=False)
class Scheduler:
    """What `from_scheduler_config` returns.

    `process` and `prediction` are those of the wrapped network: `aj.DiffusionTerm(scheduler.network(network, steps), process, prediction)`.
    `inverse`: the scheduler goes from data to noise, and its grid and solver are for `aj.invert`.
    """

    process: Any
    prediction: str
    inverse: bool
    options: Mapping[str, Any]
    published: bool
    eta: float
    shift: float

    def grid(self, steps: int) -> Grid:
        """The grid of `steps` steps; a published last step that goes nowhere is left out."""
        return self._plan(steps).ladder.ts

    def solver(self, steps: int) -> Any:
        """The solver on `grid(steps)`."""
        return self._plan(steps).solver

    def scale(self, steps: int) -> float:
        """The standard deviation of x_T: what diffusers multiplies a standard normal by (`init_noise_sigma`), in the coordinates of `process`."""
        name, edm = self.options["_class_name"], isinstance(self.process, EDM)
        if name not in LEVELLED and not edm:
            return 1.0
        rho = float(np.exp(-self.process.lam(self.grid(steps)[0])))
        wide = name not in LEVELLED or self.options["timestep_spacing"] == "leading"
        grown = math.hypot(rho, 1.0)
        return (grown if wide else rho) / (1.0 if edm else grown)

    def network(self, network: Any, steps: int) -> Any:
        """The network, told what the scheduler would tell it on `steps` steps: t is a training step, or EDM's noise condition.

        x is scaled to the network's own coordinates, its x0 is clipped or thresholded where the configuration says so.
        """
        plan, options, name = self._plan(steps), self.options, self.options["_class_name"]
        if isinstance(self.process, EDM):
            width = options.get("sigma_data", 1.0)
            condition = _arctangent if name.startswith("Cosine") else _same
            found = edm_precondition(_Raw(as_pytree(network), -1.0 if options["prediction_type"] == "v_prediction" else 1.0, condition), width)
            raw = "x0"
        else:
            found, raw = self._told(network, plan), _betas.PREDICTIONS[_kind(options)]
        if _thresholds(options):
            ratio, high = options["dynamic_thresholding_ratio"], options["sample_max_value"]
            found = threshold(found, self.process, raw, ratio, 1.0, high)
        elif options.get("clip_sample"):
            found = clip(found, self.process, raw, -options["clip_sample_range"], options["clip_sample_range"])
        else:
            return found
        return keep_eps(found, *self._shares(plan)) if self.published and name in KEEPS_EPS else found

    def _told(self, network: Any, plan: Plan) -> Any:
        """The network at the times that the scheduler tells it."""
        ladder, stages = plan.ladder, plan.stages
        parts = [] if ladder.told is None else [(ladder.ts[: len(ladder.told)], ladder.told)]
        parts += [] if stages is None else [stages]
        if self.published and parts:
            return rounded_times(network, tuple(np.concatenate(part) for part in zip(*parts, strict=True)))
        return (
            _betas.ScaledTime(network, float(self.options["num_train_timesteps"])) if isinstance(self.process, FlowMatching) else as_pytree(network)
        )

    def _shares(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """The starts of DDIM's steps, and r of `networks.edges`, equation (3), on each."""
        ts = plan.ladder.ts
        ends = np.asarray(getattr(plan.solver, "ends", None) or ts[1:])
        with np.errstate(divide="ignore"):
            start, end = np.exp(-self.process.lam(ts[:-1])), np.exp(-self.process.lam(ends))
        return ts[:-1], split(start, end, self.eta)[0] / start

    def _plan(self, steps: int) -> Plan:
        if int(steps) != steps or steps < 1:
            raise ValueError(f"A scheduler needs a whole number of steps, at least 1; got {steps}.")
        plan = PLANS[self.options["_class_name"]]
        return plan(Request(self.options, self.process, int(steps), self.eta, self.shift, self.published))


def _kind(options: Mapping[str, Any]) -> str:
    flow = options["_class_name"] in _betas.FLOWS
    return "flow_prediction" if flow else options.get("prediction_type", "epsilon")


def _thresholds(options: Mapping[str, Any]) -> bool:
    return bool(options.get("thresholding")) and options.get("predict_x0", True)


def _shift(options: Mapping[str, Any], mu: float | None) -> float:
    """The factor k of `grids.shifted`."""
    name, fixed = options["_class_name"], options.get("shift", options.get("flow_shift", 1.0))
    if mu is not None and not options.get("use_dynamic_shifting"):
        raise ValueError(f"mu is the shift of a scheduler with use_dynamic_shifting, which this {name} is not: leave mu None.")
    if not options.get("use_dynamic_shifting"):
        return fixed
    kind = one_of(options, "time_shift_type", "exponential", "linear")
    if mu is None:
        raise ValueError(f"{name} with use_dynamic_shifting needs mu, which the size of the image sets: give from_scheduler_config(config, mu=...).")
    return float(np.exp(mu)) if kind == "exponential" else float(mu)


def from_scheduler_config(config: Mapping[str, Any], *, published: bool = True, eta: float = 0.0, mu: float | None = None) -> Scheduler:
    """The process, grids and solvers of a scheduler of diffusers, from its `scheduler_config.json`.

    Samples equal diffusers' to rounding error (its tables are float32, which moves them by about 1e-6; the same noise given). Known differences:
    `DPMSolverSDEScheduler` and `CosineDPMSolverMultistepScheduler` draw from one Brownian path there, and independently here; DDPM draws noise of
    variance 1e-20 in a last step that ends at t = -1, none here; where "trailing" makes one node too many (61 steps of 1000) it is left out;
    `KDPM2AncestralDiscreteScheduler` with "linspace" tells its network two times at one level, here the first of the two (1e-6 apart in x_0).
    x_T is in the coordinates of `process`: `scheduler.scale(steps)` times a standard normal.

    Args:
        config: the contents of `scheduler_config.json`; a key left out has its class's default, keys that the class does not have are ignored.
            SA-Solver's tau_func may be a number or a function of the training step; null is 1 from 200 to 800, else 0.
        published: diffusers' own formulas and model times: third orders with their errors, rounded times, DDIM that clips x0 and not eps. False
            takes the corrected ones.
        eta: DDIM's share of noise, which diffusers takes at each step.
        mu: the shift of time where the configuration has use_dynamic_shifting.

    Returns:
        a `Scheduler`: `process`, `prediction`, `grid(steps)`, `solver(steps)`, `network(network, steps)`, `scale(steps)` and `inverse`.

    Raises:
        ValueError: for a class that has no solver here (consistency sampling, tokens, learned variances, ...), naming it; for an option whose value
            has no equal here, naming it; where mu is needed or not.
    Reference: diffusers 0.42, `diffusers.schedulers`.

        scheduler = aj.from_scheduler_config(json.load(open("scheduler_config.json")))
        term = aj.DiffusionTerm(scheduler.network(network, 20), scheduler.process, scheduler.prediction)
        x_0 = aj.sample(term, scheduler.scale(20) * x_T, args, grid=scheduler.grid(20), solver=scheduler.solver(20))
    """
    options = read(config)
    name = options["_class_name"]
    if eta and name not in KEEPS_EPS:
        raise ValueError(f"eta is DDIM's share of noise, which {name} does not take: leave eta 0.")
    shift = _shift(options, mu)
    inverse = name.endswith("InverseScheduler")
    if name in FIXED or (options.get("timestep_type") == "continuous" and options.get("prediction_type") == "v_prediction"):
        one_of({"prediction_type": "epsilon", **options}, "prediction_type", "epsilon", "v_prediction")
        return Scheduler(EDM(), "x0", inverse, {"prediction_type": "epsilon", **options}, published, eta, shift)
    keeps_zero = name.startswith(("DDIM", "DDPM", "CogVideoX"))
    process, prediction = _betas.process_from_config({**options, "prediction_type": _kind(options)}, EXACT_ZERO if keeps_zero else ABAR_FLOOR)
    if isinstance(process, FlowMatching):
        one_of({**options, "prediction_type": _kind(options)}, "prediction_type", "epsilon", "sample", "flow_prediction")
    if _thresholds(options) and options.get("algorithm_type") == "noise_prediction":
        one_of(options, "thresholding", False)
    if _thresholds(options) or options.get("clip_sample"):
        prediction = "x0"
    return Scheduler(process, prediction, inverse, options, published, eta, shift)
