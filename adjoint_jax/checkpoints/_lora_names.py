"""What the keys of a LoRA file mean: which part of a pipeline, which layer of it, which half.

`PART.LAYER.lora_A.weight`, `.lora_B.weight`                             peft, diffusers from 0.22; `base_model.model.LAYER...` of peft alone
`PART.LAYER.lora.down.weight`, `.lora_linear_layer.up.weight`            diffusers before
`PART.ATTENTION.processor.to_q_lora.down.weight`                         diffusers of 2023; `to_out_lora` is `to_out.0`
`lora_unet_LAYER.lora_down.weight`, `.lora_up.weight`, `.alpha`          kohya, `lora_te_`, `lora_te1_`, `lora_te2_`; LAYER's dots are underscores

For SDXL kohya writes the LAYER of the network as it was published (`input_blocks.4.1`), see `published_name`. A layer is found by looking it up
among all spellings of the network's own layers: underscores have lost which of them was a dot.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

DENOISERS = ("unet", "transformer")
PREFIXES = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"}
PARTS = (*DENOISERS, *dict.fromkeys(PREFIXES.values()))
REFUSED = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_w|hada_t": "LoHa",
    r"lokr_w|lokr_t": "LoKr",
    r"lora_mid": "LoCon in Tucker form",
    r"(?<![a-z])b?oft_|oft_[rR]": "OFT",
    r"lora_embedding_[AB]": "LoRA of an embedding",
    r"lora_(B|up)(\.default)?\.bias|(^|\.)diff_b$": "trained bias",
    r"(^|\.)diff$": "full difference of weights",
}
"""Adapters whose arithmetic is not W + scale up down."""
HALF = re.compile(
    r"(?:\.processor)?\.to_(?P<old>q|k|v|out)_lora\.(?:(?P<old_half>down|up)\.weight|alpha)$"
    r"|\.lora_(?P<peft>A|B)(?:\.default)?\.weight$"
    r"|\.lora(?:_linear_layer\.|_|\.)(?P<half>down|up)\.weight$"
    r"|\.alpha$"
)


class Key(NamedTuple):
    """A key of a file: `part` of the pipeline ("" where the key names none), the `layer` as spelt there, and "down", "up" or "alpha"."""

    part: str
    layer: str
    half: str


def refused(key: str) -> str | None:
    """The kind of adapter a key belongs to, where it is one that is not computed."""
    return next((kind for pattern, kind in REFUSED.items() if re.search(pattern, key)), None)


def parse(key: str, given: Iterable[str]) -> Key | None:
    """The meaning of a key, `given` being the parts that the caller has; None where it is no LoRA's key."""
    match = HALF.search(key)
    if match is None:
        return None
    old = {None: "", "out": ".to_out.0"}.get(match["old"], f".to_{match['old']}")
    half = match["half"] or match["old_half"] or {"A": "down", "B": "up", None: "alpha"}[match["peft"]]
    return Key(*_split(key[: match.start()] + old, given), half)


def _split(layer: str, given: Iterable[str]) -> tuple[str, str]:
    given = tuple(given)
    denoiser = next((part for part in given if part in DENOISERS), "unet")
    for prefix, part in (*PREFIXES.items(), ("lora_unet_", denoiser), ("diffusion_model.", denoiser), ("base_model.model.", "")):
        if layer.startswith(prefix):
            return part, layer.removeprefix(prefix)
    first, _, rest = layer.partition(".")
    return (first, rest) if first in (*PARTS, *given) else ("", layer)


def spellings(names: Iterable[str], layers_per_block: Any = None) -> dict[str, str]:
    """From every spelling of a network's layers to their names in its state dict, given in the `names`."""
    names = tuple(names)
    layers = layers_per_block if isinstance(layers_per_block, int) and any(name.startswith("mid_block.") for name in names) else None
    table: dict[str, str] = {}
    for name in names:
        for other in _aliases(name, names, layers):
            table.setdefault(other, name)
            table.setdefault(other.replace(".", "_"), name)
    return table | {name: name for name in names}


def _aliases(name: str, names: tuple[str, ...], layers: int | None) -> list[str]:
    found = [name]
    if re.search(r"\.(self_attn|mlp)\.", name):  # a text encoder, in whose files the tower's name comes and goes with transformers' versions
        found.append(name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}")
        found += [re.sub(r"\.(q|k|v)_proj$", r".to_\1", re.sub(r"\.out_proj$", ".to_out.0", other)) for other in found]
    if layers is not None:
        found.append(published_name(name, names, layers))
    return found


WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def published_name(name: str, names: tuple[str, ...], layers: int) -> str:
    """A layer of diffusers' UNet with `layers` blocks a level under the name it had where Stable Diffusion was published: flat lists of blocks."""
    if name in WHOLE:
        return WHOLE[name]
    match = re.match(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$", name)
    if match is None:
        return name
    way, block, kind, place, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    if way is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if kind == "upsamplers":  # comes after the attention, where there is one
        attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in names)
        return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
    inner = 1 if kind == "attentions" else 0
    return f"input_blocks.{1 + first + place}.{inner}.{rest}" if way == "down" else f"output_blocks.{first + place}.{inner}.{rest}"


def setting(config: Mapping[str, Any], layer: str) -> tuple[float | None, bool]:
    """(alpha, whether it is divided by sqrt(rank)) that peft's configuration gives to a layer; alpha None where it says nothing."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(alpha), bool(config.get("use_rslora"))
    alpha = config.get("lora_alpha")
    return None if alpha is None else float(alpha), bool(config.get("use_rslora"))
