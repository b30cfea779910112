"""Names of tensors and blocks that several families share, as older files spell them."""

import re
from typing import Any

from ._family import Named

# Attention in the files of 2022; `proj_attn` became the first entry of a list.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def attention_names(named: Named) -> Named:
    """The tensors of a diffusers file of any year under the names that today's files give them."""
    pattern = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
    return [(pattern.sub(lambda match: OLD[match[1]], name), tensor) for name, tensor in named]


def block_names(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a UNet of any year; the first releases called the blocks UNetResDownBlock2D and so on."""
    kinds = {key: [kind.removeprefix("UNetRes") for kind in config[key]] for key in ("down_block_types", "up_block_types") if key in config}
    return config | kinds
