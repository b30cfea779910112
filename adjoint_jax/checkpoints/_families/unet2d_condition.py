"""Files of diffusers' `UNet2DConditionModel`."""

from typing import Any

from ...models import UNet2DCondition
from .._family import Family
from .._names import block_names

FIXED: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (None,),  # refused by diffusers too: there, attention_head_dim is the number of heads
    "dual_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
}


FAMILY = Family(
    UNet2DCondition,
    "UNet2DConditionModel",
    fixed=FIXED,
    ignored=("sample_size",),
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers", "to_out", "net"),
    to_fields=block_names,
)
