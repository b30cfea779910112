"""CLIPText gives what transformers' CLIPTextModel and CLIPTextModelWithProjection give; files of any year; and what does not fit is said."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy

from adjoint_jax.checkpoints import _loading, _models, _rules, load_model, save
from adjoint_jax.models import CLIPText
from adjoint_jax.models.clip_text import Layer

TINY = {
    "vocab_size": 21,
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
    "bos_token_id": 18,
    "pad_token_id": 1,
}
CASES = {
    "sd 1": ("CLIPTextModel", {**TINY, "eos_token_id": 2, "hidden_act": "quick_gelu"}),
    "sd 2": ("CLIPTextModel", {**TINY, "eos_token_id": 19, "hidden_act": "gelu", "num_hidden_layers": 3}),
    "sdxl": ("CLIPTextModelWithProjection", {**TINY, "eos_token_id": 19, "hidden_act": "gelu", "layer_norm_eps": 1e-3}),
}
# Several ends of text, of which the first counts; a token above the end, and 2, which is no end here; and no end at all.
IDS = np.array([[18, 3, 4, 19, 19, 19, 19], [18, 2, 20, 5, 19, 19, 1], [18, 2, 18, 9, 5, 1, 1]], np.int32)
PLACES = {"sd 1": [3, 2, 0], "sd 2": [3, 4, 0]}  # of the highest number, and of 19
SMALL = CLIPText(**{key: value for key, value in TINY.items() if key not in ("bos_token_id", "pad_token_id")}, eos_token_id=19)


@functools.cache
def original(case):
    transformers, (name, options) = parity.original("transformers"), CASES[case]
    return parity.randomise(getattr(transformers, name)(transformers.CLIPTextConfig(**options)))


@functools.cache
def ours(case):
    name, options = CASES[case]
    module, shapes = _models.read({"architectures": [name], **options}, "the test")
    return module, _rules.to_flax(_models.family_of(module), shapes, parity.tensors(original(case)), "the test", jnp.float32)


@functools.cache
def expected(case):
    """The original's numbers, and the gradient of their inner product with `cotangents` with respect to the tokens' embeddings."""
    torch, network = parity.original("torch"), original(case)
    embeddings = network.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    caught = []
    catch = embeddings.register_forward_hook(lambda module, inputs, output: caught.append(output))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    y = network(torch.from_numpy(IDS).long(), output_hidden_states=True)
    handle.remove(), catch.remove()
    pooled = y.text_embeds if "text_embeds" in y else y.pooler_output
    parts = [y.last_hidden_state, pooled, *y.hidden_states]
    loss = sum((part * torch.from_numpy(cotangent)).sum() for part, cotangent in zip(parts, cotangents([part.shape for part in parts]), strict=True))
    (gradient,) = torch.autograd.grad(loss, caught)
    return [part.detach().numpy() for part in parts], gradient.numpy()


def cotangents(shapes):
    return [parity.draws(*shape, seed=i) for i, shape in enumerate(shapes)]


def parts(output):
    return [output.last_hidden_state, output.pooled if output.text_embeds is None else output.text_embeds, *output.hidden_states]


def table(params):
    return params["text_model"]["embeddings"]["token_embedding"]["embedding"]


@functools.cache
def answer(case, remat=False):
    """Our numbers from the tokens alone, from their embeddings, and the gradient in these."""
    module, params = ours(case)
    module = module.clone(remat=remat)

    def run(embeddings):
        def loss(embeddings):
            output = module.apply({"params": params}, jnp.asarray(IDS), embeddings)
            values = parts(output)
            return sum(jnp.sum(part * jnp.asarray(draw)) for part, draw in zip(values, cotangents([v.shape for v in values]), strict=True)), values

        gradient, values = jax.grad(loss, has_aux=True)(embeddings)
        return parts(module.apply({"params": params}, jnp.asarray(IDS))), values, gradient

    return jax.jit(run, compiler_options=parity.QUICK)(table(params)[IDS])


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    (values, gradient), (ids, embeddings, slope) = expected(case), answer(case)
    assert len(values) == len(ids) == 3 + CASES[case][1]["num_hidden_layers"]
    for y, again, value in zip(ids, embeddings, values, strict=True):
        assert parity.relative(y, value) < 1e-4
        assert parity.relative(again, value) < 1e-4
    assert parity.relative(slope, gradient) < 1e-3


def test_a_layer_equals_transformers():
    torch, layer = parity.original("torch"), original("sd 1").encoder.layers[1]
    x = parity.draws(2, 5, 16)
    mask = torch.triu(torch.full((5, 5), float("-inf")), 1)[None, None]
    with torch.no_grad():
        value = layer(torch.from_numpy(x), mask).numpy()
    params = ours("sd 1")[1]["text_model"]["encoder"]["layers_1"]
    y = jax.jit(Layer(4, 24, "quick_gelu", 1e-5).apply, compiler_options=parity.QUICK)({"params": params}, jnp.asarray(x))
    assert parity.relative(y, value) < 1e-5


@pytest.mark.parametrize("case", PLACES)
def test_pools_at_the_end_of_text(case):
    last, pooled, *_ = answer(case)[0]
    np.testing.assert_array_equal(pooled, last[[0, 1, 2], PLACES[case]])


def test_skips_the_last_layers():
    """As diffusers does for Stable Diffusion 1: the original's final norm of an earlier state."""
    torch, (module, params) = parity.original("torch"), ours("sd 2")
    y = jax.jit(functools.partial(module.apply, clip_skip=2), compiler_options=parity.QUICK)({"params": params}, jnp.asarray(IDS))
    with torch.no_grad():
        value = original("sd 2").final_layer_norm(torch.from_numpy(expected("sd 2")[0][-3])).numpy()
    assert parity.relative(y.last_hidden_state, value) < 1e-4
    assert parity.relative(y.pooled, expected("sd 2")[0][1]) < 1e-4


