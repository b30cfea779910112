"""Files of transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`, also where they hold a whole `CLIPModel`."""

import re
from collections.abc import Callable
from typing import Any

from ...models import CLIPText
from .._family import Family, Named

# What transformers writes into every configuration and what its tokenizer or trainer alone reads.
IGNORED = (
    "add_cross_attention", "attention_mask", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache",
)  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {"attention_dropout": (0.0, None), "dropout": (0.0, None)}
BARE = re.compile(r"^(?=(embeddings|encoder|final_layer_norm|pre_layrnorm|post_layernorm)\.)")


def half(entry: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Of a whole CLIP's configuration that of one tower, `text_config` or `vision_config`: CLIP's own `projection_dim` counts, and
    `text_config_dict` or `vision_config_dict` where it is. Any other configuration stays as it is."""

    def to_fields(config: dict[str, Any]) -> dict[str, Any]:
        if entry not in config and f"{entry}_dict" not in config:
            return config
        own = config.get(f"{entry}_dict") or config.get(entry) or {}
        return {key: value for key, value in own.items() if key != "architectures"} | {"projection_dim": config.get("projection_dim", 512)}

    return to_fields


def tower(name: str, other: str) -> Callable[[Named], Named]:
    """The names that transformers 4 writes, and 5 reads; transformers 5 leaves `text_model.` out where there is no projection.

    Left out are the `other` tower of a whole CLIP and the temperature of its loss, and position numbers, which old files write down.
    """
    left = re.compile(rf"^({other}|logit_scale|{name}\.embeddings\.position_ids)$")

    def tensors(named: Named) -> Named:
        named = [(BARE.sub(f"{name}.", each), tensor) for each, tensor in named]
        return [(each, tensor) for each, tensor in named if not left.match(each)]

    return tensors


def _family(class_name: str, with_projection: bool) -> Family:
    return Family(
        CLIPText,
        class_name,
        fixed=FIXED,
        ignored=IGNORED,
        lists=("layers",),
        to_fields=half("text_config"),
        tensors=tower("text_model", r"vision_model\..*|visual_projection\.weight"),
        implied={"with_projection": with_projection},
        written={"architectures": [class_name], "model_type": "clip_text_model"},
    )


FAMILIES = (_family("CLIPTextModel", False), _family("CLIPTextModelWithProjection", True))
