"""Files of transformers' `CLIPVisionModel`, `CLIPVisionModelWithProjection`, and of the whole `CLIPModel`."""

from typing import Any

from ...models import CLIP, CLIPVision
from .._family import Family
from . import clip_text
from .clip_text import FIXED, IGNORED, half, tower


def _family(class_name: str, with_projection: bool) -> Family:
    return Family(
        CLIPVision,
        class_name,
        fixed=FIXED,
        ignored=IGNORED,
        lists=("layers",),
        to_fields=half("vision_config"),
        tensors=tower("vision_model", r"text_model\..*|text_projection\.weight"),
        implied={"with_projection": with_projection},
        written={"architectures": [class_name], "model_type": "clip_vision_model"},
    )


FAMILIES = (_family("CLIPVisionModel", False), _family("CLIPVisionModelWithProjection", True))


def to_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A whole CLIP's configuration, each tower's with the `projection_dim` that counts."""
    config = {"projection_dim": 512, **config}
    towers = {name: half(name)({"text_config": {}, "vision_config": {}, **config}) for name in ("text_config", "vision_config")}
    return {key: value for key, value in config.items() if not key.endswith("_config_dict")} | towers


WHOLE = Family(
    CLIP,
    "CLIPModel",
    ignored=IGNORED,
    lists=("layers",),
    to_fields=to_fields,
    tensors=lambda named: [(name, tensor) for name, tensor in named if not name.endswith(".position_ids")],
    written={"architectures": ["CLIPModel"], "model_type": "clip"},
    parts={"text": clip_text.FAMILIES[1], "vision": FAMILIES[1]},
)
