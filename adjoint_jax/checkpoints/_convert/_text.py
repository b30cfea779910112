"""The text encoders of latent diffusion in the words of transformers' CLIP: CLIP's own, and OpenCLIP's, which has q, k and v in one tensor."""

import re
from typing import Any

import numpy as np

from ._part import Part, State, count, need, replaced

HEAD = 64  # channels of a head, in every CLIP that was published
OPEN = (
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
LAYERS = r"text_model\.encoder\.layers\.(\d+)\."


def _config(tensors: State, source: str, projected: bool, act: str) -> dict[str, Any]:
    words = need(tensors, "text_model.embeddings.token_embedding.weight", source)
    width = words.shape[1]
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words.shape[0],
        "hidden_size": width,
        "intermediate_size": need(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", source).shape[0],
        "num_hidden_layers": count(tensors, LAYERS),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": need(tensors, "text_model.embeddings.position_embedding.weight", source).shape[0],
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "projection_dim": need(tensors, "text_projection.weight", source).shape[0] if projected else width,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as OpenAI's files have it: the pooled state is that of the highest token
        "pad_token_id": 1,
    }


def convert(state: State, overrides: dict[str, Any], source: str) -> Part:
    """The network from the tensors below `cond_stage_model.transformer.`, which have transformers' names, in old merges without `text_model.`."""
    tensors = {name if name.startswith("text_model.") else f"text_model.{name}": tensor for name, tensor in state.items()}
    return Part(_config(tensors, source, False, "quick_gelu") | overrides, tensors, source)


def convert_open(state: State, overrides: dict[str, Any], penultimate: bool, source: str) -> Part:
    """The network from the tensors of an OpenCLIP.

    Args:
        penultimate: leave out the last layer and the projection: Stable Diffusion 2 was trained on the state before them. SDXL keeps them.
    """
    layers = count(state, r"transformer\.resblocks\.(\d+)\.")
    width = need(state, "token_embedding.weight", source).shape[1]
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        last = name.startswith(f"transformer.resblocks.{layers - 1}.")
        if penultimate and (last or name == "text_projection"):
            continue
        new = replaced(name, OPEN)
        if name == "text_projection":
            tensors["text_projection.weight"] = tensor.T
        elif match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new):
            for i, one in enumerate("qkv"):
                tensors[f"{match[1]}.self_attn.{one}_proj.{match[2]}"] = tensor[i * width : (i + 1) * width]
        else:
            tensors[new] = tensor
    projected = "text_projection.weight" in tensors
    return Part(_config(tensors, source, projected, "gelu") | overrides, tensors, source)
