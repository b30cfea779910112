"""UNet2DCondition gives what diffusers' UNet2DConditionModel gives, its blocks and gradients too, over a table that has every option."""

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from adjoint_jax.checkpoints import _models, _rules, load, load_model, save
from adjoint_jax.checkpoints._families import unet2d_condition
from adjoint_jax.models import UNet2DCondition
from adjoint_jax.models.unet2d_condition._layers import AddedAttention, Resize, ResnetBlock, Transformer
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
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "only_cross_attention": (False, True),
            "num_class_embeds": 5,
            "upcast_attention": True,
            "resnet_skip_time_act": True,  # of other blocks: neither changes these
            "resnet_out_scale_factor": 3.0,
        },
        (7, 6),
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
            "class_embed_type": "simple_projection",
            "time_cond_proj_dim": 7,
            "act_fn": "mish",  # but the added embedding has a SiLU
        },
        (8, 4),
        {
            "encoder_hidden_states": TEXT,
            "text_embeds": parity.draws(2, 10, seed=2),
            "time_ids": np.array([[1024.0, 0.0, 512.5], [3.0, 8.0, 768.0]], np.float32),
            "timestep_cond": parity.draws(2, 7, seed=3),
            "class_labels": parity.draws(2, 28, seed=8),
        },
    ),
    "asymmetric, plain middle, one-sided padding": (
        {
            **TINY,
            "layers_per_block": (2, 1),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, (1,)),
            "reverse_transformer_layers_per_block": ((2, 1), 1),
            "mid_block_type": "UNetMidBlock2D",
            "mid_block_scale_factor": 2.0,
            "resnet_time_scale_shift": "scale_shift",
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
}
REMAT = ("sdxl, guidance embedded, heads that do not divide", "if, text pooled, mask")
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


def of_flax(module, params, x, t, cond, cotangent, gradient=True):
    """The same of ours, in one program."""
    kept = (Stage, Transformer, AddedAttention, ResnetBlock, Resize)
    chosen = lambda part, name: name == "__call__" and isinstance(part, kept)  # noqa: E731
    fixed = {key: jnp.asarray(value) for key, value in cond.items() if value.dtype.kind == "i" or "mask" in key}
    floats = {"x": jnp.asarray(x), "t": jnp.asarray(t), **{key: jnp.asarray(value) for key, value in cond.items() if key not in fixed}}

    def answer(floats, params, fixed):
        given = {**fixed, **{key: value for key, value in floats.items() if key not in ("x", "t")}}
        options = {"mutable": "intermediates", "capture_intermediates": not module.remat and chosen}
        return module.apply({"params": params}, floats["x"], floats["t"], given, **options)

    def both(floats, params, fixed, cotangent):
        if not gradient:
            y, state = answer(floats, params, fixed)
            return y, {}, state
        y, back, state = jax.vjp(lambda floats: answer(floats, params, fixed), floats, has_aux=True)
        return y, back(cotangent)[0], state

    y, gradients, state = jax.jit(both, compiler_options=parity.QUICK)(floats, params, fixed, jnp.asarray(cotangent))
    blocks = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str) and key.key not in ("intermediates", "__call__")]
        blocks.setdefault(_rules.torch_name((*names, ""), unet2d_condition.FAMILY.lists).removesuffix("."), leaf)
    return y, gradients, blocks


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_and_back(tmp_path, case):
    options, sides, cond = CASES[case]
    model = original(options)
    model.save_pretrained(tmp_path / "theirs")
    module, params = load_model(tmp_path / "theirs")
    x, cotangent = parity.draws(2, *sides, model.config.in_channels), parity.draws(2, *sides, 4, seed=9)
    theirs, their_gradients, their_blocks = of_torch(model, x, TIMES, cond, cotangent)
    y, gradients, blocks = of_flax(module.clone(remat=case in REMAT), params, x, TIMES, cond, cotangent, case in REMAT)
    assert y.dtype == jnp.float32
    assert parity.relative(y, theirs) < 1e-4
    assert set(gradients) == (set(their_gradients) if case in REMAT else set())
    for name, gradient in gradients.items():
        assert parity.relative(gradient, their_gradients[name]) < 1e-3, name
    assert set(their_blocks) <= {*blocks, *(their_blocks if case in REMAT else ())}
    for name, block in blocks.items():
        assert parity.relative(block, their_blocks[name]) < 1e-5, name

    save(tmp_path / "ours", module, params)
    again = parity.original("diffusers").UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert {key: value for key, value in again.config.items() if not key.startswith("_")} == dict(strip(model.config))
    assert parity.relative(of_torch(again, x, TIMES, cond, cotangent)[0], theirs) < 1e-6


