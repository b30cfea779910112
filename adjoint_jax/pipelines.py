"""From a text to an image through a published pipeline's own networks: tokens, text encoder, sampler with guidance, decoder.

    c = CLIPText(tokens),    x_0 = sample(x_T | c, c_uncond, w),    image = decode(x_0)                             (1)

Every function is pure, and differentiable in the token embeddings, c and the pooled text, c_uncond, x_T, w, the weights and a LoRA of them.
The weights are an argument, apart from the modules:

    pipeline = checkpoints.load_pipeline("stabilityai/stable-diffusion-2-1")
    modules, params = pipelines.split(pipeline.components)
    tokens = pipelines.tokenize(pipeline.tokenizers["tokenizer"], ["an owl", ""])
    text = pipelines.encode_prompt(modules, params, tokens)
    cond, uncond = (jax.tree.map(lambda each: each[i : i + 1], text) for i in (0, 1))
    scheduler = aj.from_scheduler_config(pipeline.scheduler)
    image = pipelines.text_to_image(modules, params, x_T, cond, uncond, scheduler=scheduler, steps=20, guidance=7.5)

Known are Stable Diffusion 1 and 2 and SDXL from tokens; any other with a `unet` or `transformer` of `adjoint_jax.models` (Stable Diffusion 3) from
`cond` as that network takes it. Images and latents are `[B, H, W, C]`, images in [-1, 1] but for what the decoder overshoots.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._tokens import tokenize as tokenize
from .models import UNet2DCondition
from .models.autoencoder_kl import decode_tiled
from .networks import cfg, linen
from .sample import sample
from .terms import DiffusionTerm

__all__ = ["decode", "denoiser", "encode_prompt", "size_ids", "split", "text_to_image", "tokenize"]

ENCODERS = ("text_encoder", "text_encoder_2")
Modules = Mapping[str, Any]
Params = Mapping[str, Any]


def split(components: Mapping[str, tuple[Any, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`load_pipeline(...).components` as the modules and their parameters, each by name: what is static, and what can be differentiated."""
    return {name: module for name, (module, _) in components.items()}, {name: params for name, (_, params) in components.items()}


def encode_prompt(modules: Modules, params: Params, tokens: Any, *, embeds: Any = None, clip_skip: int = 0) -> dict[str, Any]:
    """What the denoiser takes for its `cond`, of tokens.

    One encoder (Stable Diffusion 1, 2): `encoder_hidden_states`, its last hidden state. Two (SDXL), or the second alone: their last states but
    one, joined, and `text_embeds`, the pooled and projected text of the second; `text_to_image` adds the sizes of `size_ids`.

    Args:
        modules, params: by name, with `text_encoder`, `text_encoder_2` or both.
        tokens: integers `[B, T]` of `tokenize`; with two encoders a dict of both, by the encoder's name, for their paddings differ.
        embeds: None; or floats `[B, T, D]` in the place of the embeddings of the tokens, by name as the tokens, to differentiate in.
        clip_skip: leave out that many layers more. diffusers does so for the prompt, and never for the negative prompt.

    Raises ValueError for tokens that are missing, layers that are not there, and a pipeline whose texts are encoded in another way.
    """
    names = [name for name in ENCODERS if name in modules]
    if not names or "unet" not in modules:
        raise ValueError(f"encode_prompt knows pipelines with a unet and one or two CLIP encoders; this has {sorted(modules)}: give cond itself.")
    tokens, embeds = (_by_name(value, names) for value in (tokens, embeds))
    if missing := [name for name in names if tokens.get(name) is None]:
        raise ValueError(f"There are no tokens for {', '.join(missing)}: give a dict of tokens with {', '.join(names)}.")
    large = "text_encoder_2" in names
    most = min(modules[name].num_hidden_layers for name in names) - large
    if not 0 <= clip_skip <= most:
        raise ValueError(f"clip_skip={clip_skip} leaves out more layers than there are, or fewer than none: give 0 to {most}.")
    outputs = {}
    for name in names:
        arguments = (jnp.asarray(tokens[name]), embeds.get(name), 0 if large else clip_skip)
        outputs[name] = modules[name].apply({"params": params[name]}, *arguments)
    if not large:
        return {"encoder_hidden_states": outputs[names[0]].last_hidden_state}
    states = [output.hidden_states[-2 - clip_skip] for output in outputs.values()]
    return {"encoder_hidden_states": jnp.concatenate(states, axis=-1), "text_embeds": outputs["text_encoder_2"].text_embeds}


def _by_name(value: Any, names: list[str]) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    return {names[0]: value}


def size_ids(height: int, width: int, *, crop: tuple[int, int] = (0, 0), original: tuple[int, int] | None = None) -> Array:
    """SDXL's `time_ids` `[1, 6]`: (height, width) before cropping, the image's own unless given; the crop's top and left; height and width."""
    return jnp.asarray([[*(original or (height, width)), *crop, height, width]], jnp.float32)


def denoiser(modules: Modules) -> tuple[str, Any]:
    """The name of the network that is sampled from, `unet` or `transformer`, and its module."""
    found = [(name, modules[name]) for name in ("unet", "transformer") if name in modules]
    if len(found) != 1:
        raise ValueError(f"A pipeline has one of unet and transformer; this has {sorted(modules)}.")
    return found[0]


def _vae(modules: Modules) -> Any:
    if "vae" not in modules:
        raise ValueError(f"Images are decoded by a vae, which this pipeline of {sorted(modules)} lacks: sample from its network by aj.sample.")
    return modules["vae"]


