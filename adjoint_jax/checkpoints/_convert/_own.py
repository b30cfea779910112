"""Files of a network that has a module here, under its own names: guided-diffusion's UNet and classifier, DiffAE, EDM. They lack a configuration."""

import re
from typing import Any

import numpy as np

from ...schedulers import _betas
from .. import _models, _values
from ._part import Converted, Part, State, count, need, under

AVERAGED, RAW = "ema_model.", "model."
HEADS = "num_heads, num_head_channels and use_new_attention_order"


def recognise(state: State) -> str | None:
    """The class of the network, by names that no other has."""
    if any(name.startswith(AVERAGED) for name in state):
        return "DiffAE"
    if any(name.startswith("input_blocks.") for name in state):
        return "ADM" if any(name.startswith("output_blocks.") for name in state) else "ADMClassifier"
    return None


def _weights(state: State, weights: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Of a training checkpoint the averaged weights or the raw ones, and the names of the rest."""
    if not any(name.startswith(AVERAGED) for name in state):
        return dict(state), ()
    prefix = AVERAGED if weights == "ema" else RAW
    return under(state, prefix), tuple(sorted(name for name in state if not name.startswith(prefix)))


def _adm(state: State, overrides: dict[str, Any], source: str) -> dict[str, Any]:
    """What the shapes of guided-diffusion's UNet tell. Its heads they do not."""
    if not {"num_heads", "num_head_channels"} & set(overrides):
        raise ValueError(
            f"{source} is a UNet of guided-diffusion, whose heads cannot be seen in its tensors: give --config with its {HEADS}, "
            'say {"num_head_channels": 64, "use_new_attention_order": true} for 64x64_diffusion.pt.'
        )
    stem, out = need(state, "input_blocks.0.0.weight", source), need(state, "out.2.weight", source)
    channels = need(state, "time_embed.0.weight", source).shape[1]  # the stem is as wide as the first level
    updown = {match[1] for name in state if (match := re.match(r"output_blocks\.(\d+)\.(?!0\.).*\.in_layers\.", name))}
    convolved = {match[1] for name in state if (match := re.match(r"output_blocks\.(\d+)\..*\.conv\.weight$", name))}
    levels, blocks = 1 + len(updown | convolved), count(state, r"input_blocks\.(\d+)\.")
    repeats = (blocks - levels) // levels
    if repeats < 1 or blocks != levels * (repeats + 1):
        raise ValueError(f"{source} has {blocks} input blocks for {levels} levels: it is no UNet of guided-diffusion.")
    first = [1 + level * (repeats + 1) for level in range(levels)]
    widths = [need(state, f"input_blocks.{i}.0.out_layers.3.weight", source).shape[0] for i in first]
    ratios = [width / channels for width in widths]
    classes = need(state, "label_emb.weight", source) if "label_emb.weight" in state else None
    return {
        "in_channels": stem.shape[1],
        "out_channels": out.shape[0],
        "model_channels": channels,
        "num_res_blocks": repeats,
        "channel_mult": [int(ratio) if ratio == int(ratio) else ratio for ratio in ratios],
        "attention_resolutions": [2**level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in state],
        "num_classes": None if classes is None else classes.shape[0],
        "use_scale_shift_norm": need(state, "input_blocks.1.0.emb_layers.1.weight", source).shape[0] == 2 * widths[0],
        "resblock_updown": bool(updown),
        "conv_resample": bool(updown or convolved),
    }


def convert(state: State, kind: str, *, weights: str, overrides: dict[str, Any], source: str) -> Converted:
    """The network, of the class `kind`, with the configuration that the user gives and, for an ADM, what the shapes tell.

    The entry "scheduler" of `overrides` is the contents of `scheduler_config.json`, DDPM's where it names no class.
    """
    scheduler = overrides.get("scheduler")
    overrides = {name: value for name, value in overrides.items() if name != "scheduler"}
    if scheduler is not None:
        if not isinstance(scheduler, dict):
            raise ValueError(f"The scheduler of {source} is {scheduler!r} where an object was expected: give the entries of scheduler_config.json.")
        scheduler = {"_class_name": "DDPMScheduler", **scheduler}
        _values.check_scheduler(scheduler, "The configuration given")
        _betas.process_from_config(scheduler)
    if not _models.known(kind):
        raise ValueError(f"{source} would be of class {kind!r}, which has no Flax module here: known are {', '.join(_models.names())}.")
    chosen, dropped = _weights(state, weights)
    told = _adm(chosen, overrides, source) if kind == "ADM" else {}
    if not told and not set(overrides) - {"_class_name"}:
        raise ValueError(f"{source} is a {kind}, whose architecture cannot be seen in its tensors: give its options as --config, a JSON file.")
    return Converted({"": Part({**told, **overrides, "_class_name": kind}, chosen, source)}, scheduler, dropped=dropped)