def test_remat_changes_no_number():
    for plain, remat in zip(jax.tree.leaves(answer("sd 1")), jax.tree.leaves(answer("sd 1", remat=True)), strict=True):
        assert parity.relative(remat, plain) < 1e-5
    module, params = ours("sd 1")
    program = str(jax.make_jaxpr(lambda ids: module.clone(remat=True).apply({"params": params}, ids))(jnp.asarray(IDS)))
    assert len(re.findall(r"= (?:remat2?|checkpoint)\[", program)) == 2


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("case", ["sd 1", "sdxl"])
def test_files_go_both_ways(tmp_path, case):
    network, (module, params) = original(case), ours(case)
    network.save_pretrained(tmp_path / "theirs")
    loaded, read = load_model(tmp_path / "theirs")
    assert loaded == module
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    save(tmp_path / "ours", module, params)
    weights(tmp_path / "ours").rename(tmp_path / "ours" / "model.safetensors")
    assert all(name.startswith("text_") for name in safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors"))
    again, log = type(network).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(log[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, mine = dict(parity.tensors(network)), dict(parity.tensors(again))
    assert theirs.keys() == mine.keys()
    assert all(np.array_equal(mine[name], tensor) for name, tensor in theirs.items())
    entries = _models.describe(module)
    assert {key: getattr(again.config, key) for key in entries} == entries
    assert load_model(tmp_path / "ours")[0] == module


def test_the_class_is_read_by_transformers(tmp_path):
    save(tmp_path / "ours", SMALL, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _models.shapes(SMALL)))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["CLIPTextModel"], "clip_text_model")
    assert "_class_name" not in config
    assert "with_projection" not in config
    found = parity.original("transformers").AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(found).__name__ == "CLIPTextConfig"
    assert found.eos_token_id == 19


# The configuration of Stable Diffusion 1.5's text encoder.
PUBLISHED = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
OPEN_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512}
OPEN_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280}
COUNTS = {
    "Stable Diffusion 1, SDXL's first": ("CLIPTextModel", {}, 123_060_480),
    "Stable Diffusion 2": ("CLIPTextModel", {**OPEN_H, "hidden_act": "gelu"}, 340_387_840),
    "Stable Diffusion 3's first": ("CLIPTextModelWithProjection", {}, 123_650_304),
    "SDXL's second": ("CLIPTextModelWithProjection", {**OPEN_G, "hidden_act": "gelu", "bos_token_id": 49406, "eos_token_id": 49407}, 694_659_840),
}


