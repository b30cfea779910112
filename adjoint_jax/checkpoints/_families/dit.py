"""Files of diffusers' `DiTTransformer2DModel`, those that call it `Transformer2DModel` among them."""

from typing import Any

from ...models import DiT
from ...networks import linen
from .._adapters import FirstChannels
from .._family import Family

FIXED: dict[str, tuple[Any, ...]] = {"norm_type": ("ada_norm_zero",)}
# What `Transformer2DModel` could be besides.
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "cross_attention_dim": (None,),
    "num_vector_embeds": (None,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "attention_type": ("default",),
    "caption_channels": (None,),
    "interpolation_scale": (None, 1),
    "use_additional_conditions": (None, False),
}


def of_transformer(config: dict[str, Any]) -> dict[str, Any]:
    """Such a file is a DiT's only where it says so."""
    return {"norm_type": "layer_norm"} | config


FAMILY = Family(
    DiT,
    "DiTTransformer2DModel",
    fixed=FIXED,
    # Group norms belong to another input; the original's attention is fused and in its input's precision whatever `upcast_attention` says.
    ignored=("norm_num_groups", "upcast_attention"),
    lists=("transformer_blocks", "to_out", "net"),
    adapt=lambda module: FirstChannels(linen(module), module.in_channels),
)
OLD = FAMILY._replace(
    class_name="Transformer2DModel",
    fixed=FIXED | ELSEWHERE,
    ignored=(*FAMILY.ignored, "use_linear_projection"),
    to_fields=of_transformer,
)
