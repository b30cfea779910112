"""UNet2DCondition gives what diffusers' UNet2DConditionModel gives, blocks and gradients too, over a table that has every option; and says what does not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from adjoint_jax.checkpoints import load_model
from adjoint_jax.models.unet2d_condition._layers import AddedAttention, ResnetBlock, Transformer
from adjoint_jax.models.unet2d_condition._stages import Stage

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
SIMPLE = {
    **TINY,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 4,
    "act_fn": "gelu",
}
TEXT = parity.draws(2, 5, 12, seed=1)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
# The options, the sides of the image, and the conditions.
CASES = {
    "sd1, inpainting, mask": (
        {**TINY, "in_channels": 9, "mid_block_scale_factor": 2.0, "norm_eps": 1e-2},
        (8, 8),
        {"encoder_hidden_states": TEXT, "encoder_attention_mask": MASK},
    ),
    "sd2, upscaler, odd sides": (
        {
            **TINY,
            "block_out_channels": (8, 12, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 3, 4),
            "use_linear_projection": True,
            "only_cross_attention": (True, True, False),
            "num_class_embeds": 5,
            "upcast_attention": True,
            "resnet_skip_time_act": True,  # of other blocks: neither changes these
            "resnet_out_scale_factor": 3.0,
        },
        (11, 6),
        {"encoder_hidden_states": TEXT, "class_labels": np.array([4, 1])},
    ),
    "sdxl, guidance embedded, heads that do not divide": (
        {
            **TINY,
            "attention_head_dim": (3, 4),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 10 + 3 * 6,
            "time_cond_proj_dim": 7,
            "act_fn": "mish",  # but the added embedding has a SiLU
        },
        (8, 4),
        {
            "encoder_hidden_states": TEXT,
            "text_embeds": parity.draws(2, 10, seed=2),
            "time_ids": np.array([[1024.0, 0.0, 512.5], [3.0, 8.0, 768.0]], np.float32),
            "timestep_cond": parity.draws(2, 7, seed=3),
        },
    ),
    "asymmetric, no middle, one-sided padding": (
        {
            **TINY,
            "layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, (1, 2)),
            "reverse_transformer_layers_per_block": ((2, 1, 1), 1),
            "mid_block_type": None,
            "downsample_padding": 0,
            "conv_in_kernel": 5,
            "conv_out_kernel": 1,
            "center_input_sample": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "encoder_hid_dim": 6,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 9,
            "timestep_post_act": "gelu",
            "act_fn": "relu",
        },
        (7, 5),
        {"encoder_hidden_states": parity.draws(2, 5, 6, seed=4), "class_labels": parity.draws(2, 9, seed=5)},
    ),
    "if, text pooled, mask": (
        {
            **SIMPLE,
            "cross_attention_dim": 32,
            "cross_attention_norm": "group_norm",
            "encoder_hid_dim": 12,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 3,
            "class_embed_type": "timestep",
            "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.5,
            "time_embedding_act_fn": "gelu",
            "norm_eps": 1e-2,  # but the attention's is 1e-5
        },
        (4, 4),
        {"encoder_hidden_states": TEXT, "encoder_attention_mask": MASK, "class_labels": np.array([250.0, 3.5], np.float32)},
    ),
    "unclip, only cross": (
        {
            **SIMPLE,
            "only_cross_attention": True,
            "act_fn": "silu",
            "class_embed_type": "identity",
            "time_embedding_dim": 20,
            "mid_block_scale_factor": 2.0,
        },
        (4, 4),
        {"encoder_hidden_states": TEXT, "class_labels": parity.draws(2, 20, seed=6)},
    ),
    "plain middle": (
        {
            **TINY,
            "mid_block_type": "UNetMidBlock2D",
            "mid_block_scale_factor": 2.0,
            "resnet_time_scale_shift": "scale_shift",
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 9,
        },
        (4, 4),
        {"encoder_hidden_states": TEXT, "class_labels": parity.draws(2, 9, seed=7)},
    ),
}
TIMES = np.array([3.25, 871.0], np.float32)


def original(options):
    return parity.randomise(parity.original("diffusers").UNet2DConditionModel(**options))


def of_torch(model, x, t, cond, cotangent):
    """The answer, the gradient in every float, and what the blocks give, by their names."""
    torch, blocks, hooks = parity.original("torch"), {}, []
    for name, block in model.named_modules():
        if re.search(r"(blocks|resnets|attentions)\.\d+$|mid_block$|samplers\.0$", name) and "transformer_blocks" not in name:
            keep = lambda _, __, y, name=name: blocks.__setitem__(name, y)  # noqa: E731
            hooks.append(block.register_forward_hook(keep))
    inputs = {"x": torch.from_numpy(parity.nchw(x).copy()), "t": torch.from_numpy(t), **{key: torch.from_numpy(value) for key, value in cond.items()}}
    floats = {key: value.requires_grad_() for key, value in inputs.items() if value.is_floating_point() and "mask" not in key}
    added = {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs}
    others = {key: inputs[key] for key in cond if key not in added}
    y = model(inputs["x"], inputs["t"], added_cond_kwargs=added, **others).sample
    gradients = torch.autograd.grad(y, list(floats.values()), torch.from_numpy(parity.nchw(cotangent).copy()))
    for hook in hooks:
        hook.remove()
    blocks = {name: parity.nhwc((y if torch.is_tensor(y) else y[0]).detach().numpy()) for name, y in blocks.items()}
    gradients = {name: gradient.numpy() for name, gradient in zip(floats, gradients, strict=True)}
    return parity.nhwc(y.detach().numpy()), gradients | {"x": parity.nhwc(gradients["x"])}, blocks


def of_flax(module, params, x, t, cond, cotangent, blocks=True):
    """The same of ours, in one program."""
    kept = (Stage, Transformer, AddedAttention, ResnetBlock)
    options = (
        {"mutable": "intermediates", "capture_intermediates": lambda part, name: name == "__call__" and isinstance(part, kept)}
        if blocks
        else {"mutable": []}
    )
    fixed = {key: jnp.asarray(value) for key, value in cond.items() if value.dtype.kind == "i" or "mask" in key}
    floats = {"x": jnp.asarray(x), "t": jnp.asarray(t), **{key: jnp.asarray(value) for key, value in cond.items() if key not in fixed}}

    def answer(floats, params, fixed):
        given = {**fixed, **{key: value for key, value in floats.items() if key not in ("x", "t")}}
        return module.apply({"params": params}, floats["x"], floats["t"], given, **options)

    def both(floats, params, fixed, cotangent):
        y, back, state = jax.vjp(lambda floats: answer(floats, params, fixed), floats, has_aux=True)
        return y, back(cotangent)[0], state

    y, gradients, state = jax.jit(both, compiler_options=parity.QUICK)(floats, params, fixed, jnp.asarray(cotangent))
    blocks = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [key.key for key in path if hasattr(key, "key") and isinstance(key.key, str) and key.key not in ("intermediates", "__call__")]
        blocks.setdefault(re.sub(r"(blocks|resnets|attentions|samplers)_(\d+)", r"\1.\2", ".".join(names)), leaf)
    return y, gradients, blocks


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(tmp_path, case):
    options, sides, cond = CASES[case]
    model = original(options)
    model.save_pretrained(tmp_path / "theirs")
    module, params = load_model(tmp_path / "theirs")
    x, cotangent = parity.draws(2, *sides, model.config.in_channels), parity.draws(2, *sides, 4, seed=9)
    theirs, their_gradients, their_blocks = of_torch(model, x, TIMES, cond, cotangent)
    y, gradients, blocks = of_flax(module, params, x, TIMES, cond, cotangent)
    assert y.dtype == jnp.float32
    print("value", parity.relative(y, theirs))
    assert parity.relative(y, theirs) < 1e-4
    assert sorted(gradients) == sorted(their_gradients)
    for name, gradient in gradients.items():
        print(name, parity.relative(gradient, their_gradients[name]))
        assert parity.relative(gradient, their_gradients[name]) < 1e-3, name
    assert set(their_blocks) == {name for name in blocks if name in their_blocks}
    print(len(blocks), max(parity.relative(blocks[name], block) for name, block in their_blocks.items()))
    for name, block in their_blocks.items():
        assert parity.relative(blocks[name], block) < 1e-5, name
