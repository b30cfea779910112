"""LoRA files of every naming give the weights that peft and diffusers give; merging is its formula, differentiable in everything.

diffusers' converters and peft run in the same test; what neither reads (a file's naming under a UNet2D) is checked against the formula.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy

import adjoint_jax as aj
from adjoint_jax.checkpoints import _lora_names, _models, _rules
from adjoint_jax.checkpoints.lora import Factors, init_lora, load_lora, merge, save_lora, with_lora
from adjoint_jax.models import CLIPText, UNet2D, UNet2DCondition

OPTIONS = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
UNET = UNet2D(**OPTIONS)
SHAPES = jax.eval_shape(UNET.init, jax.random.key(0), *UNET.dummy_inputs)["params"]
Q, CONV, SHORT = "mid_block.attentions.0.to_q", "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"
PLACES = {
    Q: "mid_block/attentions_0/to_q/kernel",
    CONV: "down_blocks_1/resnets_0/conv1/kernel",
    SHORT: "down_blocks_1/resnets_0/conv_shortcut/kernel",
}
WEIGHTS = {Q: (16, 16), CONV: (16, 8, 3, 3), SHORT: (16, 8, 1, 1)}  # torch's shapes


@pytest.fixture(scope="module", autouse=True)
def _shapes_once():
    """The shapes of a network are traced once for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_models, "shapes", functools.cache(_models.shapes))
        yield


def halves(layer, rank):
    """down and up in torch's layout."""
    shape = WEIGHTS[layer]
    return parity.draws(rank, *shape[1:], seed=rank), parity.draws(shape[0], rank, *(1 for _ in shape[2:]), seed=rank + 1)


def difference(layer, down, up):
    """up down in Flax's layout, by a formula of its own."""
    flat = np.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1)).reshape(WEIGHTS[layer])
    return flat.T if flat.ndim == 2 else flat.transpose(2, 3, 1, 0)


def zeros():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), SHAPES)


def write(path, tensors, metadata=None):
    safetensors.numpy.save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata=metadata)
    return path


def at(tree, place):
    for key in place.split("/"):
        tree = tree[key]
    return np.asarray(tree)


NAMINGS = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "adapter name": ("unet.{}.lora_A.default.weight", "unet.{}.lora_B.default.weight"),
    "peft alone": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "no part": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "linear layer": ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "kohya, dots": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_the_formula(tmp_path, naming):
    tensors, pairs = {}, {Q: halves(Q, 2), CONV: halves(CONV, 3), SHORT: halves(SHORT, 4)}
    for layer, pair in pairs.items():
        spelt = layer.replace(".", "_") if naming == "kohya" else layer
        tensors |= {key.format(spelt): half for key, half in zip(NAMINGS[naming], pair, strict=True)}
    alpha = 1.0
    if "kohya" in naming:
        alpha = 0.5
        tensors |= {key.replace("lora_down.weight", "alpha"): np.float32(0.5 * len(x)) for key, x in tensors.items() if "lora_down" in key}
    lora = load_lora(write(tmp_path / "x.safetensors", tensors), {"unet": UNET})["unet"]
    merged = jax.jit(merge)(zeros(), lora, 0.7)
    assert set(lora) == set(PLACES.values())
    for layer, pair in pairs.items():
        assert parity.relative(at(merged, PLACES[layer]), 0.7 * alpha * difference(layer, *pair)) < 1e-6
    assert sum(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(merged)) == 3


