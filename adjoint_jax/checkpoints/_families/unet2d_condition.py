"""Files of diffusers' `UNet2DConditionModel`."""

from typing import Any

from ...models import UNet2DCondition
from .._family import Family

FIXED: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (None,),  # refused by diffusers too: there, attention_head_dim is the number of heads
    "dual_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def to_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The first releases called the blocks UNetResDownBlock2D and so on; a list may hold lists."""
    kinds = {key: [kind.removeprefix("UNetRes") for kind in config[key]] for key in ("down_block_types", "up_block_types") if key in config}
    return {key: _tuples(value) for key, value in (config | kinds).items()}


FAMILY = Family(
    UNet2DCondition,
    "UNet2DConditionModel",
    fixed=FIXED,
    ignored=("sample_size",),
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers", "to_out", "net"),
    to_fields=to_fields,
)
