"""Files of guided-diffusion's networks. A configuration holds the arguments of its constructors under the class names given here."""

from typing import Any

import flax.linen as nn

from ...models import ADM, ADMClassifier
from ...networks import linen
from .._adapters import FirstChannels
from .._family import Family

FIXED: dict[str, tuple[Any, ...]] = {"dims": (2,)}
IGNORED = ("use_checkpoint", "use_fp16")
LISTS = ("time_embed", "input_blocks", "output_blocks", "in_layers", "emb_layers", "out_layers", "out")


def adapt(module: nn.Module) -> Any:
    """The noise alone, where a learned variance comes after it."""
    assert isinstance(module, ADM)
    if module.out_channels not in (module.in_channels, 2 * module.in_channels):
        raise ValueError(
            f"An ADM from {module.in_channels} to {module.out_channels} channels predicts no noise of x: use load_model and wrap the module."
        )
    network = linen(module)
    return network if module.out_channels == module.in_channels else FirstChannels(network, module.in_channels)


UNET = Family(ADM, "ADM", fixed=FIXED, ignored=IGNORED, lists=LISTS, adapt=adapt)
CLASSIFIER = Family(ADMClassifier, "ADMClassifier", fixed=FIXED, ignored=(*IGNORED, "num_heads_upsample"), lists=LISTS)