def test_old_attention_names():
    """`processor.to_out_lora` is `to_out.0`; text encoders called theirs like the denoiser."""
    table = _lora_names.spellings(["text_model.encoder.layers.0.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc1"])
    cases = {
        "unet.mid.attn1.processor.to_out_lora.up.weight": ("unet", "mid.attn1.to_out.0", "up"),
        "mid.attn1.processor.to_q_lora.down.weight": ("", "mid.attn1.to_q", "down"),
        "mid.attn1.processor.to_k_lora.alpha": ("", "mid.attn1.to_k", "alpha"),
        "lora_te2_encoder_layers_0_mlp_fc1.alpha": ("text_encoder_2", "encoder_layers_0_mlp_fc1", "alpha"),
    }
    for key, expected in cases.items():
        assert tuple(_lora_names.parse(key, ("unet",))) == expected
    for spelling in ("text_model.encoder.layers.0.self_attn.to_out.0", "encoder_layers_0_self_attn_out_proj", "encoder.layers.0.self_attn.to_out.0"):
        assert table[spelling] == "text_model.encoder.layers.0.self_attn.out_proj"


@pytest.mark.parametrize("layers", [1, 2])
def test_published_names_are_those_of_diffusers(layers):
    """Each layer's published name, read by diffusers' own converter, is the layer again; nothing is mapped onto another's name."""
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers

    options = {
        "block_out_channels": (8, 8, 8),
        "layers_per_block": layers,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**options)
    names = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    keys = {name: f"lora_unet_{_lora_names.published_name(name, tuple(names), layers).replace('.', '_')}" for name in names}
    assert len(set(keys.values())) == len(names) > 80
    for name, key in keys.items():
        state = {f"{key}.{end}.weight": name for end in ("lora_down", "lora_up")}
        converted, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, unet.config))
        # diffusers cannot read these two back from such files: its rules for blocks catch the digits of their names first.
        found = {_lora_names.parse(key, ("unet",)).layer for key in converted}
        table = _lora_names.spellings(names, layers)
        assert {table.get(other, other) for other in found} == {name}
        assert table[key.removeprefix("lora_unet_")] == name


