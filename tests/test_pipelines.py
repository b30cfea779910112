"""Tiny pipelines with random weights, written by diffusers: our image of a text is diffusers', our gradients are torch's through its own pipeline."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

import adjoint_jax as aj
from adjoint_jax import pipelines
from adjoint_jax.checkpoints import load_pipeline
from adjoint_jax.checkpoints.lora import init_lora, merge, with_lora
from adjoint_jax.models import AutoencoderKL, CLIPText, DiT, UNet2DCondition

PROMPT, NEGATIVE = "An owl's 12 low-lit  nests, naïve!", "blurry"
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("l", "o"), ("o", "w</w>"), ("lo", "w</w>"), ("o", "w"), ("ow", "l</w>"), ("n", "e"), ("ne", "s"), ("t", "s</w>"), ("a", "n</w>")]
NASTY = (
    PROMPT, "", " ", "LOW low lOw", "it's they'll I'd", "2048x1024", "naïve café Ångström", "e\u0301 é", "\u3000tab\tnew\nline ", "猫と犬 🦉🏽",
    "!?!...<>#@", f"a {END} b", f"{START}a", "<|ENDOFTEXT|>", "ǅ İstanbul ß", "low" * 9, "\u200bzero\u00a0width", "1½²", "don't!", "a_b-c",
)  # fmt: skip


def write_tokenizer(folder, pad=END, length=16):
    """vocab.json and merges.txt in CLIP's layout, as Stable Diffusion's repositories have them. Returns the size of the vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in MERGES), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]))
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    special = {"bos_token": {"content": START, **options}, "eos_token": {"content": END, **options}, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length, "tokenizer_class": "CLIPTokenizer", "pad_token": END}))
    return len(dict.fromkeys(words))


@pytest.mark.parametrize("pad", [END, "!"])
def test_tokens_are_those_of_transformers(tmp_path, pad):
    transformers = parity.original("transformers")
    write_tokenizer(tmp_path / "old", pad)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")  # tokenizer.json
    options = {"padding": "max_length", "truncation": True, "max_length": 16}
    for folder in ("old", "new"):
        found = pipelines.tokenize(tmp_path / folder, NASTY, truncate=True)
        for text, ours in zip(NASTY, found, strict=True):
            assert ours.tolist() == theirs(text, **options)["input_ids"], (folder, text)
    assert found.dtype == np.int32
    assert pipelines.tokenize(tmp_path / "old", "low", length=4).tolist() == theirs(["low"], padding="max_length", max_length=4)["input_ids"]


