"""Names and architectures of Stable Diffusion's single files: ours against diffusers' own functions, tensor for tensor, and read back by diffusers.

The originals are made from tiny networks of diffusers and transformers by rules written here, in the other direction than the code's.
"""

import json
import re

import numpy as np
import parity
import pytest
import safetensors.numpy

from adjoint_jax.checkpoints import _models, _tensors
from adjoint_jax.checkpoints._convert import _ldm, _text, _unet, _vae, convert

UNETS = {
    "sd1": {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    },
    "sd2": {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "layers_per_block": 1,
        "in_channels": 9,
    },
    "sdxl": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 20,
    },
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
CLIP = {
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "projection_dim": 6,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def weights(module):
    """Each of a torch module's tensors with values of its own."""
    return {name: parity.weight(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()}


def unet(kind):
    diffusers = parity.original("diffusers")
    return diffusers.UNet2DConditionModel(norm_num_groups=4, sample_size=8, **UNETS[kind])


def resnet(rest):
    return re.sub("|".join(RESNET), lambda match: RESNET[match[0]], rest, count=1)


def original_unet(tensors, layers, levels):
    """diffusers' names in LDM's: blocks numbered through."""
    ends = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    state, new = {}, ""
    for name, tensor in tensors.items():
        if head := next((head for head in ends if name.startswith(f"{head}.")), None):
            new = ends[head] + name.removeprefix(head)
        elif match := re.match(r"mid_block\.resnets\.(\d)\.(.*)", name):
            new = f"middle_block.{2 * int(match[1])}.{resnet(match[2])}"
        elif match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            way, level, what, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            number = level * (layers + 1) + j + 1 if way == "down" else level * (layers + 1) + j
            side = "input" if way == "down" else "output"
            if what == "downsamplers":
                new = f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            elif what == "upsamplers":
                attends = any(each.startswith(f"up_blocks.{level}.attentions") for each in tensors)
                new = f"output_blocks.{level * (layers + 1) + layers}.{1 + attends}.{rest}"
            else:
                new = f"{side}_blocks.{number}." + (f"0.{resnet(rest)}" if what == "resnets" else f"1.{rest}")
        state[new] = tensor
    assert len(state) == len(tensors)
    return state


def original_vae(tensors, levels):
    state = {}
    for name, tensor in tensors.items():
        new = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
        new = re.sub(r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block.", new)
        new = re.sub(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3sample.", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", new)
        for theirs, ours in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            new = new.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{ours}.")
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        state[new] = tensor[:, :, None, None] if "attn_1" in new and tensor.ndim == 2 else tensor
    return state


def original_open_clip(tensors):
    """transformers' names in OpenCLIP's, with q, k and v in one tensor."""
    state = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("text_model.")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding").replace("embeddings.token_embedding", "token_embedding")
        new = new.replace("final_layer_norm", "ln_final").replace("encoder.layers", "transformer.resblocks")
        new = re.sub(r"layer_norm(\d)", r"ln_\1", new).replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        new = new.replace("self_attn.out_proj", "attn.out_proj")
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(\w+)", new):
            parts = [tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            state[f"{match[1]}.attn.in_proj_{match[2]}"] = np.concatenate(parts)
        elif new == "text_projection.weight":
            state["text_projection"] = np.ascontiguousarray(tensor.T)
        elif "self_attn" not in new:
            state[new] = tensor
    return state


def text(projected=False, **more):
    transformers = parity.original("transformers")
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = kind(transformers.CLIPTextConfig(**{**CLIP, **more}))
    tensors = {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in weights(model).items()}
    return model, {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}


def theirs():
    parity.original("diffusers")
    from diffusers.loaders import single_file_utils

    return single_file_utils


def same(ours, theirs):
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], np.asarray(theirs[name])) for name in ours)


def torched(state, prefix=""):
    torch = parity.original("torch")
    return {prefix + name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in state.items()}


@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind):
    model = unet(kind)
    tensors = weights(model)
    state = original_unet(tensors, model.config.layers_per_block, len(model.config.block_out_channels))
    overrides = {name: model.config[name] for name in ("attention_head_dim", "norm_num_groups", "addition_embed_type")}
    part = _unet.convert(state, overrides, "the file")
    same(part.tensors, tensors)
    same(part.tensors, theirs().convert_ldm_unet_checkpoint(torched(state, "model.diffusion_model."), dict(model.config)))
    expected = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": False, **UNETS[kind]}
    assert {name: part.config.get(name) for name in expected} == expected


def test_vae():
    model = parity.original("diffusers").AutoencoderKL(**VAE)
    tensors = weights(model)
    state = original_vae(tensors, 2)
    assert state["decoder.mid.attn_1.q.weight"].ndim == 4
    part = _vae.convert(state, {"norm_num_groups": 4}, 0.18215, "the file")
    same(part.tensors, tensors)
    same(part.tensors, theirs().convert_ldm_vae_checkpoint(torched(state, "first_stage_model."), dict(model.config)))
    expected = {**VAE, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "scaling_factor": 0.18215}
    assert {name: part.config[name] for name in expected} == expected


