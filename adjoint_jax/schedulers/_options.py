"""What a `scheduler_config.json` may say: the options of each class with their defaults, and the classes that have no solver here, with the reason.

An option that a class does not have is ignored, as diffusers does; one that has no equal here is refused where it is set (`one_of`).
"""

from collections.abc import Mapping
from typing import Any

_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {**_LINSPACE, "timestep_spacing": "leading"}
_LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DYNAMIC = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_ORDERS = {"solver_order": 2, "lower_order_final": True}
_DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", **_ORDERS, "variance_type": None, "lambda_min_clipped": -float("inf")}
_FINAL = {"final_sigmas_type": "zero"}
_RANGE = {"sigma_min": None, "sigma_max": None}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0, **_FINAL}
_DDIM = {**_LEADING, **_CLIP, "set_alpha_to_one": True, **_ZERO_SNR}
_DDPM = {**_LEADING, **_CLIP, **_THRESHOLD, **_ZERO_SNR, "variance_type": "fixed_small"}
_HEUN = {**_LINSPACE, **_LEVELS}
_COGVIDEO = {**_LEADING, "set_alpha_to_one": True, **_ZERO_SNR, "snr_shift_scale": 3.0}
_MATCHING = {"shift": 1.0}

OPTIONS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**_DDIM, **_THRESHOLD},
    "DDIMParallelScheduler": {**_DDIM, **_THRESHOLD},
    "DDIMInverseScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "CogVideoXDDIMScheduler": _COGVIDEO,
    "CogVideoXDPMScheduler": _COGVIDEO,
    "PNDMScheduler": {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {
        **_LINSPACE, **_LEVELS, **_FLOW, **_DYNAMIC, **_THRESHOLD, **_ZERO_SNR, **_DPM, **_FINAL, "euler_at_final": False, "use_lu_lambdas": False,
    },
    "DPMSolverMultistepInverseScheduler": {**_LINSPACE, **_LEVELS, **_FLOW, **_THRESHOLD, **_DPM, "euler_at_final": False},
    "DPMSolverSinglestepScheduler": {**_LEVELS, **_FLOW, **_DYNAMIC, **_THRESHOLD, **_DPM, **_FINAL, "lower_order_final": False},
    "DEISMultistepScheduler": {
        **_LINSPACE, **_LEVELS, **_FLOW, **_DYNAMIC, **_THRESHOLD, **_ORDERS, "algorithm_type": "deis", "solver_type": "logrho",
    },
    "UniPCMultistepScheduler": {
        **_LINSPACE, **_LEVELS, **_FLOW, **_DYNAMIC, **_THRESHOLD, **_ZERO_SNR, **_ORDERS, **_FINAL, **_RANGE, "predict_x0": True,
        "solver_type": "bh2", "disable_corrector": (), "solver_p": None, "shift_terminal": None,
    },
    "SASolverScheduler": {
        **_LINSPACE, **_LEVELS, **_FLOW, **_THRESHOLD, "predictor_order": 2, "corrector_order": 2, "tau_func": None, "variance_type": None,
        "algorithm_type": "data_prediction", "lower_order_final": True, "lambda_min_clipped": -float("inf"),
    },
    "EulerDiscreteScheduler": {**_LINSPACE, **_LEVELS, **_ZERO_SNR, **_FINAL, **_RANGE, "interpolation_type": "linear", "timestep_type": "discrete"},
    "EulerAncestralDiscreteScheduler": {**_LINSPACE, **_ZERO_SNR},
    "HeunDiscreteScheduler": {**_HEUN, **_CLIP, "clip_sample": False},
    "KDPM2DiscreteScheduler": _HEUN,
    "KDPM2AncestralDiscreteScheduler": _HEUN,
    "DPMSolverSDEScheduler": _HEUN,
    "LMSDiscreteScheduler": _HEUN,
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM, **_THRESHOLD, **_ORDERS, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False,
    },
    "CosineDPMSolverMultistepScheduler": {
        **_EDM, **_ORDERS, "sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "sigma_schedule": "exponential", "solver_type": "midpoint",
        "euler_at_final": False, "prediction_type": "v_prediction",
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_MATCHING, **_LEVELS, **_DYNAMIC, "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": _MATCHING,
}  # fmt: skip
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")

