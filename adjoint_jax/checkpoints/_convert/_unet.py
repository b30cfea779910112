"""The UNet of latent diffusion (LDM, Stable Diffusion 1, 2 and XL): its names and architecture in the words of diffusers' `UNet2DConditionModel`.

The original numbers its blocks through: `input_blocks.0` is the stem, each further one a residual block `.0` with a transformer `.1` or without, or a
`.0.op` that halves the sides and ends a level. `output_blocks` the same upwards, where a `.conv` (`.1`, or `.2` after a transformer) doubles them.
"""

import re
from typing import Any

from ._part import Part, State, count, need, renamed

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
TIME_IDS = 256  # the width of the sinusoids of each of SDXL's sizes and crops
# Heads cannot be seen in shapes: by the width of the text, 8 heads (SD 1), or heads of 64 channels (SD 2, SDXL, its refiner).
EIGHT_HEADS, XL = (768,), (2048, 1280)
HEADS_OF_64 = (1024, *XL)


def _places(state: State) -> tuple[dict[str, str], list[list[int]]]:
    """The place of each numbered block, and the numbers of the residual input blocks by level."""
    places, levels = {f"middle_block.{i}": place for i, place in MIDDLE.items()}, [[]]
    for i in range(1, count(state, r"input_blocks\.(\d+)\.")):
        level = len(levels) - 1
        if f"input_blocks.{i}.0.op.weight" in state:
            places[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            levels.append([])
        else:
            places[f"input_blocks.{i}.0"] = f"down_blocks.{level}.resnets.{len(levels[-1])}"
            places[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{len(levels[-1])}"
            levels[-1].append(i)
    level = j = 0
    for i in range(count(state, r"output_blocks\.(\d+)\.")):
        places[f"output_blocks.{i}.0"] = f"up_blocks.{level}.resnets.{j}"
        places[f"output_blocks.{i}.1"] = f"up_blocks.{level}.attentions.{j}"
        j += 1
        for last in (1, 2):
            if f"output_blocks.{i}.{last}.conv.weight" in state:
                places[f"output_blocks.{i}.{last}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
                level, j = level + 1, 0
    return places, levels


def _renaming(places: dict[str, str]) -> Any:
    block = re.compile(r"((?:input|output)_blocks\.\d+\.\d|middle_block\.\d)(\.op|\.conv)?\.(.+)")
    ends = re.compile(rf"({'|'.join(map(re.escape, ENDS))})\.(weight|bias)")
    resnet = re.compile(rf"({'|'.join(map(re.escape, RESNET))})\.(weight|bias)")

    def rename(name: str) -> str | None:
        if match := ends.fullmatch(name):
            return f"{ENDS[match[1]]}.{match[2]}"
        if not (match := block.fullmatch(name)):
            return None
        place, rest = places.get(match[1] + (match[2] or "")), match[3]
        if place is None or ".attentions." in place or match[2]:
            return None if place is None else f"{place}.{rest}"
        inner = resnet.fullmatch(rest)
        return f"{place}.{RESNET[inner[1]]}.{inner[2]}" if inner else None

    return rename


def _heads(channels: list[int], text: int, overrides: dict[str, Any]) -> Any:
    if "attention_head_dim" in overrides or "num_attention_heads" in overrides:
        return overrides.get("attention_head_dim", 8)
    if text in EIGHT_HEADS:
        return 8
    if text in HEADS_OF_64:
        return [width // 64 for width in channels]
    raise ValueError(
        f"How many heads attend to a text of width {text} cannot be seen in the tensors: give --config with "
        '{"unet": {"attention_head_dim": ...}}, where diffusers means the number of heads, one or one a level.'
    )


def convert(state: State, overrides: dict[str, Any], source: str) -> Part:
    """The network from the tensors below `model.diffusion_model.`; `overrides` are entries of its configuration."""
    places, levels = _places(state)
    stem, last = need(state, "input_blocks.0.0.weight", source), need(state, "out.2.weight", source)
    if not all(levels):
        raise ValueError(f"{source} has a level without residual blocks: it is of another architecture.")
    channels = [need(state, f"input_blocks.{blocks[0]}.0.out_layers.3.weight", source).shape[0] for blocks in levels]
    depths = [count(state, rf"input_blocks\.{blocks[0]}\.1\.transformer_blocks\.(\d+)\.") for blocks in levels]
    middle = count(state, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if not middle:
        raise ValueError(f"{source} has no transformer in its middle: only networks that attend to a text are known.")
    text = need(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", source).shape[1]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": stem.shape[1],
        "out_channels": last.shape[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": text,
        "attention_head_dim": _heads(channels, text, overrides),
        "use_linear_projection": need(state, "middle_block.1.proj_in.weight", source).ndim == 2,
    }
    if (depths[-1] or middle) != middle:
        raise ValueError(f"{source} has {middle} transformer blocks in its middle and {depths[-1]} before: it is of another architecture.")
    if max(*depths, middle) > 1:  # the middle has as many as the last level, whether that one attends or not
        config["transformer_layers_per_block"] = [depth or 1 for depth in depths[:-1]] + [middle]
    if "label_emb.0.0.weight" in state:
        if text not in XL and "addition_embed_type" not in overrides:
            raise ValueError(
                f"{source} takes a second embedding beside a text of width {text}: of such networks SDXL and its refiner alone are known."
            )
        width = need(state, "label_emb.0.0.weight", source).shape[1]
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": TIME_IDS, "projection_class_embeddings_input_dim": width}
    return Part(config | overrides, renamed(state, _renaming(places), source), source)
