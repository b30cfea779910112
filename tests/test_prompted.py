"""A prompt in the place of a class: what is steered is pipelines.text_to_image, the metric CLIP's, and what does not fit is said."""

import functools
import json
import re
import shutil

import effect
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stylise
from PIL import Image
from test_cli import ROOT, history, refuses, save_random
from test_pipelines import BETAS, SD, VAE, XL, write_tokenizer

import adjoint_jax as aj
from adjoint_jax import _build, _scoring, checkpoints, cli, guide, pipelines
from adjoint_jax._options import Guide
from adjoint_jax._prompted import LatentSampler
from adjoint_jax.checkpoints import Pipeline, _models, load_pipeline, lora, save_pipeline
from adjoint_jax.experiments import features, metrics, run as run_module
from adjoint_jax.experiments.options import read_config
from adjoint_jax.guide import Given, Steering, audit
from adjoint_jax.models import CLIP, CLIPText, CLIPVision, ConvClassifier
from adjoint_jax.models.clip_vision import MEAN, SPREAD
from adjoint_jax.networks import linen

pytestmark = pytest.mark.usefixtures("as_the_program_runs")

WIDTHS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SCHEDULERS = {
    "sd": {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True},
    "xl": {"_class_name": "EulerDiscreteScheduler", **BETAS},
}
CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip


def randomly(module, seed):
    rng = np.random.default_rng(seed)
    return module, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), _models.shapes(module))


@pytest.fixture(scope="module")
def traced_once():
    """The shapes of a module are found by tracing it, which takes longer here than all the rest."""
    known, shapes = {}, _models.shapes

    def once(module):
        key = repr(module)
        known[key] = known[key] if key in known else shapes(module)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_models, "shapes", once)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, traced_once):
    """Tiny pipelines like Stable Diffusion 1 and SDXL, of images 8 x 8 in 4 x 4 latents, and a CLIP that sees 6 x 6."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("made")
    size = write_tokenizer(root / "tokenizer")
    text = CLIPText(vocab_size=size, projection_dim=12, max_position_embeddings=16, eos_token_id=size - 1, **WIDTHS)
    for kind, unet in (("sd", SD), ("xl", XL.clone(cross_attention_dim=16))):
        parts = {"unet": unet.clone(down_block_types=("DownBlock2D",)), "vae": VAE.clone(mid_block_add_attention=False), "text_encoder": text}
        parts |= {"text_encoder_2": text.clone(with_projection=True)} if kind == "xl" else {}
        index = {name: ["any", CLASSES[name]] for name in parts} | {"scheduler": ["diffusers", "Any"], "force_zeros_for_empty_prompt": kind == "xl"}
        tokenizers = {name.replace("text_encoder", "tokenizer"): root / "tokenizer" for name in parts if name.startswith("text")}
        components = {name: randomly(module, seed) for seed, (name, module) in enumerate(parts.items())}
        save_pipeline(root / kind, Pipeline(components, SCHEDULERS[kind], tokenizers, index, {}))
        config = json.loads((root / kind / "unet" / "config.json").read_text())
        (root / kind / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 4}))
    vision = CLIPVision(image_size=6, patch_size=3, projection_dim=12, with_projection=True, **{**WIDTHS, "num_hidden_layers": 1})
    checkpoints.save(root / "clip", *randomly(CLIP(text.clone(with_projection=True), vision, projection_dim=12), 9))
    for file in (root / "tokenizer").iterdir():
        shutil.copy(file, root / "clip")
    return root


def arguments(made, *more, kind="sd"):
    return ["--checkpoint", str(made / kind), "--prompt", "an owl", "--steps", "2", "--batch", "2", *more]


def guidance(made, out, *more, kind="sd"):
    own = ("--metric", "clip", "--clip", str(made / "clip"), "--drive", "both", "--iterations", "3", "--save-every", "1", "--out", str(out))
    return ["guide", *arguments(made, *own, *more, kind=kind)]


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guide, "audit", lambda *_: [])  # two programs more; see below
        cli.main(guidance(made, out, "--learning-rate", "0.2"))
    return out


def test_the_metric_rises_over_noise_and_text(finished):
    rows = history(finished)
    assert rows[-1]["metric"] > rows[0]["metric"] + 0.005
    assert set(rows[0]["gradient_norm"]) == {"x_T", "embedding"}
    with np.load(finished / "final.npz") as final:
        shapes = {name: final[name].shape for name in final.files}
    assert shapes == {"embedding/encoder_hidden_states": (2, 16, 8), "images": (2, 8, 8, 3), "x_T": (2, 4, 4, 4)}
    report = (finished / "report.md").read_text()
    assert "CLIP's embeddings of the image and of the text 'an owl'" in report
    assert "| 4 forward, 2 backward |" in report


def test_a_state_of_several_encodings_is_saved_whole(tmp_path):
    run = run_module.Run(tmp_path / "run", {})
    state = {"x_T": jnp.ones(2), "embedding": {"encoder_hidden_states": jnp.arange(3.0), "text_embeds": jnp.zeros(1)}}
    run.save(run_module.Progress(state))
    again = run_module.Run(tmp_path / "run", {}, resume=True).restore(jax.tree.map(jnp.zeros_like, state)).state
    assert jax.tree.all(jax.tree.map(np.array_equal, again, state))


def test_samples_are_those_of_text_to_image_and_where_guidance_starts(made, finished, tmp_path):
    cli.main(["sample", *arguments(made, "--out", str(tmp_path / "out"))])
    assert (tmp_path / "out" / "samples.png").read_bytes() == (finished / "before.png").read_bytes()
    pipeline = load_pipeline(made / "sd")
    modules, params = pipelines.split(pipeline.components)
    scheduler = aj.from_scheduler_config(pipeline.scheduler, published=False)
    cond = pipelines.encode_prompt(modules, params, pipelines.tokenize(made / "clip", "an owl"))
    how = {"scheduler": scheduler, "steps": 2, "grid": aj.grids.log_snr(scheduler.process, 2), "solver": aj.DPMSolverPP(2)}
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        np.testing.assert_allclose(samples["embedding/encoder_hidden_states"], jnp.repeat(cond["encoder_hidden_states"], 2, axis=0), rtol=1e-6)
        images = jax.jit(lambda params, x_T, cond: pipelines.text_to_image(modules, params, x_T, cond, **how))(params, samples["x_T"], cond)
        np.testing.assert_allclose(images, samples["images"], rtol=1e-3, atol=1e-4)


class Toy(nn.Module):
    """A network that reads all that SDXL's is told."""

    addition_embed_type = "text_time"

    @nn.compact
    def __call__(self, x, t, cond):
        told = nn.Dense(4, name="text")(jnp.mean(cond["encoder_hidden_states"], axis=1)) + nn.Dense(4, name="pooled")(cond["text_embeds"])
        told = told + nn.Dense(4, name="sizes")(cond["time_ids"] / 8)
        return jnp.tanh(nn.Dense(4, name="image")(x) + told[:, None, None]) * (0.5 + t / 2000)