def test_merge_is_differentiable_in_everything():
    lora = {
        PLACES[layer]: Factors(*(jnp.asarray(x) for x in (parity.draws(*window, 4, 3), parity.draws(3, 5, seed=1))), jnp.float32(0.5))
        for layer, window in ((Q, ()), (CONV, (3, 3)))
    }
    params = {}
    for place in lora:
        shape = (3, 3, 4, 5) if "conv1" in place else (4, 5)
        params[place] = parity.draws(*shape, seed=2)
    from flax.traverse_util import flatten_dict, unflatten_dict

    tree = unflatten_dict({tuple(place.split("/")): jnp.asarray(x) for place, x in params.items()})
    weigh = unflatten_dict({tuple(place.split("/")): jnp.asarray(parity.draws(*x.shape, seed=3)) for place, x in params.items()})

    def loss(params, lora, scale):
        merged = merge(params, lora, scale)
        return sum(jnp.sum(c * x) for c, x in zip(jax.tree.leaves(weigh), jax.tree.leaves(merged), strict=True))

    of_params, of_lora, of_scale = jax.jit(jax.grad(loss, (0, 1, 2)))(tree, lora, jnp.float32(1.5))
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected), of_params, weigh)
    total = 0.0
    for place, c in {"/".join(path): np.asarray(x, np.float64) for path, x in flatten_dict(weigh).items()}.items():
        down, up, scale = (np.asarray(x, np.float64) for x in lora[place])
        np.testing.assert_allclose(of_lora[place].down, 1.5 * scale * c @ up.T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(of_lora[place].up, 1.5 * scale * down.reshape(-1, 3).T @ c.reshape(-1, 5), rtol=1e-5, atol=1e-5)
        part = np.sum(c * (down @ up))
        np.testing.assert_allclose(of_lora[place].scale, 1.5 * part, rtol=1e-5)
        total += scale * part
    np.testing.assert_allclose(of_scale, total, rtol=1e-5)


def test_kept_apart_is_merged_before_the_sampler():
    """`with_lora` inside a sampler and `merge` before it: the same sample, the same gradient in the LoRA and its scale."""
    params = {"dense": {"kernel": jnp.asarray(0.3 * parity.draws(4, 4))}}
    lora = {"dense/kernel": Factors(*(jnp.asarray(0.3 * parity.draws(*shape, seed=5)) for shape in ((4, 2), (2, 4))), jnp.float32(0.5))}
    process, x_T = aj.VPLinear(), jnp.asarray(parity.draws(2, 4))
    grid = aj.grids.uniform(process, 3)

    def network(x, t, args):
        return jnp.tanh(x @ args["params"]["dense"]["kernel"])

    def kept(lora, scale):
        args = {"params": params, "lora": lora, "lora_scale": scale}
        return jnp.sum(aj.sample(aj.DiffusionTerm(with_lora(network), process), x_T, args, grid=grid) ** 2)

    def once(lora, scale):
        return jnp.sum(aj.sample(aj.DiffusionTerm(network, process), x_T, {"params": merge(params, lora, scale)}, grid=grid) ** 2)

    results = [jax.jit(jax.value_and_grad(f, (0, 1)))(lora, jnp.float32(0.8)) for f in (kept, once)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *results)
    with pytest.raises(ValueError, match="args\\['lora'\\]"):
        with_lora(network)(x_T, 0.5, {"params": params})


def test_a_new_lora_makes_no_difference_and_is_written(tmp_path):
    lora = init_lora(SHAPES, r"to_q/|conv1/", 2, jax.random.key(0), alpha=4.0)
    assert lora[PLACES[Q]].down.shape == (16, 2)
    assert lora[PLACES[CONV]].down.shape == (3, 3, 8, 2)
    assert float(lora[PLACES[Q]].scale) == 2
    assert init_lora(SHAPES, r"to_q/", 2, jax.random.key(0))[PLACES[Q]].down.tolist() == lora[PLACES[Q]].down.tolist()
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(jax.jit(merge)(zeros(), lora)))
    trained = {place: factors._replace(up=factors.up + 1) for place, factors in lora.items()}
    save_lora(tmp_path, {"unet": trained}, {"unet": UNET})
    read = load_lora(tmp_path, {"unet": UNET})["unet"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *(jax.jit(merge)(zeros(), one) for one in (trained, read)))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), zeros())
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(merge, half, trained))} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(FileExistsError, match="path of a new file"):
        save_lora(tmp_path, {"unet": trained}, {"unet": UNET})
    with pytest.raises(ValueError, match="which the network does not have"):
        save_lora(tmp_path / "y.safetensors", {"unet": {"a/kernel": trained[PLACES[Q]]}}, {"unet": UNET})
    with pytest.raises(ValueError, match="found 0 kernels for targets='to_x'"):
        init_lora(SHAPES, "to_x", 2, jax.random.key(0))
    with pytest.raises(ValueError, match="is no regular expression"):
        init_lora(SHAPES, "(", 2, jax.random.key(0))
    with pytest.raises(ValueError, match="a LoRA of unet, and modules has transformer: give its network"):
        save_lora(tmp_path / "y.safetensors", {"unet": trained}, {"transformer": UNET})


