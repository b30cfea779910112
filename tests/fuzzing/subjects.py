"""Small sound checkpoints with random weights, one of each family; a LoRA, a pipeline with its tokenizer, and single files to be converted."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from adjoint_jax import checkpoints, models
from adjoint_jax.checkpoints import _models, lora

UNET = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "norm_eps": 1e-6}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4}
VAE = {"block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
MODULES: dict[str, Any] = {
    "UNet2D": models.UNet2D(
        in_channels=1, out_channels=1, down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4, **UNET
    ),
    "UNet2DCondition": models.UNet2DCondition(
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, attention_head_dim=2, **UNET
    ),
    "AutoencoderKL": models.AutoencoderKL(**VAE, norm_num_groups=4, latent_channels=4),
    "CLIPText": models.CLIPText(vocab_size=11, projection_dim=6, with_projection=True, **TEXT),
    "CLIPVision": models.CLIPVision(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2, projection_dim=6,
        with_projection=True,
    ),
    "DiT": models.DiT(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=3
    ),
    "SD3Transformer": models.SD3Transformer(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "ADM": models.ADM(image_size=8, model_channels=32, num_res_blocks=1, attention_resolutions=(1,), channel_mult=(1,), num_classes=3, num_heads=2),
    "SongUNet": models.SongUNet(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, precond="edm"),
    "DiffAE": models.DiffAE(
        image_size=8, model_channels=32, num_res_blocks=1, embed_channels=16, enc_out_channels=16, attention_resolutions=(8,), channel_mult=(1,),
        enc_num_res_block=1,
    ),
    "ConvClassifier": models.ConvClassifier(features=(4, 4), classes=3, norm_num_groups=2),
}  # fmt: skip
LORA = r"mid_block/.*(attn1/to_q|proj_in|conv1)/|resnets_0/time_emb_proj/"
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
START, END = "<|startoftext|>", "<|endoftext|>"
ADM_OPTIONS = {"num_heads": 2, "image_size": 8}


class Subject(NamedTuple):
    """A sound checkpoint: its kind ("model", "lora", "pipeline", "tokenizer" or "convert"), where it lies, and what is read with it."""

    name: str
    kind: str
    path: Path
    modules: Any = None
    options: Any = None


def parameters(module: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), _models.shapes(module))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _tokenizer(folder: Path) -> None:
    letters = [*"lowes", *(f"{letter}</w>" for letter in "lowes"), "lo", "low</w>", START, END]
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(letters)})
    (folder / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\n")
    write_json(folder / "tokenizer_config.json", {"model_max_length": 6, "tokenizer_class": "CLIPTokenizer", "pad_token": END})
    write_json(folder / "special_tokens_map.json", {"bos_token": {"content": START, "lstrip": False}, "eos_token": END, "pad_token": END})


def _pipeline(folder: Path, params: dict[str, Any]) -> None:
    parts = {"unet": "UNet2DCondition", "vae": "AutoencoderKL", "text_encoder": "CLIPText"}
    for part, name in parts.items():
        checkpoints.save(folder / part, MODULES[name], params[name])
    _tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index)


def _ldm(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """A latent diffusion's file: UNet and autoencoder under their published names, and the schedule."""
    from adjoint_jax.checkpoints import _lora_names, _rules

    unet = MODULES["UNet2DCondition"]
    state = _rules.to_torch(_models.family_of(unet), _models.shapes(unet), params["UNet2DCondition"], "the fuzz")
    places = [name.rpartition(".") for name in state]
    stems = tuple(dict.fromkeys(stem for stem, _, _ in places))
    norms = {"norm1": "in_layers.0", "norm2": "out_layers.0"}

    def published(stem: str) -> str:
        base, _, last = stem.rpartition(".")
        if ".resnets." in stem and last in norms:
            return _lora_names.published_name(f"{base}.conv1", stems, 1).replace("in_layers.2", norms[last])
        return "out.0" if stem == "conv_norm_out" else _lora_names.published_name(stem, stems, 1)

    file = {f"model.diffusion_model.{published(stem)}.{last}": state[f"{stem}.{last}"] for stem, _, last in places}
    return file | {"betas": np.linspace(0.1, 0.2, 5, dtype=np.float32)}


def build(root: Path) -> list[Subject]:
    """Writes the checkpoints below a folder."""
    params = {name: parameters(module) for name, module in MODULES.items()}
    subjects = []
    for name, module in MODULES.items():
        checkpoints.save(root / name, module, params[name])
        subjects.append(Subject(name, "model", root / name))
    unet = MODULES["UNet2DCondition"]
    factors = lora.init_lora(params["UNet2DCondition"], LORA, 2, jax.random.key(0))
    rng = np.random.default_rng(1)
    factors = {path: each._replace(up=jnp.asarray(rng.normal(size=each.up.shape), jnp.float32)) for path, each in factors.items()}
    (root / "LoRA").mkdir()
    lora.save_lora(root / "LoRA", {"unet": factors}, {"unet": unet})
    subjects.append(Subject("LoRA", "lora", root / "LoRA", {"unet": unet}))
    _pipeline(root / "pipeline", params)
    subjects.append(Subject("pipeline", "pipeline", root / "pipeline"))
    _tokenizer(root / "tokenizer")
    subjects.append(Subject("tokenizer", "tokenizer", root / "tokenizer"))
    (root / "LDM").mkdir()
    safetensors.numpy.save_file(_ldm(params), root / "LDM" / "model.safetensors")
    heads = {"unet": {"attention_head_dim": 2, "norm_num_groups": 4, "norm_eps": 1e-6}}
    subjects.append(Subject("LDM", "convert", root / "LDM", options={"config": heads, "prediction": "epsilon"}))
    (root / "ADM file").mkdir()
    data = (root / "ADM" / "diffusion_pytorch_model.safetensors").read_bytes()
    (root / "ADM file" / "model.safetensors").write_bytes(data)
    subjects.append(Subject("ADM file", "convert", root / "ADM file", options={"config": ADM_OPTIONS}))
    return subjects