class ToyDecoder(nn.Module):
    """Latents as images of twice their size."""

    remat: bool = False
    factor, out_channels = 2, 3

    def from_latents(self, x):
        return x / 0.5

    @nn.compact
    def decode(self, z):
        return jnp.repeat(jnp.repeat(jnp.sin(nn.Dense(3)(z)), 2, axis=1), 2, axis=2)


def test_the_gradient_is_that_of_text_to_image():
    """In x_T and every part of the text's encoding, under guidance, by JAX's own autodiff; and the audit has a row for the encoding as a whole."""
    scheduler = aj.from_scheduler_config(SCHEDULERS["xl"], published=False)
    modules = {"unet": Toy(), "vae": ToyDecoder()}
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    variables = {"x_T": draw(2, 2, 2, 4), "embedding": {"encoder_hidden_states": draw(2, 3, 8), "text_embeds": draw(2, 5)}}
    null = {"encoder_hidden_states": draw(1, 3, 8), "text_embeds": draw(1, 5)}
    text = {**variables["embedding"], "time_ids": jnp.ones((2, 6))}
    x_T = variables["x_T"]
    params = {"unet": Toy().init(jax.random.key(0), x_T, 0.0, text), "vae": ToyDecoder().init(jax.random.key(1), x_T, method="decode")}
    params = {name: each["params"] for name, each in params.items()}
    score = lambda images: jnp.mean(jnp.sin(images), axis=(1, 2, 3))  # noqa: E731
    grid, solver = aj.grids.log_snr(scheduler.process, 3), aj.DPMSolverPP(2)
    sampler = LatentSampler(linen(Toy()), scheduler.process, scheduler.prediction, grid, solver, True, modules, scheduler)
    given = Given(params, jnp.float32(3), null, jax.tree_util.Partial(score))

    def theirs(params, variables):
        how = {"scheduler": scheduler, "steps": 3, "grid": grid, "solver": solver, "adjoint": aj.DirectAdjoint(), "guidance": 3.0}
        x_T = variables["x_T"] / scheduler.scale(3)
        return jnp.sum(score(pipelines.text_to_image(modules, params, x_T, variables["embedding"], null, **how)))

    steering = Steering(sampler, aj.DiscreteAdjoint(), optax.sgd(0.1), ("x_T", "embedding"), "none")
    following, seen = jax.jit(steering.update)(given, steering.start(variables).state)
    value, gradient = jax.jit(jax.value_and_grad(theirs, 1))(params, variables)
    np.testing.assert_allclose(jnp.sum(seen.scores), value, rtol=1e-5)
    for found, start, wanted in zip(*map(jax.tree.leaves, (following.variables, variables, gradient)), strict=True):
        assert np.linalg.norm((found - start) / 0.1 - wanted) < 1e-4 * np.linalg.norm(wanted)
    for name, norm in seen.norms.items():
        np.testing.assert_allclose(norm, np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient[name]))), rtol=1e-5)
    rows = audit(sampler, given, {"first": variables}, {"exact": aj.DiscreteAdjoint()})
    assert [(row.adjoint, row.wrt) for _, row in rows] == [("exact", "embedding"), ("exact", "x_T")]
    assert [row.relative_error for _, row in rows] == [0, 0]


