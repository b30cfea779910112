"""Files of diffusers' `SD3Transformer2DModel`."""

from ...models import SD3Transformer
from .._family import Family

FAMILY = Family(SD3Transformer, "SD3Transformer2DModel", lists=("transformer_blocks", "to_out", "net"))
