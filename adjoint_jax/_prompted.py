"""From a checkpoint to what `guide.Sampler` samples: one network told a class, or a text-to-image pipeline told a text, whose latents are decoded.

The gradient of a metric of the image in the encoding c of the text is that of `pipelines`, equation (1), through decoder and sampler.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import checkpoints, pipelines
from ._options import Sample
from .checkpoints import _files as layout, _pipeline
from .guide import Given, Sampler, Variables
from .networks import linen
from .schedulers import from_scheduler_config
from .terms import DiffusionTerm


class Opened(NamedTuple):
    """A checkpoint: the sampler of a grid and a solver on it, its process, weights, embeddings of the condition and of the null one (None for an
    unconditional network), and the shape `[H, W, C]` of its states."""

    sampler: Callable[[Any, Any], Sampler]
    process: Any
    params: Any
    embedding: Any
    null: Any
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LatentSampler(Sampler):
    """A sampler of a pipeline's latents, whose images are decoded. `modules` and `Given.params` are by the names of the components."""

    modules: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None

    def _problem(self, given: Given, variables: Variables) -> tuple[DiffusionTerm, Any]:
        null, scale = (given.null, given.scale) if self.guided else (None, None)
        arguments = (self.modules, given.params, variables["x_T"], variables["embedding"], null)
        return pipelines.problem(*arguments, scheduler=self.scheduler, steps=len(self.grid) - 1, guidance=scale)

    def images(self, given: Given, states: Any) -> Any:
        return pipelines.decode(self.modules, given.params, states)

    def like(self, x_T: Any) -> jax.ShapeDtypeStruct:
        vae, (batch, height, width, _) = self.modules["vae"], x_T.shape
        return jax.ShapeDtypeStruct((batch, vae.factor * height, vae.factor * width, vae.out_channels), x_T.dtype)


def takes_text(path: Path) -> bool:
    """Whether a folder holds a text-to-image pipeline."""
    return layout.regular(path / layout.PIPELINE) and any(name.startswith("text_encoder") for name in _pipeline.classes(path))


def refuse_text(options: Sample, path: Path) -> None:
    """Raises ValueError for texts that are told to a checkpoint which takes none; the metric clip has a use for a prompt."""
    measured = getattr(options, "metric", None) == "clip" and getattr(options, "target_prompt", None) is None
    if options.negative is not None or (options.prompt is not None and not measured):
        name = "prompt" if options.negative is None else "negative"
        raise ValueError(f"--{name} is a text for a text-to-image pipeline, and {path} is none: leave it out, or give another --checkpoint.")


def opened(options: Sample, path: Path) -> Opened:
    """A Stable Diffusion 1, 2 or XL that is told the prompt."""
    if options.prompt is None:
        raise ValueError(f"{path} is a text-to-image pipeline: give --prompt.")
    if options.label is not None:
        raise ValueError(f"{path} is a text-to-image pipeline and has no classes: leave --label out.")
    if options.negative is not None and options.guidance == 1:
        raise ValueError("--negative counts under guidance alone: give --guidance, 7.5 is usual.")
    listed = _pipeline.classes(path)
    if "unet" not in listed or "vae" not in listed or "text_encoder_3" in listed:
        raise ValueError(f"{path} has {', '.join(sorted(listed))}: texts are encoded here for Stable Diffusion 1, 2 and XL, a unet and a vae.")
    pipeline = checkpoints.load_pipeline(options.checkpoint or path)
    modules, params = pipelines.split(pipeline.components)
    embedding, null = _encoded(options, pipeline, modules, params)
    unet, vae = modules["unet"], modules["vae"]
    if unet.in_channels != unet.out_channels:
        raise ValueError(f"The unet of {path} maps {unet.in_channels} channels to {unet.out_channels}: an image besides the text is not given here.")
    height, width = _size(options, path, vae.factor)
    scheduler = from_scheduler_config(pipeline.scheduler, published=False)
    kept = ("unet", "vae")
    modules, params = ({name: each[name] for name in kept} for each in (modules, params))

    def sampler(grid: Any, solver: Any) -> LatentSampler:
        network = linen(modules["unet"])
        return LatentSampler(network, scheduler.process, scheduler.prediction, grid, solver, options.guidance != 1, modules, scheduler)

    return Opened(sampler, scheduler.process, params, embedding, null, (height, width, unet.in_channels))


def _encoded(options: Sample, pipeline: Any, modules: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[Any, Any]:
    """The encodings of the prompt, without its axis of the batch, and of the negative prompt, with it; zeros where SDXL asks for them."""
    tokens = {}
    for encoder in (name for name in pipelines.ENCODERS if name in modules):
        name = encoder.replace("text_encoder", "tokenizer")
        if name not in pipeline.tokenizers:
            raise ValueError(f"{options.checkpoint} has no folder {name}, which the {encoder} needs: fetch it again.")
        tokens[encoder] = pipelines.tokenize(pipeline.tokenizers[name], [options.prompt or "", options.negative or ""])
    both = pipelines.encode_prompt(modules, params, tokens)
    embedding, null = jax.tree.map(lambda each: each[0], both), jax.tree.map(lambda each: each[1:], both)
    zeros = options.negative is None and pipeline.config.get("force_zeros_for_empty_prompt", False)
    return embedding, jax.tree.map(jnp.zeros_like, null) if zeros else null


def _size(options: Sample, path: Path, factor: int) -> list[int]:
    """Of the latents; the option is that of the images."""
    if options.size is not None and options.size % factor:
        raise ValueError(f"--size must be a multiple of {factor}, the pixels of a latent; got {options.size}.")
    size = options.size // factor if options.size else layout.read_json(layout.folders(path)[0] / layout.CONFIG).get("sample_size")
    if size is None:
        raise ValueError(f"{path} does not say how large its images are: give --size in pixels.")
    return np.broadcast_to(size, 2).tolist()
