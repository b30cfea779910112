"""The autoencoder of latent diffusion in the words of diffusers' `AutoencoderKL`. Its decoder counts levels from the finest on."""

from typing import Any

import numpy as np

from ._part import Part, State, count, need, renamed, replaced

RULES = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
ATTENTION = ".mid_block.attentions.0.to_"


def convert(state: State, overrides: dict[str, Any], scaling: float, source: str) -> Part:
    """The network from the tensors below `first_stage_model.`; `scaling` is what latents are multiplied by."""
    levels = count(state, r"encoder\.down\.(\d+)\.")
    rules = [*RULES, (r"(?<=^decoder\.up_blocks\.)\d+", lambda match: str(levels - 1 - int(match[0])))]

    def rename(name: str) -> str | None:
        known = name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
        return replaced(name, rules) if known else None

    def flat(name: str, tensor: np.ndarray) -> np.ndarray:  # attention by 1x1 convolutions is by dense layers today
        return tensor.reshape(tensor.shape[:2]) if ATTENTION in name and tensor.ndim == 4 else tensor

    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": need(state, "encoder.conv_in.weight", source).shape[1],
        "out_channels": need(state, "decoder.conv_out.weight", source).shape[0],
        "latent_channels": need(state, "decoder.conv_in.weight", source).shape[1],
        "block_out_channels": [need(state, f"encoder.down.{i}.block.0.conv2.weight", source).shape[0] for i in range(levels)],
        "layers_per_block": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": scaling,
    }
    tensors = {name: flat(name, tensor) for name, tensor in renamed(state, rename, source).items()}
    return Part(config | overrides, tensors, source)