@pytest.mark.parametrize("rooted", [False, True])
def test_peft_both_ways(tmp_path, rooted):
    """A folder that peft wrote, with ranks, alphas and their patterns, gives the network that peft runs; ours gives peft's weights."""
    torch, diffusers, peft = (parity.original(name) for name in ("torch", "diffusers", "peft"))
    unet = parity.randomise(diffusers.UNet2DModel(**OPTIONS))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_out.0", "conv1", "conv_shortcut", "time_emb_proj", "conv_in"],
        rank_pattern={"conv1": 2, "mid_block.attentions.0.to_q": 4},
        alpha_pattern={r"attentions\.\d\.to_q": 7, "conv_in": 1},
        use_rslora=rooted,
    )
    model = parity.randomise(peft.get_peft_model(unet, config))
    base = dict(parity.tensors(unet))
    model.save_pretrained(tmp_path / "theirs")
    params = _from_state({name.replace(".base_layer", ""): x for name, x in base.items() if "lora_" not in name})
    lora = load_lora(tmp_path / "theirs", {"unet": UNET})["unet"]
    if not rooted:
        x, t = jnp.asarray(parity.draws(2, 8, 8, 1)), jnp.asarray([3.0, 700.0], jnp.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(parity.nchw(x).copy()), torch.from_numpy(np.array(t))).sample.numpy()
        ours = jax.jit(lambda params, lora: UNET.apply({"params": merge(params, lora)}, x, t), compiler_options=parity.QUICK)(params, lora)
        assert parity.relative(parity.nchw(ours), expected) < 1e-4
    model.merge_and_unload()
    save_lora(tmp_path / "ours.safetensors", {"unet": lora}, {"unet": UNET})
    again = load_lora(tmp_path / "ours.safetensors", {"unet": UNET})["unet"]
    merged = jax.jit(merge, compiler_options=parity.QUICK)(params, again)
    theirs = dict(parity.tensors(unet))
    assert len(again) == sum("lora_A" in name for name in base) > 0
    for place in again:
        found = at(merged, place)
        assert parity.relative(found.T if found.ndim == 2 else found.transpose(3, 2, 0, 1), theirs[_torch(place)]) < 1e-6


def _torch(place):
    return _rules.torch_name(tuple(place.split("/")), _models.family_of(UNET).lists)


def _from_state(state):
    return _rules.to_flax(_models.family_of(UNET), SHAPES, list(state.items()), "the test", jnp.float32)


CONDITIONAL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def conditional():
    """diffusers' UNet2DConditionModel, randomly initialised once, and its layers by name."""
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    unet = parity.randomise(diffusers.UNet2DConditionModel(**CONDITIONAL))
    kinds = torch.nn.Linear | torch.nn.Conv2d
    return unet, {name: tuple(module.weight.shape) for name, module in unet.named_modules() if isinstance(module, kinds)}


def deltas(unet):
    """The corrections that diffusers' model has loaded, by layer, in torch's layout."""
    found = {name: module for name, module in unet.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: module.get_delta_weight(module.active_adapters[0]).detach().numpy() for name, module in found.items()}


def pairs(shapes, alphas):
    """down, up and alpha of every layer of a network, of ranks from 1 to 3, in torch's layout.

    One alpha for all attention, as is usual: where a kohya file has several, diffusers 0.42 gives attention the most frequent, and only warns.
    """
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        rank = 1 + i % 3
        up = parity.draws(shape[0], rank, *(1 for _ in shape[2:]), seed=i)
        made[name] = (parity.draws(rank, *shape[1:], seed=i), up, np.float32(1 + ("resnets" not in name) if alphas else rank))
    return made


def spelt(naming, made, names):
    for name, (down, up, alpha) in made.items():
        if naming == "peft":
            yield from ((f"unet.{name}.lora_A.weight", down), (f"unet.{name}.lora_B.weight", up))
        elif naming == "processors":
            old = re.sub(r"(attn\d)\.to_(q|k|v|out)(\.0)?$", r"\1.processor.to_\2_lora", name)
            old = old if old != name else f"{name}.lora"
            yield from ((f"unet.{old}.down.weight", down), (f"unet.{old}.up.weight", up))
        else:
            key = _lora_names.published_name(name, names, 1) if naming == "kohya published" else name
            key = f"lora_unet_{key.replace('.', '_')}"
            yield from ((f"{key}.lora_down.weight", down), (f"{key}.lora_up.weight", up), (f"{key}.alpha", alpha))