@pytest.mark.parametrize("projected", [False, True])
def test_open_clip(projected):
    model, tensors = text(projected, projection_dim=12)
    part = _text.convert_open(original_open_clip(tensors), {}, False, "the file")
    same(part.tensors, tensors)
    same(part.tensors, theirs().convert_open_clip_checkpoint(model, torched(original_open_clip(tensors), "x."), prefix="x."))
    assert part.config["architectures"] == [type(model).__name__]
    expected = {name: value for name, value in {**CLIP, "projection_dim": 12}.items() if name != "num_attention_heads"}
    assert {name: part.config[name] for name in expected} == expected


def test_stable_diffusion_2_leaves_out_the_last_layer():
    _, tensors = text(True)
    part = _text.convert_open(original_open_clip(tensors), {}, True, "the file")
    same(part.tensors, {name: tensor for name, tensor in tensors.items() if "layers.1." not in name and name != "text_projection.weight"})
    assert part.config["num_hidden_layers"] == 1
    assert part.config["architectures"] == ["CLIPTextModel"]


def test_clip():
    _, tensors = text()
    state = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in tensors.items()}
    part = _text.convert({name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}, {}, "the file")
    same(part.tensors, tensors)
    same(part.tensors, theirs().convert_ldm_clip_checkpoint(torched(state)))
    assert part.config["hidden_act"] == "quick_gelu"