def test_texts_become_the_embedding_and_the_null_one(made):
    """The null text is the empty one unless given, of SDXL zeros; and the shapes of SDXL go through."""
    for kind, text, more in (("sd", "", ()), ("xl", None, ()), ("xl", "low", ("--negative", "low"))):
        sampler, given, variables = _build.sampler(cli.parse(guidance(made, "nowhere", "--guidance", "3", *more, kind=kind)))
        modules, params = pipelines.split(load_pipeline(made / kind).components)
        encoders = [name for name in modules if name.startswith("text")]
        tokens = (dict.fromkeys(encoders, pipelines.tokenize(made / "clip", each)) for each in ("an owl", text or ""))
        cond, null = (pipelines.encode_prompt(modules, params, each) for each in tokens)
        null = null if text is not None else jax.tree.map(jnp.zeros_like, cond)
        for name in cond:
            np.testing.assert_allclose(variables["embedding"][name], jnp.repeat(cond[name], 2, axis=0), rtol=1e-5)
            np.testing.assert_allclose(given.null[name], null[name], rtol=1e-5)
    assert set(given.params) == {"unet", "vae"}
    assert sampler.like(variables["x_T"]) == jax.eval_shape(sampler, given, variables)


@pytest.mark.parametrize("shape", [(10, 10), (4, 4), (9, 15)])
def test_images_are_prepared_as_pillow_does(shape):
    """Bicubic, antialiased where it shrinks, the middle of what is not square; one channel is three."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, *shape, 3)).astype(np.float32)
    height, width = (6 * side // min(shape) for side in shape)
    planes = [Image.fromarray((image[0, ..., c] + 1) / 2).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
    top, left = (height - 6) // 2, (width - 6) // 2
    wanted = (np.stack([np.asarray(plane) for plane in planes], axis=-1)[top : top + 6, left : left + 6] - np.asarray(MEAN)) / np.asarray(SPREAD)
    found = jax.jit(functools.partial(metrics.prepared, size=6, mean=MEAN, spread=SPREAD))
    np.testing.assert_allclose(found(image)[0], wanted, atol=2e-5)
    np.testing.assert_allclose(found(image[..., :1])[0], found(np.repeat(image[..., :1], 3, axis=-1))[0], atol=1e-6)


def test_the_metric_scores_grey_images_by_the_folders_own_numbers(made, tmp_path):
    folder = shutil.copytree(made / "clip", tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1]}))
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 1)), jnp.float32)
    scores = _scoring.metric(Guide(metric="clip", clip=str(folder), target_prompt="an owl", prompt="low"), images)(images)
    clip, params = checkpoints.load_model(folder)
    pixels = images * jnp.asarray([1.0, 2.0, 0.5])
    output = clip.apply({"params": params}, jnp.asarray(pipelines.tokenize(folder, "an owl")), pixels)
    np.testing.assert_allclose(scores, output.image_embeds @ output.text_embeds[0], rtol=1e-4)


def wanting(made, out, **changes):
    """One encoding for two noises, on the pipeline like Stable Diffusion."""
    given = {"checkpoint": str(made / "sd"), "clip": str(made / "clip"), "prompt": "an owl", "effects": ("clip:low",), "compared": ()}
    small = {"steps": 2, "batch": 2, "fresh": 2, "iterations": 2, "learning_rate": 0.3, "engine": "discrete"}
    return effect.Options(out=str(out), **{**given, **small, **changes})


def test_an_effect_is_found_for_a_text(made, tmp_path):
    effect.main(wanting(made, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "results.json").read_text())["effects"]["clip:low"]
    assert np.mean(found["fixed after"]) > np.mean(found["fixed before"])
    assert all(-2 <= score <= 0 for score in found["fixed after"])
    with np.load(tmp_path / "run" / "final.npz") as final:
        assert final["embedding/clip:low/encoder_hidden_states"].shape == (16, 8)
        assert final["fresh/clip:low"].shape == (2, 8, 8, 3)


def test_the_config_holds_known_options():
    options = effect.Options(**read_config(str(ROOT / "configs" / "effect_text_to_image.toml"), effect.Options))
    assert all(name.startswith("clip:") for name in options.effects)


@pytest.fixture(scope="module")
def picture(made):
    """A PNG of 12 x 12, and classifiers of RGB and of grey images beside it."""
    for channels in (1, 3):
        save_random(made / f"channels_{channels}", ConvClassifier(features=(8,), classes=4, norm_num_groups=4, in_channels=channels))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(made / "picture.png")
    return str(made / "picture.png")


def styling(made, out, **changes):
    """A LoRA of the pipeline like Stable Diffusion, of images larger than its own."""
    given = {"checkpoint": str(made / "sd"), "clip": str(made / "clip"), "prompt": "an owl", "style": str(made / "picture.png"), "size": 12}
    small = {"steps": 2, "batch": 8, "held": 8, "looks": 2, "iterations": 8, "rank": 2, "targets": "attn2/to_|conv", "engines": ("discrete",)}
    return stylise.Options(out=str(out), learning_rate=0.1, **{**given, **small, **changes})


def test_a_style_is_tuned_into_a_lora_of_the_unet(made, picture, tmp_path):
    options = styling(made, tmp_path / "run")
    stylise.main(options)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["tunings"]
    assert found["discrete"]["objective"] < found["before"]["objective"]
    module, _ = load_pipeline(made / "sd").components["unet"]
    tuned = lora.load_lora(tmp_path / "run" / "lora.safetensors", {"unet": module})["unet"]
    assert {"attn2" in name for name in tuned} == {True, False}
    tuning, arrays, start, read = stylise.problem(options)
    assert tuned.keys() == start.keys()
    assert read == {}
    held = tuning.variables(arrays, jax.random.fold_in(arrays.key, stylise.HELD), options.held)
    params = {**arrays.given.params, "unet": lora.merge(arrays.given.params["unet"], tuned)}
    images = jax.jit(tuning.sampler.__call__)(arrays.given._replace(params=params), held)
    with np.load(tmp_path / "run" / "final.npz") as final:
        assert final["images/before"].shape == (8, 12, 12, 3)
        assert np.abs(final["images/discrete"] - final["images/before"]).max() > 1e-3
        np.testing.assert_allclose(images, final["images/discrete"], atol=1e-4)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "a LoRA of rank 2 of the unet, which is told 'an owl'" in report
    assert "thick" not in report


def test_all_weights_are_those_of_the_unet(made, picture):
    """And the features are a classifier's, the style by a formula."""
    clip, classifier = None, str(made / "channels_3")
    tuning, arrays, start, _ = stylise.problem(styling(made, "none", rank=0, targets="", style="hatched", clip=clip, classifier=classifier))
    assert jax.tree.structure(start) == jax.tree.structure(load_pipeline(made / "sd").components["unet"][1])
    given = tuning.given(arrays, jax.tree.map(jnp.zeros_like, start))
    assert given.params["vae"] is arrays.given.params["vae"]
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(given.params["unet"]))
    assert tuning.seen == (12, 12, 3)