@pytest.mark.parametrize("naming", ["peft", "processors", "kohya", "kohya published"])
def test_text_conditional_unet_both_ways(tmp_path, conditional, naming):
    """All layers of a UNet2DConditionModel, loaded by diffusers and by us from one file, have one correction; so from the file that we write."""
    parity.original("peft")
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    unet, shapes = conditional
    module = UNet2DCondition(**CONDITIONAL)
    tensors = dict(spelt(naming, pairs(shapes, "kohya" in naming), tuple(shapes)))
    file = write(tmp_path / "x.safetensors", tensors)
    lora = load_lora(file, {"unet": module})["unet"]
    flat = jax.jit(lambda lora: {place: f.scale * jnp.tensordot(f.down, f.up, 1) for place, f in lora.items()}, compiler_options=parity.QUICK)(lora)
    ours = {place: x.T if x.ndim == 2 else x.transpose(3, 2, 0, 1) for place, x in jax.tree.map(np.asarray, flat).items()}
    lists = _models.family_of(module).lists
    ours = {_rules.torch_name(tuple(place.split("/")), lists).removesuffix(".weight"): x for place, x in ours.items()}
    save_lora(tmp_path / "ours.safetensors", {"unet": lora}, {"unet": module})
    for path in (file, tmp_path / "ours.safetensors"):
        state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(str(path), unet_config=unet.config)
        unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
        theirs = deltas(unet)
        unet.unload_lora()
        assert set(ours) == set(theirs) == set(shapes)
        worst = max(parity.relative(ours[name], theirs[name]) for name in ours)
        print(naming, path.name, worst)
        assert worst < 1e-5


TEXT = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}


@pytest.mark.parametrize("naming", ["kohya", "of 2023", "linear layers"])
def test_text_encoder_both_ways(tmp_path, naming):
    """The text encoder's half of a file, with transformers' names of any version: what diffusers loads, from the file and from the one we write."""
    transformers, _ = parity.original("transformers"), parity.original("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    names = {f"layers.0.self_attn.{name}_proj": (8, 8) for name in ("q", "k", "v", "out")} | {
        "layers.0.mlp.fc1": (12, 8),
        "layers.0.mlp.fc2": (8, 12),
    }
    made, tensors = pairs(names, True), {}
    for name, (down, up, alpha) in made.items():
        full = f"text_model.encoder.{name}"
        if naming == "kohya":
            key = f"lora_te_{full.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
        else:
            old = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", full) if naming == "of 2023" else f"{full}.lora_linear_layer"
            old = old if old != full else f"{full}.lora_linear_layer"
            tensors |= {f"text_encoder.{old}.down.weight": down, f"text_encoder.{old}.up.weight": up}
    file = write(tmp_path / "x.safetensors", tensors)
    modules = {"text_encoder": CLIPText(**TEXT)}
    lora = load_lora(file, modules)
    save_lora(tmp_path / "ours.safetensors", lora, modules)
    assert len(lora["text_encoder"]) == len(names)
    for path in (file, tmp_path / "ours.safetensors"):
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=encoder)
        theirs = deltas(encoder)
        assert len(theirs) == len(names)
        for name, delta in theirs.items():
            factors = lora["text_encoder"][f"text_model/{name.replace('layers.0', 'layers_0').replace('.', '/')}/kernel"]
            down, up, scale = map(np.asarray, factors)
            assert parity.relative((scale * down @ up).T, delta) < 1e-6, name