def single_file(kind):
    """A whole file of Stable Diffusion with tiny networks, and the tensors of each network."""
    model = unet(kind)
    tensors = {"unet": weights(model), "vae": weights(parity.original("diffusers").AutoencoderKL(**VAE))}
    state = original_unet(tensors["unet"], model.config.layers_per_block, len(model.config.block_out_channels))
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in original_vae(tensors["vae"], 2).items()}
    _, tensors["text_encoder"] = text()
    prefix = "conditioner.embedders.0" if kind == "sdxl" else "cond_stage_model"
    state |= {f"{prefix}.transformer.{name}": tensor for name, tensor in tensors["text_encoder"].items()}
    state[f"{prefix}.transformer.text_model.embeddings.position_ids"] = np.arange(5)[None]
    if kind == "sdxl":
        _, tensors["text_encoder_2"] = text(True)
        state |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in original_open_clip(tensors["text_encoder_2"]).items()}
        state["conditioner.embedders.1.model.logit_scale"] = np.zeros((), np.float32)
    else:
        state["alphas_cumprod"] = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype(np.float32)
        state["model_ema.num_updates"] = np.array(7)
        state["first_stage_model.loss.logvar"] = np.zeros((), np.float32)
    overrides = {"unet": {"attention_head_dim": UNETS[kind]["attention_head_dim"], "norm_num_groups": 4}, "vae": {"norm_num_groups": 4}}
    if kind == "sdxl":
        overrides["unet"]["addition_embed_type"] = "text_time"
        overrides["unet"]["addition_time_embed_dim"] = 2
    for name in ("text_encoder", "text_encoder_2") if kind == "sdxl" else ("text_encoder",):
        overrides[name] = {"num_attention_heads": 2}
    return state, tensors, overrides


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_whole_file_is_a_pipeline_that_diffusers_reads(tmp_path, kind):
    diffusers, transformers = parity.original("diffusers"), parity.original("transformers")
    state, tensors, overrides = single_file(kind)
    safetensors.numpy.save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, tmp_path / "x.safetensors")
    overrides = overrides | {"unet": overrides["unet"] | {"cross_attention_dim": 12}}
    convert(tmp_path / "x.safetensors", tmp_path / "pipe", config=overrides)
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    for name, expected in tensors.items():
        file = next((tmp_path / "pipe" / name).glob("*.safetensors"))
        assert file.name == ("model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors")
        same(dict(_tensors.read(file)), expected)
        model, info = classes[name].from_pretrained(tmp_path / "pipe" / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        bare = name.startswith("text") and not any(each.startswith("text_model.") for each in model.state_dict())
        found = {f"text_model.{each}" if bare else each: x for each, x in model.state_dict().items()}
        same({each: found[each] for each in expected}, expected)
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == ("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == [None, None]
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "pipe" / "scheduler")
    np.testing.assert_allclose(scheduler.alphas_cumprod[[0, -1]], [1 - 0.00085, 0.0047], rtol=1e-2)


def convertible(state, **options):
    return _ldm.convert(state, **{"weights": "ema", "prediction": None, "overrides": {}, "source": "the file", **options})


def scheduler(state, **options):
    return dict(convertible(state, **options).scheduler or {})


def test_averaged_weights_are_preferred():
    state, tensors, overrides = single_file("sd1")
    raw = {name: tensor for name, tensor in state.items() if name.startswith("model.diffusion_model.")}
    state |= {"model_ema." + name.removeprefix("model.").replace(".", ""): 2 * tensor for name, tensor in raw.items()}
    same(convertible(state, overrides=overrides).parts["unet"].tensors, {name: 2 * tensor for name, tensor in tensors["unet"].items()})
    same(convertible(state, overrides=overrides, weights="raw").parts["unet"].tensors, tensors["unet"])
    expected = theirs().convert_ldm_unet_checkpoint(torched(state), dict(unet("sd1").config), extract_ema=True)
    same(convertible(state, overrides=overrides).parts["unet"].tensors, expected)
    state.pop("model_ema.diffusion_modelout2bias")
    with pytest.raises(ValueError, match=r"averaged weights for some tensors, not for model_ema.diffusion_modelout2bias: give --weights raw"):
        convertible(state, overrides=overrides)


def test_each_misfit_is_one_sentence():
    state, _, overrides = single_file("sd1")
    unheaded = overrides | {"unet": {}}
    cases = [
        (state, {"overrides": unheaded}, "How many heads attend to a text of width 12 cannot be seen"),
        (state | {"control_model.x": np.zeros(1)}, {}, r"1 tensors that belong to no known network \(control_model.x\)"),
        (state | {"model.diffusion_model.odd.weight": np.zeros(1)}, {}, r"1 tensors that belong to no known place \(odd.weight\)"),
        (state | {"model.diffusion_model.input_blocks.1.0.odd.weight": np.zeros(1)}, {}, "belong to no known place"),
        (state | {"first_stage_model.odd": np.zeros(1)}, {}, r"no known place \(odd\)"),
        (state | {"alphas_cumprod": np.linspace(1, 0, 1000)}, {}, "another schedule of the noise"),
        (state | {"alphas_cumprod": np.ones(3)}, {}, "another schedule of the noise"),
        (state | {"model.diffusion_model.label_emb.0.0.weight": np.zeros((4, 4))}, {}, "takes a second embedding beside a text of width 12"),
        (state, {"prediction": "v"}, "prediction='v' is not known: use one of epsilon, v_prediction"),
        ({name: x for name, x in state.items() if "out.2.weight" not in name}, {}, "has no tensor out.2.weight"),
    ]
    for spoilt, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            convertible(spoilt, **{"overrides": overrides, **options})
        assert str(error.value).endswith((".", "}."))


def test_predictions():
    state, _, overrides = single_file("sd1")
    assert scheduler(state, overrides=overrides)["prediction_type"] == "epsilon"
    assert scheduler(state, overrides=overrides, prediction="v_prediction")["prediction_type"] == "v_prediction"
    flagged = scheduler(state | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}, overrides=overrides)
    assert flagged["prediction_type"] == "v_prediction"
    assert flagged["rescale_betas_zero_snr"] is True
    second = overrides | {"unet": overrides["unet"] | {"cross_attention_dim": 1024}}
    with pytest.raises(ValueError, match="give --prediction epsilon for those of 512 pixels"):
        convertible(state, overrides=second)
    assert scheduler(state, overrides=second, prediction="epsilon")["prediction_type"] == "epsilon"


# The shapes of the networks that were published, of which the architecture is told: heads are a rule's.
PUBLISHED = {
    "sd1": ([320, 640, 1280, 1280], [1, 1, 1, 0], 1, 768, False, {"attention_head_dim": 8}),
    "sd2": ([320, 640, 1280, 1280], [1, 1, 1, 0], 1, 1024, True, {"attention_head_dim": [5, 10, 20, 20]}),
    "sdxl": ([320, 640, 1280], [0, 2, 10], 10, 2048, True, {"attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10]}),
    "refiner": ([384, 768, 1536, 1536], [0, 4, 4, 0], 4, 1280, True, {"attention_head_dim": [6, 12, 24, 24]}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_architectures(kind):
    channels, depths, middle, width, linear, expected = PUBLISHED[kind]
    diffusers, torch = parity.original("diffusers"), parity.original("torch")
    config = {
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": width,
        "use_linear_projection": linear,
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [middle],
        "attention_head_dim": expected["attention_head_dim"],
    }
    if kind in ("sdxl", "refiner"):
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = 2816 if kind == "sdxl" else 2560
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    tensors = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    part = _unet.convert(original_unet(tensors, 2, len(channels)), {}, "the file")
    assert set(part.tensors) == set(tensors)
    assert {name: part.config[name] for name in expected} == expected
    again = {**config, "sample_size": None} | part.config
    assert {name: again[name] for name in config if name in part.config} == {name: config[name] for name in config if name in part.config}, (
        "the configuration is another"
    )
    assert not _models.known("UNet2DConditionModel") or _models.read(part.config, "x")
