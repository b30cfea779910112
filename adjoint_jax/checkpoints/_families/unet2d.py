"""Files of diffusers' `UNet2DModel`, those of 2022 among them."""

from ...models import UNet2D
from .._family import Family, Named
from .._names import attention_names, block_names


def tensors(named: Named) -> Named:
    """The first releases wrote the frequencies of a Fourier embedding of time twice."""
    names = {name for name, _ in named}
    return attention_names([pair for pair in named if pair[0] != "time_proj.W" or "time_proj.weight" not in names])


FAMILY = Family(
    UNet2D,
    "UNet2DModel",
    ignored=("sample_size",),
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out"),
    to_fields=block_names,
    tensors=tensors,
)
