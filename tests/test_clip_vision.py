"""CLIPVision and CLIP give what transformers' give, values and gradient in the image; files both ways; and what does not fit is said."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from test_clip_text import IDS, TINY as TEXT

from adjoint_jax.checkpoints import _models, _rules, load_model, save
from adjoint_jax.models import CLIP, CLIPText, CLIPVision

TINY = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 6, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES = {
    "openai": ("CLIPVisionModelWithProjection", {**TINY, "image_size": 8, "patch_size": 4, "hidden_act": "quick_gelu"}),
    "laion": ("CLIPVisionModelWithProjection", {**TINY, "image_size": 6, "patch_size": 2, "hidden_act": "gelu", "projection_dim": 9}),
    "cut": ("CLIPVisionModelWithProjection", {**TINY, "image_size": 7, "patch_size": 3, "num_channels": 1, "layer_norm_eps": 1e-3}),
    "bare": ("CLIPVisionModel", {**TINY, "image_size": 4, "patch_size": 4, "num_hidden_layers": 3}),
}
SMALL = CLIPVision(**TINY, image_size=8, patch_size=4)


@functools.cache
def original(case):
    transformers, (name, options) = parity.original("transformers"), CASES[case]
    return parity.randomise(getattr(transformers, name)(transformers.CLIPVisionConfig(**options)))


@functools.cache
def ours(case):
    name, options = CASES[case]
    module, shapes = _models.read({"architectures": [name], **options}, "the test")
    return module, _rules.to_flax(_models.family_of(module), shapes, parity.tensors(original(case)), "the test", jnp.float32)


def parts(output):
    return [output.last_hidden_state, output.pooled if output.image_embeds is None else output.image_embeds, *output.hidden_states]


def cotangents(values):
    return [parity.draws(*value.shape, seed=i) for i, value in enumerate(values)]


def pixels(module):
    return parity.draws(2, *module.dummy_inputs[0].shape[1:], seed=9)


@functools.cache
def expected(case):
    """The original's numbers, and the gradient of their inner product with `cotangents` in the pixels."""
    torch = parity.original("torch")
    x = torch.from_numpy(np.ascontiguousarray(parity.nchw(pixels(ours(case)[0])))).requires_grad_()
    y = original(case)(x, output_hidden_states=True)
    values = [y.last_hidden_state, y.image_embeds if "image_embeds" in y else y.pooler_output, *y.hidden_states]
    loss = sum((value * torch.from_numpy(draw)).sum() for value, draw in zip(values, cotangents(values), strict=True))
    (gradient,) = torch.autograd.grad(loss, x)
    return [value.detach().numpy() for value in values], parity.nhwc(gradient)


@functools.cache
def answer(case, remat=False):
    module, params = ours(case)

    def loss(params, x):
        values = parts(module.clone(remat=remat).apply({"params": params}, x))
        return sum(jnp.sum(value * jnp.asarray(draw)) for value, draw in zip(values, cotangents(values), strict=True)), values

    gradient, values = jax.jit(jax.grad(loss, argnums=1, has_aux=True), compiler_options=parity.QUICK)(params, jnp.asarray(pixels(module)))
    return values, gradient


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    (values, gradient), (found, slope) = expected(case), answer(case)
    assert len(values) == len(found) == 3 + CASES[case][1]["num_hidden_layers"]
    errors = [parity.relative(y, value) for y, value in zip(found, values, strict=True)]
    print(case, f"values {max(errors):.1e}, gradient {parity.relative(slope, gradient):.1e}")
    assert max(errors) < 1e-4
    assert parity.relative(slope, gradient) < 1e-3


def test_remat_changes_no_number():
    for plain, remat in zip(jax.tree.leaves(answer("openai")), jax.tree.leaves(answer("openai", remat=True)), strict=True):
        assert parity.relative(remat, plain) < 1e-5
    module, params = ours("openai")
    program = str(jax.make_jaxpr(lambda x: module.clone(remat=True).apply({"params": params}, x))(jnp.asarray(pixels(module))))
    assert len(re.findall(r"= (?:remat2?|checkpoint)\[", program)) == 2


@functools.cache
def whole():
    """transformers' CLIP with towers of different widths."""
    transformers = parity.original("transformers")
    towers = {"text_config": {**TEXT, "eos_token_id": 19}}
    towers["vision_config"] = {**CASES["laion"][1], "hidden_size": 12, "projection_dim": 3}  # which does not count
    return parity.randomise(transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=5)))