def test_tokenizing_says_what_is_wrong(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        pipelines.tokenize(tmp_path, "a")
    write_tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match=r"Text 1 has 42 tokens where 16 fit: .* truncate=True"):
        pipelines.tokenize(tmp_path / "t", ["a", "a" * 40])
    (tmp_path / "t" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad of elsewhere"}))
    (tmp_path / "t" / "merges.txt").write_text("x\n")
    with pytest.raises(ValueError, match="are not a vocabulary and its merges"):
        pipelines.tokenize(tmp_path / "t", "a")
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        pipelines.tokenize(tmp_path / "t", "a")


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "sd1": ("DDIMScheduler", {**BETAS, "clip_sample": False, "set_alpha_to_one": False}),
    "sd2": ("DPMSolverMultistepScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    "sdxl": ("EulerDiscreteScheduler", BETAS),
}
GUIDANCE, STEPS = 4.0, 3
ENCODERS = ("text_encoder", "text_encoder_2")
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
TARGET = "mid_block/attentions_0/transformer_blocks_0/attn2/to_q/"


def write_pipeline(folder, kind):
    """diffusers' pipeline of a kind, with random weights, and saved."""
    diffusers, transformers = parity.original("diffusers"), parity.original("transformers")
    large = kind == "sdxl"
    vocabulary = write_tokenizer(folder / "tokenizers" / "one", "!" if kind == "sd2" else END)
    write_tokenizer(folder / "tokenizers" / "two", "!")
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    text |= {"vocab_size": vocabulary, "eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2, "projection_dim": 12}
    unet = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "cross_attention_dim": 16 if large else 8,
        "attention_head_dim": 2 if kind == "sd1" else (2,),
        "use_linear_projection": kind != "sd1",
    }
    if large:
        unet |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36}
    levels = {"block_out_channels": (4, 4), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    name, options = SCHEDULERS[kind]

    def encoder(name):
        return parity.randomise(
            getattr(transformers, name)(transformers.CLIPTextConfig(**text, hidden_act="gelu" if kind == "sd2" else "quick_gelu"))
        )

    parts = {
        "unet": parity.randomise(diffusers.UNet2DConditionModel(**unet)),
        "vae": parity.randomise(diffusers.AutoencoderKL(**levels, norm_num_groups=4, latent_channels=4, scaling_factor=0.5)),
        "text_encoder": encoder("CLIPTextModel"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizers" / "one"),
        "scheduler": getattr(diffusers, name)(**options),
    }
    if large:
        parts |= {"text_encoder_2": encoder("CLIPTextModelWithProjection")}
        parts |= {"tokenizer_2": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizers" / "two")}
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def torch_answers(pipeline, x_T, weights, large):
    """diffusers' image of the prompts; and of its own pipeline with gradients on, the image before clamping and the gradients of <weights, image>."""
    torch = parity.original("torch")
    latents = torch.from_numpy(np.ascontiguousarray(parity.nchw(x_T)))
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 16, "width": 16}
    image = pipeline(PROMPT, negative_prompt=NEGATIVE, latents=latents.clone(), output_type="pt", **options).images
    texts = pipeline.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=NEGATIVE)
    names = ["prompt_embeds", "negative_prompt_embeds", *(["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if large else [])]
    inputs = dict(zip(names, texts, strict=False)) | {"latents": latents.requires_grad_()}
    wrt = {**inputs, "layer": dict(pipeline.unet.named_parameters())[LAYER]}
    wrt |= {name: getattr(pipeline, name).get_input_embeddings().weight for name in ENCODERS[: 1 + large]}
    with torch.enable_grad():
        x_0 = type(pipeline).__call__.__wrapped__(pipeline, output_type="latent", **inputs, **options).images
        decoded = pipeline.vae.decode(x_0 / pipeline.vae.config.scaling_factor).sample
        loss = (decoded * torch.from_numpy(np.ascontiguousarray(parity.nchw(weights)))).sum()
        gradients = torch.autograd.grad(loss, list(wrt.values()))
    return image.numpy(), decoded.detach().numpy(), {name: g.numpy() for name, g in zip(wrt, gradients, strict=True)}


def read(folder):
    """The modules, parameters, scheduler and tokens of a pipeline."""
    pipeline = load_pipeline(folder)
    names = {name.replace("tokenizer", "text_encoder"): folder for name, folder in pipeline.tokenizers.items()}
    tokens = {name: pipelines.tokenize(folder, [PROMPT, NEGATIVE], truncate=True) for name, folder in names.items()}
    return *pipelines.split(pipeline.components), aj.from_scheduler_config(pipeline.scheduler), tokens


def rows(both):
    return [jax.tree.map(lambda each, i=i: each[i : i + 1], both) for i in (0, 1)]


def test_image_of_stable_diffusion_2(tmp_path):
    """v-prediction, a padding of its own, another scheduler, rescaled guidance; and diffusers' clip_skip."""
    torch = parity.original("torch")
    theirs, x_T = write_pipeline(tmp_path, "sd2"), parity.draws(1, 8, 8, 4)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "guidance_rescale": 0.7, "height": 16, "width": 16, "output_type": "pt"}
    latents = torch.from_numpy(np.ascontiguousarray(parity.nchw(x_T)))
    image = theirs(PROMPT, negative_prompt=NEGATIVE, latents=latents, **options).images.numpy()
    object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)  # which diffusers 0.42 looks for, and transformers 5 does not have
    with torch.no_grad():
        skipped, _ = theirs.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=1)
    modules, params, scheduler, tokens = read(tmp_path / "pipeline")

    def answers(params, x_T):
        texts = [pipelines.encode_prompt(modules, params, tokens, clip_skip=skip) for skip in (0, 1)]
        options = {"scheduler": scheduler, "steps": STEPS, "guidance": GUIDANCE, "rescale": 0.7}
        return pipelines.text_to_image(modules, params, x_T, *rows(texts[0]), **options), rows(texts[1])[0]["encoder_hidden_states"]

    ours, text = jax.jit(answers, compiler_options=parity.QUICK)(params, jnp.asarray(x_T))
    assert parity.relative(text, skipped.numpy()) < 1e-4
    assert np.max(np.abs(parity.nchw(np.clip(ours / 2 + 0.5, 0, 1)) - image)) < 1e-3


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_image_and_gradients_are_those_of_diffusers(tmp_path, kind):
    """In the prompt's and the negative prompt's embeddings, the pooled ones, the tokens' embeddings, x_T, a LoRA; in the guidance by differences."""
    large = kind == "sdxl"
    x_T, weights = parity.draws(1, 8, 8, 4), parity.draws(1, 16, 16, 3, seed=1)
    image, decoded, expected = torch_answers(write_pipeline(tmp_path, kind), x_T, weights, large)
    modules, params, scheduler, tokens = read(tmp_path / "pipeline")
    embeds = {name: params[name]["text_model"]["embeddings"]["token_embedding"]["embedding"][tokens[name]] for name in tokens}
    lora = init_lora(params["unet"], TARGET, 2, jax.random.key(0), alpha=3.0)
    shift = {"encoder_hidden_states": jnp.zeros((2, 16, 16 if large else 8), jnp.float32)}
    shift |= {"text_embeds": jnp.zeros((2, 12), jnp.float32)} if large else {}

    def loss(embeds, shift, lora, x_T, guidance):
        both = pipelines.encode_prompt(modules, params, tokens, embeds=embeds)
        kept = {"wrap": with_lora} if kind == "sd1" else {}
        weights_ = {**params, "lora": lora} if kept else {**params, "unet": merge(params["unet"], lora)}
        options = {"scheduler": scheduler, "steps": STEPS, "guidance": guidance, **kept}
        ours = pipelines.text_to_image(modules, weights_, x_T, *rows(jax.tree.map(jnp.add, both, shift)), **options)
        return jnp.sum(jnp.asarray(weights) * ours), ours

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True), compiler_options=parity.QUICK)
    (_, ours), (of_embeds, of_shift, of_lora, of_x_T, of_guidance) = run(embeds, shift, lora, jnp.asarray(x_T), jnp.float32(GUIDANCE))
    found = {"latents": parity.nchw(of_x_T)}
    for name, prefix in (("encoder_hidden_states", ""), ("text_embeds", "pooled_"))[: 1 + large]:
        found |= {f"{prefix}prompt_embeds": of_shift[name][:1], f"negative_{prefix}prompt_embeds": of_shift[name][1:]}
    for name in tokens:
        found[name] = np.zeros_like(expected[name])
        np.add.at(found[name], tokens[name], np.asarray(of_embeds[name]))
    ((_, factors),) = lora.items()
    ((_, gradient),) = of_lora.items()
    found["layer"], expected["layer"] = gradient.up, 1.5 * np.asarray(factors.down).T @ expected["layer"].T  # the chain rule of W + 1.5 down up
    errors = {name: parity.relative(found[name], expected[name]) for name in expected}
    error = np.max(np.abs(parity.nchw(np.clip(ours / 2 + 0.5, 0, 1)) - image))
    print(kind, f"image {error:.1e}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert error < 1e-3
    assert parity.relative(parity.nchw(ours), decoded) < 1e-3
    assert max(errors.values()) < 1e-2
    high, low = (run(embeds, shift, lora, jnp.asarray(x_T), jnp.float32(GUIDANCE + d))[0][0] for d in (0.05, -0.05))
    np.testing.assert_allclose(of_guidance, (high - low) / 0.1, rtol=2e-2)


SD = UNet2DCondition(block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2)  # fmt: skip
XL = SD.clone(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36)
VAE = AutoencoderKL(
    block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4
)
TEXT = CLIPText(vocab_size=9, hidden_size=8, intermediate_size=8, projection_dim=8, num_hidden_layers=2, num_attention_heads=2)
SIMPLE = aj.from_scheduler_config({"_class_name": "DDIMScheduler"})
FLOW = aj.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})


