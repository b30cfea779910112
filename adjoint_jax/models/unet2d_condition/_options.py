"""What the configuration of a `UNet2DCondition` says about its blocks and conditions, and whether it is known."""

from typing import Any

from ._embeddings import Shapes
from ._layers import ACTIVATIONS

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None)
KNOWN: dict[str, tuple[Any, ...]] = {
    "mid_block_type": MID_BLOCKS,
    "downsample_padding": (0, 1),
    "act_fn": tuple(ACTIVATIONS),
    "timestep_post_act": (None, *ACTIVATIONS),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": (None, "text", "text_time"),
    "cross_attention_norm": (None, "group_norm"),
}
NEEDS = {
    "text_proj": ("encoder_hid_dim",),
    "projection": ("projection_class_embeddings_input_dim",),
    "simple_projection": ("projection_class_embeddings_input_dim",),
    "text_time": ("projection_class_embeddings_input_dim", "addition_time_embed_dim"),
}


def level(unet: Any, field: str, i: int) -> Any:
    """The value of a field at a level, counted on the way down; one value is that of all levels."""
    value = getattr(unet, field)
    if not isinstance(value, (tuple, list)):
        return value
    if len(value) != len(unet.block_out_channels):
        raise ValueError(f"{field} has {len(value)} values for {len(unet.block_out_channels)} block_out_channels: give one, or one a level.")
    return value[i]


def text_dim(unet: Any) -> int | None:
    """Width of the tokens that are given; None where no block reads them."""
    last = len(unet.block_out_channels) - 1
    levels = {i for i, kind in enumerate(unet.down_block_types) if "CrossAttn" in kind}
    levels |= {last - i for i, kind in enumerate(unet.up_block_types) if "CrossAttn" in kind}
    levels |= {last} if "CrossAttn" in str(unet.mid_block_type) else set()
    dims = {level(unet, "cross_attention_dim", i) for i in levels}
    if len(dims) > 1 or (not dims and not isinstance(unet.cross_attention_dim, int)):
        raise ValueError(f"cross_attention_dim={unet.cross_attention_dim} is not one width for the one text that all levels read: give one.")
    if not levels and unet.addition_embed_type != "text":
        return None
    return unet.encoder_hid_dim or next(iter(dims), unet.cross_attention_dim)


def wanted(unet: Any, b: int) -> tuple[Shapes, Shapes]:
    """The conditions that a call of b images must have, and those that it may have."""
    text, projected = text_dim(unet), unet.projection_class_embeddings_input_dim
    required: dict[str, Any] = {} if text is None else {"encoder_hidden_states": (b, None, text)}
    optional: dict[str, Any] = {} if text is None else {"encoder_attention_mask": (b, None)}
    if unet.addition_embed_type == "text_time":
        required |= {"text_embeds": (b, None), "time_ids": (b, None)}
    if unet.class_embed_type is not None or unet.num_class_embeds is not None:
        required["class_labels"] = (b, projected) if "projection" in str(unet.class_embed_type) else None
    if unet.time_cond_proj_dim is not None:
        optional["timestep_cond"] = (b, unet.time_cond_proj_dim)
    return required, optional