def test_styles_of_clip_are_those_of_its_patches():
    """Even in depth, without the class token, and from what the last layer takes, whose own patches nobody reads."""
    tower = CLIPVision(image_size=6, patch_size=3, projection_dim=12, with_projection=True, **{**WIDTHS, "num_hidden_layers": 8})
    _, params = randomly(tower, 0)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)), jnp.float32)
    states = tower.apply({"params": params}, (images + 1) / 2).hidden_states
    found = features.patches(tower, jnp.zeros(3), jnp.ones(3), params, images)
    for layer, depth in zip(found, (0, 2, 4, 7), strict=True):
        np.testing.assert_allclose(layer[:, 0], states[depth][:, 1:], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip": None}, "The embedded classifier reads images [H, W, 1], and these are [H, W, 3]: give a --classifier for them."),
        ({"clip": None, "classifier": "channels_1"}, "channels_1 reads images [H, W, 1], and these are [H, W, 3]"),
        ({"clip": "channels_3"}, "holds a ConvClassifier where transformers' CLIPModel was expected"),
        ({"classifier": "channels_3"}, "has the features of the style, and so has --clip: leave one of them out."),
        ({"judge": "any.npz"}, "--judge reads digits and takes no --prompt"),
        ({"prompt": None}, "is a text-to-image pipeline: give --prompt."),
        ({"label": 1}, "has no classes: leave --label out."),
        ({"size": None}, "where images are sampled of (8, 8, 3) and RGB"),
        ({"targets": "nowhere"}, "found 0 kernels"),
    ],
)
def test_styles_that_do_not_fit_a_text_are_refused(made, picture, tmp_path, changes, sentence):
    changes = {name: str(made / value) if str(value).startswith("channels") else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        stylise.main(styling(made, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"effects": ("style:bold",), "clip": None}, "is one of digits: with --prompt use image:FILE.png or clip:TEXT"),
        ({"effects": ("image:0",), "clip": None}, "is one of digits: with --prompt"),
        ({"effects": ("image:a.png",)}, "--clip is for the effects clip:TEXT"),
        ({"clip": None}, "needs CLIP's networks: give --clip FOLDER"),
        ({"flow_vit": "any.npz"}, "--flow-vit takes no --prompt"),
        ({"judge": "lenet.npz"}, "--classifier and --judge read images of classes"),
    ],
)
def test_effects_that_no_text_has_are_refused(made, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        effect.main(wanting(made, tmp_path / "run", **changes))


REFUSED = {
    "no prompt": (("--prompt", "None"), "is a text-to-image pipeline: give --prompt."),
    "label": (("--label", "3"), "has no classes: leave --label out."),
    "negative": (("--negative", "low"), "--negative counts under guidance alone: give --guidance, 7.5 is usual."),
    "size": (("--size", "9"), "--size must be a multiple of 2, the pixels of a latent; got 9."),
    "long": (("--prompt", "x" * 40), "Text 0 has 42 tokens where 16 fit"),
    "no clip": (("--clip", "None"), "A comparison with a text needs CLIP's networks: give --clip FOLDER."),
    "option of clip": (("--metric", "jax.numpy:mean"), "takes no --clip: leave it out."),
    "no pipeline": (("--checkpoint", "None", "--metric", "jax.numpy:mean", "--clip", "None"), "digits is none: leave it out, or give another"),
    "no text": (("--checkpoint", "None", "--prompt", "None", "--drive", "noise"), "give --prompt or --target-prompt."),
    "negative for digits": (("--checkpoint", "None", "--negative", "low"), "--negative is a text for a text-to-image pipeline"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_sentence_and_write_nothing(made, tmp_path, capsys, name):
    more, sentence = REFUSED[name]
    refuses(guidance(made, tmp_path / "out", *more), sentence, capsys)
    assert not (tmp_path / "out").exists()


def test_refuses_folders_that_are_not_whole(made, tmp_path, capsys):
    folder = shutil.copytree(made / "clip", tmp_path / "clip")
    (folder / "vocab.json").unlink()
    refuses(guidance(made, tmp_path / "out", "--clip", folder), "has neither tokenizer.json nor vocab.json and merges.txt", capsys)
    refuses(guidance(made, tmp_path / "out", "--clip", made / "sd" / "text_encoder"), "holds a CLIPText where transformers' CLIPModel", capsys)
    pipe = shutil.copytree(made / "sd", tmp_path / "sd")
    shutil.rmtree(pipe / "tokenizer")
    refuses(guidance(made, tmp_path / "out", "--checkpoint", pipe), "has no folder tokenizer, which the text_encoder needs", capsys)
    index = json.loads((pipe / "model_index.json").read_text())
    (pipe / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": ["transformers", "T5EncoderModel"]}))
    refuses(guidance(made, tmp_path / "out", "--checkpoint", pipe), "texts are encoded here for Stable Diffusion 1, 2 and XL", capsys)
