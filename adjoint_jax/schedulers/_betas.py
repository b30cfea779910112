"""From a `scheduler_config.json` to a process, a prediction and the unit of time that the network was trained in.

The discrete schedulers of diffusers share the betas of DDPM, beta_i for i = 0 .. T-1, and abar_i = prod_{j <= i} (1 - beta_j):

    linear             beta_i from beta_start to beta_end, evenly
    scaled_linear      sqrt(beta_i) evenly
    squaredcos_cap_v2  beta_i = min(1 - f((i+1)/T) / f(i/T), 0.999),  f(s) = cos^2((s + 0.008) / 1.008 * pi/2)          (Nichol & Dhariwal 2021)
    sigmoid            beta_start + (beta_end - beta_start) / (1 + exp(-u)),  u evenly from -6 to 6
    zero terminal SNR  `grids.zero_terminal_snr`
    CogVideoX          abar_i <- abar_i / (k + (1 - k) abar_i), before that: k times as much noise, sigma^2/alpha^2

Everything is float64 here and float32 there, so that the two agree to about 1e-6.

`ScoreSdeVeScheduler`, of NCSN++, is the process `VE`: its network is told sigma(t) and answers with the score.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import numpy as np

from ..networks import as_pytree
from ..processes import VE, FlowMatching, VPDiscrete, zero_terminal_snr
from ..processes.preserving import ABAR_FLOOR

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EXPLODING = "ScoreSdeVeScheduler"
# What a key left out of the file means: (beta_start, beta_end, beta_schedule) of each class.
_DDPM, _LDM = (1e-4, 0.02, "linear"), (0.00085, 0.012, "linear")
_LCM = (*_LDM[:2], "scaled_linear")
DEFAULTS = {
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"), _DDPM),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler"), _DDPM),
    **dict.fromkeys(("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "PNDMScheduler"), _DDPM),
    **dict.fromkeys(("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"), _DDPM),
    **dict.fromkeys(("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"), _LDM),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"), _LCM),
}


class ScaledTime(eqx.Module):
    """A network that counts time in another unit than its process: it is given `unit * t`."""

    network: Any = eqx.field(converter=as_pytree)
    unit: float = eqx.field(static=True)

    def __call__(self, x, t, args):
        return self.network(x, self.unit * t, args)


class NoiseTime(eqx.Module):
    """A network of the process `VE` that is told sigma(t) in the place of t."""

    network: Any = eqx.field(converter=as_pytree)
    sigmas: tuple[float, float] = eqx.field(static=True)

    def __call__(self, x, t, args):
        return self.network(x, VE(*self.sigmas).sigma(t), args)


def _class_name(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name", "DDPMScheduler")
    known = (*DEFAULTS, *FLOWS, EXPLODING)
    if name not in known:
        raise ValueError(f"The scheduler {name!r} has no process here: known are {', '.join(known)}.")
    return name


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether the scheduler's process is the straight line from data to noise."""
    return _class_name(config) in FLOWS or bool(config.get("use_flow_sigmas"))


def alphas_cumprod(config: Mapping[str, Any], floor: float = ABAR_FLOOR) -> np.ndarray:
    """The products abar_i of a discrete scheduler, `[T]`, float64; `floor` is the last one where it is rescaled to zero terminal SNR."""
    start, end, schedule = DEFAULTS[_class_name(config)]
    start, end, schedule = config.get("beta_start", start), config.get("beta_end", end), config.get("beta_schedule", schedule)
    steps = config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif schedule == "linear":
        betas = np.linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif schedule == "squaredcos_cap_v2":
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif schedule == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    else:
        raise ValueError(f"beta_schedule={schedule!r} is not known: use linear, scaled_linear, squaredcos_cap_v2, sigmoid, or give trained_betas.")
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"The scheduler's betas must be two numbers or more, all between 0 and 1; got {np.array2string(betas, threshold=8)}.")
    abar = np.cumprod(1 - betas)
    if _class_name(config).startswith("CogVideoX"):
        k = config.get("snr_shift_scale", 3.0)
        abar = abar / (k + (1 - k) * abar)
    return zero_terminal_snr(abar, floor) if config.get("rescale_betas_zero_snr") else abar


def process_from_config(config: Mapping[str, Any], floor: float = ABAR_FLOOR) -> tuple[Any, str]:
    """The process and the prediction of a diffusers scheduler.

    Args:
        config: the contents of `scheduler_config.json`; a key left out has its scheduler's default, an empty one is DDPM's.
        floor: as `alphas_cumprod`.

    Returns `VPDiscrete` (t = training step), `FlowMatching` or `VE` (t in [0, 1]; `in_process_time` tells the network its own), and one of
    "eps" "x0" "v" "flow" "score".
    Raises ValueError for a scheduler, schedule or prediction_type that is not known, or noise levels that do not rise.
    """
    if _class_name(config) == EXPLODING:
        return VE(*_sigmas(config)), "score"
    flow = is_flow(config)
    kind = config.get("prediction_type", "flow_prediction" if _class_name(config) in FLOWS else "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind!r} is not known: use one of {', '.join(PREDICTIONS)}.")
    if kind == "flow_prediction" and not flow:
        raise ValueError("prediction_type='flow_prediction' belongs to a flow: set use_flow_sigmas to true, or use FlowMatchEulerDiscreteScheduler.")
    return FlowMatching() if flow else VPDiscrete(alphas_cumprod(config, floor)), PREDICTIONS[kind]


def _sigmas(config: Mapping[str, Any]) -> tuple[float, float]:
    low, high = config.get("sigma_min", 0.01), config.get("sigma_max", 1348.0)
    if not (all(isinstance(each, (int, float)) for each in (low, high)) and 0 < low < high < np.inf):
        raise ValueError(f"The noise of {EXPLODING} rises from sigma_min > 0 to sigma_max; got {low} and {high}: fetch its configuration again.")
    return float(low), float(high)


def in_process_time(network: Any, config: Mapping[str, Any]) -> Any:
    """The network called at the process's time: told as many training steps for a flow, sigma(t) for `VE`, else t itself."""
    if _class_name(config) == EXPLODING:
        return NoiseTime(network, _sigmas(config))
    return ScaledTime(network, float(config.get("num_train_timesteps", 1000))) if is_flow(config) else network
