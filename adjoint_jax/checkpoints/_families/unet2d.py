"""Files of diffusers' `UNet2DModel`, those of 2022 among them."""

from typing import Any

from ...models import UNet2D
from .._family import Family, Named
from .._names import attention_names


def to_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The first releases called the blocks UNetResDownBlock2D and so on."""
    kinds = {key: [kind.removeprefix("UNetRes") for kind in config[key]] for key in ("down_block_types", "up_block_types") if key in config}
    return config | kinds


def tensors(named: Named) -> Named:
    """The first releases wrote the frequencies of a Fourier embedding of time twice."""
    names = {name for name, _ in named}
    return attention_names([pair for pair in named if pair[0] != "time_proj.W" or "time_proj.weight" not in names])


FAMILY = Family(
    UNet2D,
    "UNet2DModel",
    ignored=("sample_size",),
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out"),
    to_fields=to_fields,
    tensors=tensors,
)