def check(unet: Any, shape: tuple[int, ...]) -> None:
    """Raises where an option is not known, or x of this shape does not fit."""
    levels = len(unet.block_out_channels)
    for name, known in KNOWN.items():
        if getattr(unet, name) not in known:
            raise ValueError(f"{name}={getattr(unet, name)!r} is not known: use one of {list(known)}.")
    for kinds, known in ((unet.down_block_types, DOWN_BLOCKS), (unet.up_block_types, UP_BLOCKS)):
        if unknown := sorted(set(kinds) - set(known)):
            raise ValueError(f"UNet2DCondition does not know the block types {unknown}: it knows {list(known)}.")
        if len(kinds) != levels:
            raise ValueError(f"{len(kinds)} block types {list(kinds)} for {levels} block_out_channels: give one a level.")
    for option in (unet.hid_type, unet.class_embed_type, unet.addition_embed_type):
        if without := [name for name in NEEDS.get(option, ()) if getattr(unet, name) is None]:
            raise ValueError(f"The embedding {option!r} needs {', '.join(without)}: give it a width.")
    if unet.hid_type is not None and not isinstance(unet.cross_attention_dim, int):
        raise ValueError(f"cross_attention_dim={unet.cross_attention_dim} beside encoder_hid_dim: give one width, which the text is projected to.")
    # A stride of two without padding on all sides, and a mean of 2x2, need two pixels; the latter needs them in pairs.
    multiple = 2 ** (levels - 1)
    paired = any("Resnet" in kind or "Simple" in kind for kind in [*unet.down_block_types[:-1], *unet.up_block_types[:-1]])
    least = 1 if unet.downsample_padding else multiple
    if len(shape) != 4 or shape[3] != unet.in_channels or min(shape[1:3]) < least or (paired and any(side % multiple for side in shape[1:3])):
        sides = f"multiples of {multiple}" if paired else f"at least {least}"
        raise ValueError(f"UNet2DCondition takes x of shape [B, H, W, {unet.in_channels}], H and W {sides}; got {shape}.")


def _depths(value: Any, layers: int, field: str) -> tuple[int, ...]:
    depths = (value,) * layers if isinstance(value, int) else tuple(value)
    if len(depths) < layers or min(depths) < 1:
        raise ValueError(f"{field} gives {list(depths)} transformer blocks to a stage of {layers} attentions: give each at least one.")
    return depths[:layers]


def _attention(unet: Any, kind: str, i: int, only_cross: bool) -> dict[str, Any] | None:
    if "CrossAttn" not in kind:
        return None
    width, groups = level(unet, "attention_head_dim", i), unet.norm_num_groups
    if "Simple" in kind:
        return {"head_dim": width, "groups": groups, "only_cross": only_cross, "norm": unet.cross_attention_norm is not None}
    return {"heads": width, "groups": groups, "linear": unet.use_linear_projection, "only_cross": only_cross}


def stage(unet: Any, way: str, position: int, deterministic: bool) -> dict[str, Any]:
    """Options of the stage at a position on its way, "down", "up" or "mid"."""
    last = len(unet.block_out_channels) - 1
    i = {"down": position, "up": last - position, "mid": last}[way]
    kind = {"down": unet.down_block_types, "up": unet.up_block_types, "mid": (unet.mid_block_type,)}[way][position]
    resnet = {
        "features": unet.block_out_channels[i], "groups": unet.norm_num_groups, "eps": unet.norm_eps, "act": unet.act_fn,
        "scale_shift": unet.resnet_time_scale_shift == "scale_shift", "dropout": unet.dropout, "deterministic": deterministic,
    }  # fmt: skip
    resampled = "Resnet" in kind or "Simple" in kind
    if resampled:  # the original reads these options in these blocks alone
        resnet |= {"skip_time_act": unet.resnet_skip_time_act, "output_scale": unet.resnet_out_scale_factor}
    everywhere = unet.only_cross_attention if isinstance(unet.only_cross_attention, bool) else False
    if way == "mid":
        resnet["output_scale"] = unet.mid_block_scale_factor
        asked = unet.mid_block_only_cross_attention
        # The transformer of the middle always has self-attention.
        only_cross = resampled and (everywhere if asked is None else asked)
        layers, attentions = (2, 1) if "CrossAttn" in kind else (1, 0)
    else:
        only_cross = level(unet, "only_cross_attention", i)
        layers = attentions = level(unet, "layers_per_block", i) + (way == "up")
    options = {"layers": layers, "bare": layers - attentions, "resnet": resnet, "attention": _attention(unet, kind, i, only_cross)}
    if options["attention"] is not None and not resampled:
        reverse = unet.reverse_transformer_layers_per_block
        field = "transformer_layers_per_block" if way != "up" or reverse is None else "reverse_transformer_layers_per_block"
        at = level(unet, field, i if field.startswith("t") else position)
        options["depths"] = _depths(at, attentions, field)
    if way != "mid" and position < last:
        options["resize"] = f"resnet {way}" if resampled else way
    return {**options, "padding": unet.downsample_padding, "remat": unet.remat}