def image(modules, cond=(1, 3, 8), uncond=None, x=(2, 8, 8, 4), scheduler=SIMPLE, **options):
    """The abstract image of freshly initialised modules."""
    params = {name: jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs)["params"] for name, module in modules.items()}

    def shaped(shape):
        if isinstance(shape, dict):
            return {name: shaped(each) for name, each in shape.items()}
        return None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(params, x, cond, uncond):
        return pipelines.text_to_image(modules, params, x, cond, uncond, scheduler=scheduler, steps=2, **options)

    return jax.eval_shape(call, params, shaped(x), shaped(cond), shaped(uncond))


def test_one_row_of_a_condition_is_every_latents():
    assert image({"unet": SD, "vae": VAE}).shape == (2, 16, 16, 3)
    assert image({"unet": XL, "vae": VAE}, {"encoder_hidden_states": (2, 3, 8), "text_embeds": (1, 12)}, tile=6).shape == (2, 16, 16, 3)
    assert image({"transformer": SD, "vae": VAE}, scheduler=FLOW).shape == (2, 16, 16, 3)  # whatever the network is
    assert pipelines.size_ids(64, 32, crop=(1, 2)).tolist() == [[64, 32, 1, 2, 64, 32]]


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="give both uncond and guidance"):
        image({"unet": SD, "vae": VAE}, guidance=2.0)
    with pytest.raises(ValueError, match="give both uncond and guidance"):
        image({"unet": SD, "vae": VAE}, uncond=(1, 3, 8))
    with pytest.raises(ValueError, match="encoder_hidden_states has 3 rows where x_T has 2"):
        image({"unet": SD, "vae": VAE}, cond=(3, 3, 8))
    with pytest.raises(ValueError, match=r"one of unet and transformer; this has \['vae'\]"):
        image({"vae": VAE})
    with pytest.raises(ValueError, match="no tokens for text_encoder_2: give a dict of tokens with text_encoder, text_encoder_2"):
        pipelines.encode_prompt({"unet": XL, "text_encoder": TEXT, "text_encoder_2": TEXT}, {}, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="give cond itself"):
        pipelines.encode_prompt({"transformer": SD, "text_encoder": TEXT}, {}, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"decoded by a vae, which this pipeline of \['unet'\] lacks"):
        image({"unet": SD})
    with pytest.raises(ValueError, match=r"wrap reads params\['lora'\], which is missing"):
        image({"unet": SD, "vae": VAE}, wrap=with_lora)
    with pytest.raises(ValueError, match=r"give aj\.from_scheduler_config"):
        image({"unet": SD, "vae": VAE}, scheduler={"_class_name": "DDIMScheduler"})
    for skip in (-1, TEXT.num_hidden_layers):  # SDXL leaves out one layer by itself
        with pytest.raises(ValueError, match=f"clip_skip={skip} leaves out more layers .* give 0 to {TEXT.num_hidden_layers - 1}"):
            pipelines.encode_prompt({"unet": XL, "text_encoder_2": TEXT}, {}, {"text_encoder_2": jnp.zeros((1, 4), jnp.int32)}, clip_skip=skip)


def test_a_condition_that_is_no_text_stays_as_it_is():
    """A class's network in the place of the text's: its labels are handed on as they are given."""
    labels = pipelines._condition({"transformer": DiT()}, jnp.zeros(1, jnp.int32), jnp.zeros((2, 4, 4, 4), jnp.float32))
    assert (labels.shape, labels.dtype) == ((2,), jnp.int32)
