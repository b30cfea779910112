"""Files of diffusers' `AutoencoderKL`, those of 2022 among them."""

from ...models import AutoencoderKL
from .._family import Family
from .._names import attention_names

FAMILY = Family(
    AutoencoderKL,
    "AutoencoderKL",
    ignored=("sample_size",),  # the size of diffusers' tiles
    lists=("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out"),
    tensors=attention_names,
)