def _condition(modules: Modules, cond: Any, x: Array) -> Any:
    """`cond` with a row for each latent, and SDXL's sizes where they are missing and the image's own."""
    _, module = denoiser(modules)
    if isinstance(module, UNet2DCondition) and not isinstance(cond, Mapping):
        cond = {"encoder_hidden_states": cond}
    if getattr(module, "addition_embed_type", None) == "text_time" and "time_ids" not in cond:
        factor = _vae(modules).factor
        cond = {**cond, "time_ids": size_ids(factor * x.shape[1], factor * x.shape[2])}

    def rows(name: str, value: Any) -> Any:
        value = jnp.asarray(value)
        if value.ndim and value.shape[0] not in (1, len(x)):
            raise ValueError(f"{name} has {value.shape[0]} rows where x_T has {len(x)}: give one, or as many.")
        return jnp.broadcast_to(value, (len(x), *value.shape[1:])) if value.ndim else value

    return {name: rows(name, value) for name, value in cond.items()} if isinstance(cond, Mapping) else rows("cond", cond)


def decode(
    modules: Modules, params: Params, latents: Float[Array, "b h w c"], *, tile: int | None = None, overlap: int | None = None, remat: bool = True
):
    """The image of latents of the sampler, `[B, f H, f W, 3]`: the decoder of z = latents / scaling factor (+ shift).

    Args:
        remat: each block of the decoder is computed again in the backward pass, so that the gradient holds the activations of one.
        tile, overlap: decode tiles of that many latent pixels one after the other, in the memory of one, see `models.autoencoder_kl.decode_tiled`; an
            approximation, as everywhere. The overlap is a quarter of the tile unless given.
    """
    vae = _vae(modules).clone(remat=remat)
    z = vae.from_latents(latents)
    if tile is not None:
        return decode_tiled(vae, params["vae"], z, tile=tile, overlap=tile // 4 if overlap is None else overlap)
    return vae.apply({"params": params["vae"]}, z, method="decode")


def text_to_image(
    modules: Modules,
    params: Params,
    x_T: Float[Array, "b h w c"],
    cond: Any,
    uncond: Any = None,
    *,
    scheduler: Any,
    steps: int,
    guidance: Any = None,
    rescale: Any = 0.0,
    grid: Any = None,
    solver: Any = None,
    adjoint: Any = None,
    key: Any = None,
    noise: Any = None,
    tile: int | None = None,
    wrap: Any = None,
) -> Float[Array, "b h2 w2 3"]:
    """(1) from c on: sampling with classifier-free guidance, and decoding.

    Args:
        modules, params: by name; `checkpoints.lora.merge(params["unet"], lora)` in the place of `params["unet"]` puts a LoRA in.
        x_T: standard normal, `[B, H, W, C]` in latent pixels; it is scaled as the scheduler says.
        cond, uncond: of `encode_prompt`, or as the network takes it; one row, or one for each x_T. SDXL's `time_ids` are the image's own size where
            they are missing. For SDXL without a negative prompt diffusers takes zeros for both, `jax.tree.map(jnp.zeros_like, cond)`.
        scheduler: of `aj.from_scheduler_config`; `steps` are its.
        guidance: w, a scalar or `[B]`, differentiable; None where `uncond` is.
        rescale: of `aj.cfg`.
        grid, solver: the scheduler's, unless given. adjoint, key, noise: of `aj.sample`.
        tile: of `decode`.
        wrap: applied to the network before guidance, `checkpoints.lora.with_lora`; `params["lora"]` is then its LoRA.

    Raises ValueError where guidance and uncond do not come together, for conditions of another batch, and what the parts raise.
    """
    _vae(modules)
    term, args = problem(modules, params, x_T, cond, uncond, scheduler=scheduler, steps=steps, guidance=guidance, rescale=rescale, wrap=wrap)
    grid, solver = scheduler.grid(steps) if grid is None else grid, scheduler.solver(steps) if solver is None else solver
    latents = sample(term, scheduler.scale(steps) * x_T, args, grid=grid, solver=solver, adjoint=adjoint, key=key, noise=noise)
    return decode(modules, params, latents, tile=tile)


def problem(
    modules: Modules,
    params: Params,
    x_T: Float[Array, "b h w c"],
    cond: Any,
    uncond: Any = None,
    *,
    scheduler: Any,
    steps: int,
    guidance: Any = None,
    rescale: Any = 0.0,
    wrap: Any = None,
) -> tuple[DiffusionTerm, dict[str, Any]]:
    """The term and the args that `text_to_image` samples, of arguments as there; of `x_T` the shape counts."""
    if (uncond is None) != (guidance is None):
        raise ValueError("Guidance is of two predictions: give both uncond and guidance, or neither.")
    if isinstance(scheduler, Mapping):
        raise ValueError("scheduler is a configuration, of which the process has to be made: give aj.from_scheduler_config(scheduler).")
    name, module = denoiser(modules)
    if wrap is not None and "lora" not in params:
        raise ValueError("wrap reads params['lora'], which is missing: give the LoRA there, or merge it into the weights.")
    network = linen(module) if wrap is None else wrap(linen(module))
    args = {"params": params[name], **({} if wrap is None else {"lora": params["lora"]}), "cond": _condition(modules, cond, x_T)}
    if uncond is not None:
        network, args["uncond"] = cfg(network, guidance, rescale), _condition(modules, uncond, x_T)
    return DiffusionTerm(scheduler.network(network, steps), scheduler.process, scheduler.prediction), args