GOOD = {"unet." + Q + ".lora_A.weight": halves(Q, 2)[0], "unet." + Q + ".lora_B.weight": halves(Q, 2)[1]}
ERRORS = {
    "unknown target": ({"unet.mid_block.nothing.lora_A.weight": np.ones((2, 16))}, {}, "mid_block.nothing.* names no layer of the unet"),
    "shape": (GOOD | {f"unet.{Q}.lora_A.weight": np.ones((2, 8))}, {}, r"to_q \(16, 16\) has down \(2, 8\), up \(16, 2\)"),
    "ranks": (GOOD | {f"unet.{Q}.lora_A.weight": np.ones((3, 16))}, {}, r"has down \(3, 16\), up \(16, 2\)"),
    "alpha": (GOOD | {f"unet.{Q}.alpha": np.ones(2)}, {}, r"alpha \(2,\)"),
    "half": ({key: x for key, x in GOOD.items() if "_A" in key}, {}, "has no up half"),
    "not finite": (GOOD | {f"unet.{Q}.lora_A.weight": np.full((2, 16), np.nan)}, {}, "lora_A.weight is not finite"),
    "twice": (GOOD | {f"lora_unet_{Q.replace('.', '_')}.lora_up.weight": halves(Q, 2)[1]}, {}, "given twice"),
    "part": (GOOD | {"lora_te1_a.lora_up.weight": np.ones((2, 2))}, {}, "1 tensors are for 'text_encoder'"),
    "dora": (GOOD | {f"unet.{Q}.lora_magnitude_vector": np.ones(16)}, {}, "not computed here .DoRA"),
    "kohya dora": (GOOD | {"lora_unet_x.dora_scale": np.ones(16)}, {}, "DoRA"),
    "loha": ({"lora_unet_x.hada_w1_a": np.ones((2, 2))}, {}, "LoHa"),
    "lokr": ({"lora_unet_x.lokr_w1": np.ones((2, 2))}, {}, "LoKr"),
    "tucker": (GOOD | {"lora_unet_x.lora_mid.weight": np.ones((2, 2, 3, 3))}, {}, "Tucker"),
    "bias": (GOOD | {f"unet.{Q}.lora_B.bias": np.ones(16)}, {}, "trained bias"),
    "no lora": (GOOD | {f"unet.{Q}.weight": np.ones((16, 16))}, {}, "is not a key of a LoRA"),
    "option": (GOOD, {"unet.use_dora": True, "unet.r": 2}, "use_dora=True"),
    "kind": (GOOD, {"peft_type": "IA3"}, "peft_type='IA3'"),
    "other beginning": (GOOD, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(tmp_path, case):
    tensors, config, message = ERRORS[case]
    file = write(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ValueError, match=message) as error:
        load_lora(file, {"unet": UNET})
    assert "check that it was made for these networks" in str(error.value)


def test_all_problems_come_together(tmp_path):
    tensors = ERRORS["half"][0] | ERRORS["loha"][0] | ERRORS["unknown target"][0] | {"text_encoder.a.lora_A.weight": np.ones((2, 2))}
    with pytest.raises(ValueError, match="does not fit") as error:
        load_lora(write(tmp_path / "x.safetensors", tensors), {"unet": UNET})
    assert all(re.search(word, str(error.value)) for word in ("no up half", "LoHa", "names no layer", "text_encoder"))
    tensors = GOOD | {"text_encoder.a.lora_A.weight": np.ones((2, 2))}
    assert set(load_lora(write(tmp_path / "x.safetensors", tensors), {"unet": UNET}, drop=["text_encoder"])["unet"]) == {PLACES[Q]}


def test_files_and_parameters_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        load_lora(tmp_path / "x.safetensors", {"unet": UNET})
    (tmp_path / "y.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_lora(tmp_path / "y.safetensors", {"unet": UNET})
    for odd in ({"lora_alpha": "four"}, {"unet.alpha_pattern": {"(": 1}}, {"alpha_pattern": {"a": float("nan")}}):
        write(tmp_path / "z.safetensors", GOOD, {"lora_adapter_metadata": json.dumps(odd)})
        with pytest.raises(ValueError, match="where a number, or numbers by pattern, were expected"):
            load_lora(tmp_path / "z.safetensors", {"unet": UNET})
    factors = Factors(jnp.ones((4, 2), jnp.float32), jnp.ones((2, 4), jnp.float32), jnp.float32(1))
    with pytest.raises(ValueError, match="which the parameters do not have"):
        merge({"a": {"kernel": jnp.ones((4, 4), jnp.float32)}}, {"b/kernel": factors})
    with pytest.raises(ValueError, match=r"expected \[..., I, r\] and \[r, O\]"):
        merge({"a": {"kernel": jnp.ones((5, 4), jnp.float32)}}, {"a/kernel": factors})
