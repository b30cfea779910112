"""The configurations of public checkpoints, as their files have them, are read: entries that mean nothing are no reason to refuse."""

import pytest

from adjoint_jax.checkpoints import _models

ATTEND, GO = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD1 = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": [ATTEND, ATTEND, ATTEND, "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": ["UpBlock2D", GO, GO, GO],
}  # fmt: skip
XL = SD1 | {
    "_diffusers_version": "0.19.0.dev0", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", ATTEND, ATTEND], "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None, "num_class_embeds": None,
    "only_cross_attention": False, "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [GO, GO, "UpBlock2D"], "upcast_attention": None, "use_linear_projection": True,
}  # fmt: skip
AVERAGED = {
    "decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.6666666666666666, "update_after_step": 0,
    "use_ema_warmup": False,
}  # fmt: skip
CLIP = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0,
    "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "torch_dtype": "float32", "transformers_version": "4.21.0.dev0",
    "vocab_size": 49408,
}  # fmt: skip
PUBLIC = {
    "stable diffusion 1.5": (SD1, {"norm_eps": 1e-5, "upcast_attention": False}),
    "sdxl base: a null for a flag": (XL, {"transformer_layers_per_block": (1, 2, 10), "upcast_attention": None}),
    "sdxl inpainting: its running average": (XL | AVERAGED | {"in_channels": 9}, {"in_channels": 9}),
    "clip of stable diffusion 1.5": (CLIP, {"eos_token_id": 2}),
    "clip of transformers 4.8": (CLIP | {"gradient_checkpointing": False}, {"hidden_act": "quick_gelu"}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_configurations_are_read(name):
    config, expected = PUBLIC[name]
    module = _models._build(config, name)
    assert {field: getattr(module, field) for field in expected} == expected
