"""Single files of Stable Diffusion 1, 2 and XL, as they were trained: which tensors belong to which network, and the pipeline they make.

The noise is that of latent diffusion, sqrt(beta_i) even from sqrt(0.00085) to sqrt(0.012), i = 0 .. 999 (Rombach et al. 2022); a file that has kept
its `alphas_cumprod` is checked against it.
"""

import re
from typing import Any

import numpy as np

from ...schedulers import _betas
from .. import _models, _pipeline
from . import _text, _unet, _vae
from ._part import Converted, Part, State, listed, under

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")
# What training keeps beside the weights: the schedule, positions, temperatures, the discriminator, flags of the prediction.
BUFFERS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor|denoiser\..*|ztsnr|v_pred|model_ema\..*"
    r"|.*\.position_ids|.*\.logit_scale|.*\.attn_mask|first_stage_model\.loss\..*)"
)
PREDICTIONS = ("epsilon", "v_prediction")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LIBRARIES = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers", "text_encoder_2": "transformers"}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def is_ldm(state: State) -> bool:
    """Whether the tensors are those of a latent diffusion model."""
    return any(name.startswith((UNET, VAE)) for name in state)


def averaged(state: State, weights: str, source: str) -> dict[str, np.ndarray]:
    """The UNet's tensors, the averaged ones where a file has both kinds and they are asked for; these have names without dots."""
    raw = under(state, UNET)
    names = {name: EMA + f"{UNET}{name}".removeprefix("model.").replace(".", "") for name in raw}
    if weights == "raw" or not any(name in state for name in names.values()):
        return raw
    if missing := sorted(name for name in names.values() if name not in state):
        raise ValueError(f"{source} has averaged weights for some tensors, not for {listed(missing)}: give --weights raw.")
    return {name: state[averaged] for name, averaged in names.items()}


def _scheduler(state: State, unet: Part, prediction: str | None, xl: bool, overrides: dict[str, Any], source: str) -> dict[str, Any]:
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r} is not known: use one of {', '.join(PREDICTIONS)}.")
    if prediction is None and unet.config["cross_attention_dim"] == 1024 and "v_pred" not in state:
        raise ValueError(
            f"{source} is a Stable Diffusion 2, and whether it predicts the noise or v cannot be seen in its tensors: give --prediction epsilon for "
            "those of 512 pixels (base), v_prediction for those of 768."
        )
    config = {
        "_class_name": "EulerDiscreteScheduler" if xl else "DDIMScheduler",
        **SCHEDULE,
        "prediction_type": prediction or PREDICTIONS["v_pred" in state],
        "timestep_spacing": "leading",
        "steps_offset": 1,
        **({"rescale_betas_zero_snr": True} if "ztsnr" in state else {}),
        **({} if xl else {"clip_sample": False, "set_alpha_to_one": False}),
        **overrides,
    }
    if (kept := state.get("alphas_cumprod")) is not None and "ztsnr" not in state:
        expected = _betas.alphas_cumprod(config)
        if kept.shape != expected.shape or not np.allclose(kept, expected, rtol=1e-3, atol=1e-5):
            raise ValueError(f'{source} was trained with another schedule of the noise: give its entries in --config, {{"scheduler": {{...}}}}.')
    return config


def _pipeline_index(parts: dict[str, Part], xl: bool, refiner: bool) -> dict[str, Any]:
    kinds = {9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
    kind = kinds.get(parts["unet"].config["in_channels"], "StableDiffusionPipeline")
    if xl:
        kind = "StableDiffusionXLImg2ImgPipeline" if refiner else kind.replace("StableDiffusion", "StableDiffusionXL")
    names = ("unet", "vae", "text_encoder", *(("text_encoder_2",) if xl else ()))
    classes = {name: (LIBRARIES[name], str(_models.class_name(parts[name].config))) if name in parts else None for name in names}
    classes |= {"scheduler": ("diffusers", "EulerDiscreteScheduler" if xl else "DDIMScheduler")}
    classes |= dict.fromkeys(("tokenizer", *(("tokenizer_2",) if xl else ("safety_checker", "feature_extractor"))))
    options = {"force_zeros_for_empty_prompt": not refiner} if xl else {"requires_safety_checker": False}
    return _pipeline.index(classes, kind) | options


def convert(state: State, *, weights: str, prediction: str | None, overrides: dict[str, Any], source: str) -> Converted:
    """The networks of a file, their pipeline and its scheduler; a file of the autoencoder alone is that one network."""
    known = (UNET, VAE, *CLIP, *OPEN_CLIP)
    if unknown := sorted(name for name in state if not name.startswith(known) and not BUFFERS.fullmatch(name)):
        raise ValueError(f"{source} has {len(unknown)} tensors that belong to no known network ({listed(unknown)}): it holds something else as well.")
    wanted = {name: tensor for name, tensor in state.items() if not BUFFERS.fullmatch(name)}
    dropped = tuple(sorted(name for name in state if name not in wanted and not name.startswith(EMA)))
    xl = any(name.startswith("conditioner.") for name in wanted)

    def options(name: str) -> dict[str, Any]:
        return dict(overrides.get(name, {}))

    parts = {}
    if any(name.startswith(UNET) for name in wanted):
        parts["unet"] = _unet.convert(averaged({**wanted, **_averages(state)}, weights, source), options("unet"), source)
    if vae := under(wanted, VAE):
        parts["vae"] = _vae.convert(vae, options("vae"), 0.13025 if xl else 0.18215, source)
    for prefix in CLIP:
        if text := under(wanted, prefix):
            parts["text_encoder"] = _text.convert(text, options("text_encoder"), source)
    for prefix in OPEN_CLIP:
        if text := under(wanted, prefix):
            name = "text_encoder_2" if xl else "text_encoder"
            parts[name] = _text.convert_open(text, options(name), not xl, source)
    if "unet" not in parts:
        return Converted(parts, dropped=dropped)
    scheduler = _scheduler(state, parts["unet"], prediction, xl, options("scheduler"), source)
    return Converted(parts, scheduler, _pipeline_index(parts, xl, xl and "text_encoder" not in parts), dropped)


def _averages(state: State) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in state.items() if name.startswith(EMA)}