def strip(config):
    """A configuration as JSON gives it back: lists, and no private entries."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_reads_half_precision_files(tmp_path, dtype):
    torch, variant = parity.original("torch"), {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    model = original(TINY).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "unet", variant=variant)
    network, params, *_ = load(tmp_path, dtype=jnp.dtype(dtype))
    written = _rules.to_torch(unet2d_condition.FAMILY, shapes(SMALL), params, "the file")
    assert all(np.array_equal(written[name].astype(np.float32), tensor) for name, tensor in parity.tensors(model))
    if dtype == "float16":
        return
    args = {"params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), "cond": {"encoder_hidden_states": jnp.asarray(TEXT)}}
    assert jax.eval_shape(network, jnp.zeros((2, 8, 8, 4), jnp.float32), jnp.asarray(0.5, jnp.float32), args).shape == (2, 8, 8, 4)


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **XL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True, "upcast_attention": True}
PUBLIC = {
    "Stable Diffusion 1.5": ({"cross_attention_dim": 768}, 859520964),
    "Stable Diffusion 2.1": (SD2, 865910724),
    "Stable Diffusion XL": (XL, 2567463684),
    "its refiner": (REFINER, 2259526660),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if i % 2 else []) for i, name in enumerate(PUBLIC)])
def test_public_networks_have_their_tensors(name):
    options, count = PUBLIC[name]
    table = _rules.rules(shapes(UNet2DCondition(**options)), unet2d_condition.FAMILY.lists)
    assert sum(int(np.prod(rule.shape)) for rule in table.values()) == count
    diffusers = parity.original("diffusers")
    with parity.original("torch").device("meta"):
        model = diffusers.UNet2DConditionModel(**options)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {name: rule.shape for name, rule in table.items()}


shapes: Any = functools.lru_cache(_models.shapes)


def out(module, x=(2, 8, 8, 4), t=(), cond=(2, 5, 12), dtype=jnp.float32):
    """The abstract answer of a module; conditions are shapes of floats, or abstract arrays. What does not fit is said when it is made, too."""
    abstract = lambda leaf: jax.ShapeDtypeStruct(leaf, jnp.float32) if isinstance(leaf, tuple) else leaf  # noqa: E731
    cond = jax.tree.map(abstract, cond, is_leaf=lambda leaf: isinstance(leaf, tuple))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes(module))
    apply = lambda params, *inputs: module.apply({"params": params}, *inputs)  # noqa: E731
    return jax.eval_shape(apply, params, jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(t, jnp.float32), cond)


SMALL = UNet2DCondition(**TINY)
BARE = SMALL.clone(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
ADDED = SMALL.clone(addition_embed_type="text_time", projection_class_embeddings_input_dim=28, addition_time_embed_dim=6)
LABELLED = SMALL.clone(num_class_embeds=5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_keeps_the_dtype(dtype):
    cond = {"encoder_hidden_states": (2, 5, 12), "text_embeds": (2, 10), "time_ids": (2, 3), "encoder_attention_mask": (2, 5)}
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(ADDED, t=(2,), cond=cond, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("label", [jax.ShapeDtypeStruct((), jnp.int32), (32,)])
def test_labels_are_numbers_or_embeddings(label):
    assert out(LABELLED, cond={"encoder_hidden_states": (2, 5, 12), "class_labels": label}).shape == (2, 8, 8, 4)


def test_a_network_without_text_has_no_conditions():
    assert out(BARE, cond=None).shape == (2, 8, 8, 4)


def test_remat_recomputes_each_block_and_has_the_same_parameters():
    module = SMALL.clone(remat=True)
    assert shapes(module) == shapes(SMALL)
    jaxpr = jax.make_jaxpr(lambda params, *inputs: module.apply({"params": params}, *inputs))(shapes(SMALL), *module.dummy_inputs)
    assert sum("policy" in equation.params for equation in jaxpr.eqns) == 8 + 4  # residual blocks, transformers


def text(**cond):
    return {"encoder_hidden_states": (2, 5, 12), **cond}


ERRORS = {
    "channels": (SMALL, {"x": (2, 8, 8, 3)}, r"\[B, H, W, 4\], H and W at least 1; got \(2, 8, 8, 3\)"),
    "one pixel": (SMALL.clone(downsample_padding=0), {"x": (2, 1, 8, 4)}, "at least 2"),
    "odd": (UNet2DCondition(**SIMPLE), {"x": (2, 7, 8, 4)}, "multiples of 2"),
    "block": (SMALL.clone(down_block_types=("KDownBlock2D", "DownBlock2D")), {}, "KDownBlock2D"),
    "middle": (SMALL.clone(mid_block_type="UNetMidBlock3D"), {}, "mid_block_type='UNetMidBlock3D'"),
    "levels": (SMALL.clone(up_block_types=("UpBlock2D",)), {}, "1 block types"),
    "values": (SMALL.clone(attention_head_dim=(2, 2, 2)), {}, "attention_head_dim has 3 values for 2"),
    "depths": (SMALL.clone(transformer_layers_per_block=((), 1)), {}, r"gives \[\] transformer blocks to a stage of 1"),
    "heads": (SMALL.clone(attention_head_dim=9), {}, "attention_head_dim=9 is a number of heads here, from 1 to the 8"),
    "width of a head": (UNet2DCondition(**{**SIMPLE, "attention_head_dim": 3}), {}, "attention_head_dim=3 does not divide the 16"),
    "widths of the text": (SMALL.clone(cross_attention_dim=(12, 13)), {}, "not one width"),
    "projection to widths": (SMALL.clone(cross_attention_dim=(12, 12), encoder_hid_dim=7), {}, "give one width, which"),
    "missing width": (SMALL.clone(class_embed_type="projection"), {}, "'projection' needs projection_class_embeddings_input_dim"),
    "no text": (SMALL, {"cond": None}, "encoder_hidden_states is missing"),
    "text nobody reads": (BARE, {}, "are nothing, and encoder_hidden_states is unknown"),
    "unknown": (SMALL, {"cond": text(image_embeds=(2, 4))}, r"encoder_attention_mask \(optional\), and image_embeds is unknown"),
    "no labels": (LABELLED, {}, "class_labels is missing"),
    "labels nobody reads": (SMALL, {"cond": text(class_labels=(2,))}, "class_labels is unknown"),
    "width": (SMALL, {"cond": (2, 5, 13)}, r"\(2, 5, 13\), and \[2, any, 12\]"),
    "batch": (SMALL, {"cond": (1, 5, 12)}, r"\(1, 5, 12\), and \[2, any, 12\]"),
    "mask": (SMALL, {"cond": text(encoder_attention_mask=(2, 4))}, "4 tokens of encoder_attention_mask for 5"),
    "label": (LABELLED, {"cond": text(class_labels=(2, 31))}, r"float32 \(2, 31\)"),
    "labels": (LABELLED, {"cond": text(class_labels=jax.ShapeDtypeStruct((3,), jnp.int32))}, "class_labels are"),
    "sizes": (ADDED, {"cond": text(text_embeds=(2, 10), time_ids=(2, 4))}, "34 columns"),
    "time": (SMALL, {"t": (3,)}, r"t has the shape \(3,\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, **arguments)


@pytest.mark.parametrize(
    "entry",
    [{"dual_cross_attention": True}, {"num_attention_heads": 8}, {"time_embedding_type": "fourier"}, {"attention_type": "gated"}]
    + [{"class_embeddings_concat": True}, {"mid_block_scale_factors": 1}],
    ids=str,
)
def test_refuses_what_it_does_not_compute(entry):
    with pytest.raises(ValueError, match=next(iter(entry))):
        _models.read({"_class_name": "UNet2DConditionModel", **TINY, **entry}, "config.json")


def test_reads_configurations_of_2022():
    kinds = {
        key: [f"UNetRes{kind}" if kind in ("DownBlock2D", "UpBlock2D") else kind for kind in TINY[key]]
        for key in ("down_block_types", "up_block_types")
    }
    module, _ = _models.read(json.loads(json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": 64, **TINY, **kinds})), "config.json")
    assert module == SMALL