@pytest.mark.parametrize("case", COUNTS)
def test_published_sizes(case):
    name, options, count = COUNTS[case]
    _, shapes = _models.read({**PUBLISHED, **options, "architectures": [name]}, case)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_reads_old_files():
    """The buffer of position numbers, and `text_model.` before every name."""
    module, params = ours("sd 1")
    named = [(f"text_model.{name}", tensor) for name, tensor in parity.tensors(original("sd 1"))]
    named.append(("text_model.embeddings.position_ids", np.arange(9)[None]))
    read = _rules.to_flax(_models.family_of(module), _models.shapes(module), named, "the test", jnp.float32)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))


def test_reads_the_text_half_of_a_whole_clip(tmp_path):
    """Where a pipeline calls it the text encoder; `load_model` reads the whole, see test_clip_vision."""
    torch, transformers = parity.original("torch"), parity.original("transformers")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4, "patch_size": 2}
    config = transformers.CLIPConfig(text_config=CASES["sdxl"][1], vision_config=vision, projection_dim=5)
    whole = transformers.CLIPModel(config).eval()
    parity.randomise(whole.text_model), parity.randomise(whole.text_projection)
    whole.save_pretrained(tmp_path)
    module, params = _loading.network(tmp_path, variant=None, dtype=jnp.float32, hint="CLIPTextModelWithProjection")
    assert module == ours("sdxl")[0].clone(projection_dim=5)
    with torch.no_grad():
        value = whole.get_text_features(torch.from_numpy(IDS).long())
    value = value if isinstance(value, torch.Tensor) else value.pooler_output
    y = jax.jit(module.apply, compiler_options=parity.QUICK)({"params": params}, jnp.asarray(IDS)).text_embeds
    assert parity.relative(y, value.numpy()) < 1e-4


@pytest.mark.parametrize("override", [{}, {"text_config_dict": {"hidden_size": 8, "num_attention_heads": 2}}])
def test_reads_a_whole_clips_configuration_as_transformers(override):
    """What `text_config_dict` leaves out is the default, whatever `text_config` says."""
    text = {**CASES["sdxl"][1], "num_beams": 1, "id2label": {"0": "LABEL_0"}, "eos_token_id": 2}
    config = {"projection_dim": 5, "text_config": text, "vision_config": {"num_hidden_layers": 1}, "logit_scale_init_value": 2.6592, **override}
    module = _models.read({"architectures": ["CLIPModel"], **config}, "config.json")[0].text
    theirs = parity.original("transformers").CLIPConfig(**config).text_config
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "eos_token_id")
    assert [getattr(module, field) for field in fields] == [getattr(theirs, field) for field in fields]
    assert (module.projection_dim, module.with_projection) == (5, True)


@pytest.mark.parametrize("option", [{"attention_dropout": 0.1}, {"attention_window": 4}])
def test_refuses_what_it_does_not_compute(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        _models.read({**PUBLISHED, **option, "architectures": ["CLIPTextModel"]}, "config.json")


def test_keeps_the_dtype():
    dtype = jnp.bfloat16
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _models.shapes(SMALL))
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        y = jax.eval_shape(lambda p: SMALL.apply({"params": p}, jnp.asarray(IDS)), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {np.dtype(dtype)}


GIVEN = jax.ShapeDtypeStruct((1, 3, 8), jnp.float32)
ERRORS = {
    "floats": ({}, ((1, 3), jnp.float32), None, 0, r"integer tokens \[B, T\].*got float32 \(1, 3\)"),
    "one text": ({}, ((3,), jnp.int32), None, 0, r"got int32 \(3,\)"),
    "long": ({}, ((1, 10), jnp.int32), None, 0, "T from 1 to 9"),
    "embeddings": ({}, ((1, 3), jnp.int32), GIVEN, 0, r"floats \(1, 3, 16\).*got float32 \(1, 3, 8\)"),
    "skip": ({}, ((1, 3), jnp.int32), None, 3, "clip_skip=3"),
    "activation": ({"hidden_act": "relu"}, ((1, 3), jnp.int32), None, 0, "hidden_act='relu'"),
    "heads": ({"num_attention_heads": 3}, ((1, 3), jnp.int32), None, 0, "num_attention_heads=3 does not divide"),
    "ends": ({"eos_token_id": (1, 2)}, ((1, 3), jnp.int32), None, 0, r"eos_token_id=\(1, 2\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    options, ids, given, skip, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda ids, given: SMALL.clone(**options).init(jax.random.key(0), ids, given, skip), jax.ShapeDtypeStruct(*ids), given)