def test_a_whole_clip_goes_both_ways(tmp_path):
    """Files, logits and the gradient in the image, and each tower by itself."""
    torch, network = parity.original("torch"), whole()
    network.save_pretrained(tmp_path / "theirs")
    module, params = load_model(tmp_path / "theirs")
    assert type(module) is CLIP
    assert (module.text.projection_dim, module.vision.projection_dim) == (5, 5)
    x, weights = pixels(module.vision), parity.draws(2, 3)
    theirs = torch.from_numpy(np.ascontiguousarray(parity.nchw(x))).requires_grad_()
    y = network(torch.from_numpy(IDS).long(), theirs)
    (gradient,) = torch.autograd.grad((y.logits_per_image * torch.from_numpy(weights)).sum(), theirs)

    def loss(params, x):
        output = module.apply({"params": params}, jnp.asarray(IDS), x)
        alone = module.text.apply({"params": params}, jnp.asarray(IDS)), module.vision.apply({"params": params}, x)
        method = module.apply({"params": params}, x, method="encode_image")
        return jnp.sum(output.logits_per_image * jnp.asarray(weights)), (output, *alone, method)

    slope, (output, text, image, method) = jax.jit(jax.grad(loss, argnums=1, has_aux=True), compiler_options=parity.QUICK)(params, jnp.asarray(x))
    assert parity.relative(output.logits_per_image, y.logits_per_image.detach().numpy()) < 1e-4
    assert parity.relative(slope, parity.nhwc(gradient)) < 1e-3
    for alone, both in ((text.text_embeds, output.text_embeds), (image.image_embeds, output.image_embeds)):
        np.testing.assert_allclose(alone / np.linalg.norm(alone, axis=1, keepdims=True), both, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(image.image_embeds, method.image_embeds)
    save(tmp_path / "ours", module, params)
    assert load_model(tmp_path / "ours")[0] == module
    again, log = type(network).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(log[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(np.array_equal(mine, tensor) for (_, mine), (_, tensor) in zip(parity.tensors(again), parity.tensors(network), strict=True))


@pytest.mark.parametrize("case", ["openai", "bare"])
def test_files_go_both_ways(tmp_path, case):
    network, (module, params) = original(case), ours(case)
    network.save_pretrained(tmp_path / "theirs")
    loaded, read = load_model(tmp_path / "theirs")
    assert loaded == module
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    save(tmp_path / "ours", module, params)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "clip_vision_model"
    again, log = type(network).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(log[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, mine = dict(parity.tensors(network)), dict(parity.tensors(again))
    assert all(np.array_equal(mine[name], tensor) for name, tensor in theirs.items())
    assert load_model(tmp_path / "ours")[0] == module


def test_reads_old_files_and_the_half_that_sees():
    """The buffer of position numbers; of a whole CLIP's tensors and configuration those of its images."""
    config = {"architectures": ["CLIPVisionModelWithProjection"], "projection_dim": 5, "vision_config": {**CASES["laion"][1], "hidden_size": 12}}
    module, shapes = _models.read({**config, "text_config": {}}, "the test")
    named = [*parity.tensors(whole()), ("vision_model.embeddings.position_ids", np.arange(10)[None])]
    read = _rules.to_flax(_models.family_of(module), shapes, named, "the test", jnp.float32)
    np.testing.assert_array_equal(read["visual_projection"]["kernel"].T, dict(named)["visual_projection.weight"])


# What differs from the defaults, which are the base's.
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}
TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
COUNTS = {
    "openai/clip-vit-base-patch32": ({}, {}, 512, 151_277_313),
    "openai/clip-vit-large-patch14": (TEXT_L, LARGE, 768, 427_616_513),
}


@pytest.mark.parametrize("case", COUNTS)
def test_published_sizes(case):
    text, vision, projection, count = COUNTS[case]
    text, vision = ({**tower, "model_type": kind, "dropout": 0.0} for tower, kind in ((text, "clip_text_model"), (vision, "clip_vision_model")))
    config = {"architectures": ["CLIPModel"], "projection_dim": projection, "text_config": text, "vision_config": vision, "model_type": "clip"}
    _, shapes = _models.read(config, case)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"vision_config": {"attention_dropout": 0.1}}, r"the vision_config of config.json has options .* attention_dropout=0.1"),
        ({"text_config": {"attention_window": 4}}, r"the text_config of config.json has options .* attention_window=4"),
        ({"vision_config": {"hidden_size": -3}}, r"the vision_config of config.json has a value of the wrong kind: hidden_size=-3"),
        ({"text_config": [1]}, "config.json has a value of the wrong kind"),
        ({"temperature_of_ours": 1}, "temperature_of_ours=1 "),
    ],
)
def test_refuses_what_it_does_not_compute(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        _models.read({"architectures": ["CLIPModel"], **config}, "config.json")


ERRORS = {
    "size": ({}, (1, 9, 9, 3), jnp.float32, r"floats \[B, 8, 8, 3\]; got float32 \(1, 9, 9, 3\)"),
    "integers": ({}, (1, 8, 8, 3), jnp.int32, "got int32"),
    "activation": ({"hidden_act": "relu"}, (1, 8, 8, 3), jnp.float32, "hidden_act='relu'"),
    "heads": ({"num_attention_heads": 3}, (1, 8, 8, 3), jnp.float32, "num_attention_heads=3 does not divide"),
    "patch": ({"patch_size": 9}, (1, 8, 8, 3), jnp.float32, "patch_size=9 is not between 1 and image_size=8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    options, shape, dtype, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: SMALL.clone(**options).init(jax.random.key(0), x), jax.ShapeDtypeStruct(shape, dtype))


def test_towers_have_to_meet():
    clip = CLIP(CLIPText(with_projection=True), SMALL, projection_dim=6)
    with pytest.raises(ValueError, match="CLIP's towers project to projection_dim=6"):
        jax.eval_shape(lambda *inputs: clip.init(jax.random.key(0), *inputs), *clip.dummy_inputs)
