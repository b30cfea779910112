"""Files of diffusers' `UNet2DModel`, those of 2022 among them."""

from typing import Any

from ...models import UNet2D
from .._family import Family
from .._names import attention_names

FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "time_embedding_type": ("positional",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "mid_block_type": ("UNetMidBlock2D",),
}


def to_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The first releases called the blocks UNetResDownBlock2D and so on; the time embedding's width is 4 C_0 unless it is learned."""
    kinds = {key: [kind.removeprefix("UNetRes") for kind in config[key]] for key in ("down_block_types", "up_block_types") if key in config}
    derived = {"time_embedding_dim": (None, 4 * config["block_out_channels"][0])} if "block_out_channels" in config else {}
    same = [key for key, values in derived.items() if config.get(key) in values]
    return {key: value for key, value in (config | kinds).items() if key not in same}


FAMILY = Family(
    UNet2D,
    "UNet2DModel",
    fixed=FIXED,
    ignored=("sample_size", "num_train_timesteps"),  # the latter sizes the learned time embedding alone
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out"),
    to_fields=to_fields,
    tensors=attention_names,
)
