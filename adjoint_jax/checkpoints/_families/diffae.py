"""Files of diffae's autoencoders. A configuration holds the entries of its `BeatGANsAutoencConfig` under the class name given here."""

from typing import Any

from ...models import DiffAE
from .._family import Family, Named

FIXED: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "num_classes": (None,),
    "num_heads_upsample": (-1,),
    "resnet_two_cond": (True,),
    "enc_pool": ("adaptivenonzero",),
    "latent_net_conf": (None,),
}
IGNORED = ("time_embed_channels", "use_checkpoint", "attn_checkpoint", "enc_grad_checkpoint", "resnet_use_zero_module")
AVERAGED = "ema_model."


def tensors(named: Named) -> Named:
    """Of a training checkpoint, which holds the raw weights, the averaged ones and statistics of the latents, the averaged weights."""
    averaged = [(name.removeprefix(AVERAGED), tensor) for name, tensor in named if name.startswith(AVERAGED)]
    return averaged or named


FAMILY = Family(
    DiffAE,
    "DiffAE",
    fixed=FIXED,
    ignored=IGNORED,
    lists=("time_embed", "input_blocks", "output_blocks", "in_layers", "emb_layers", "cond_emb_layers", "out_layers", "out"),
    tensors=tensors,
)