_CONSISTENCY = "it takes the network's x0 for the sample and noises it anew, consistency sampling, which solves neither the ODE nor the SDE"
_TOKENS = "it samples tokens, not a diffusion of numbers"
REFUSED = {
    **dict.fromkeys(("LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler"), _CONSISTENCY),
    **dict.fromkeys(("ConsistencyDecoderScheduler", "HeliosDMDScheduler"), _CONSISTENCY),
    **dict.fromkeys(
        ("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler", "VQDiffusionScheduler"), _TOKENS
    ),
    "IPNDMScheduler": "its first step, out of alpha = 0, takes x for eps whatever the network says: use aj.solvers.IPNDM on another grid",
    "DDPMWuerstchenScheduler": "its cosine schedule is clamped and has no table: use aj.VPCosine with aj.DDIM(eta=1.0)",
    "UnCLIPScheduler": "its variance is read from the network: use aj.DDIM(eta=1.0) with the first half of the network's answer",
    "RePaintScheduler": "it goes back and forth around a masked image that is no part of the configuration",
    "ScoreSdeVeScheduler": "it corrects each step by Langevin dynamics, with a step size of the batch's own norms",
    "ScoreSdeVpScheduler": "it is an Euler-Maruyama step of its own: use aj.SDEDPMSolverPP with aj.VPLinear",
    "KarrasVeScheduler": "its loop is the pipeline's: use aj.EDMHeun with aj.EDM",
    "LTXEulerAncestralRFScheduler": "it noises a flow by a rule of its own: use aj.solvers.Ancestral with aj.FlowMatching",
    "FlowMapEulerDiscreteScheduler": "its network is a flow map, told two times, which aj.DiffusionTerm is not",
    "HeliosScheduler": "it changes the resolution between its stages",
    "MiniMaxH3Scheduler": "its network is told 1 - sigma and answers with the flow reversed: use aj.solvers.PlainRK with aj.FlowMatching",
    "PiflowScheduler": "its network answers with a policy, which is integrated in place of the network",
    "RFD4ProteinaScheduler": "it rescales the score and masks the atoms of a protein",
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the class, each with its value or default. Raises ValueError for a class that has no solver here."""
    name = config.get("_class_name", "DDPMScheduler")
    if name in REFUSED:
        raise ValueError(f"{name} has no solver here: {REFUSED[name]}.")
    if name not in OPTIONS:
        raise ValueError(f"The scheduler {name!r} is not known here: known are {', '.join(OPTIONS)}.")
    known = OPTIONS[name]
    given = {key: value for key, value in config.items() if key in known or key in BETAS}
    return {"num_train_timesteps": 1000, "_class_name": name, **known, **given}


def one_of(options: Mapping[str, Any], key: str, *allowed: Any) -> Any:
    """The value of an option. Raises ValueError, naming it, for one that has no equal here."""
    value = options[key]
    if value not in allowed:
        raise ValueError(f"{options['_class_name']} with {key}={value!r} has no equal here: use {key} = {' or '.join(map(repr, allowed))}.")
    return value


def spacing_of_levels(options: Mapping[str, Any]) -> str | None:
    """The spacing in noise levels: "karras", "exponential", "beta", "lu", or None for training steps. Raises ValueError for two."""
    names = {"use_karras_sigmas": "karras", "use_lu_lambdas": "lu", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
    asked = {key: name for key, name in names.items() if options.get(key)}
    if len(asked) > 1:
        raise ValueError(f"{options['_class_name']} has one spacing: got {' and '.join(asked)}; set one of them.")
    return next(iter(asked.values()), None)
