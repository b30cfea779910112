"""Trains the face model of the morphing experiment: a diffusion autoencoder of grey 64 x 64 faces (DiffAE, CVPR 2022, made small).

    python examples/train_faces.py --data ../shared/data --out runs/faces
    python examples/train_faces.py --out runs/faces --export runs/faces/so_far      # what is averaged so far, beside a run or after a kill

    v(x_t, t, z),   z = encoder(x_0) `[B, 128]`   (one in ten replaced by zeros, so that guidance in z works).

Provenance: FER2013 (`fer48_10k.npz`, 10 000 faces of 48 x 48, Kaggle competition data, research use) enlarged to 64 x 64, and the ORL
faces (`orl_faces.npz`, Samaria & Harter 1994, AT&T/Olivetti, 40 people of ten images), cropped to a square and reduced to 64 x 64, all
but images 9 and 10 of each person. A quarter of each batch is ORL. Weights made by this script name both.

The network sees 2 x 2 pixels as the four channels of one (an orthogonal map, so that Gaussian noise stays Gaussian): a quarter of the work.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from training import PREDICTION, PROCESS, SCHEDULER, STATE, batch_indices, stratified, train

from adjoint_jax import checkpoints
from adjoint_jax.experiments import command, pictures
from adjoint_jax.models import ConvClassifier, UNet2D
from adjoint_jax.networks import target
from adjoint_jax.splitting import level

WIDTHS = (32, 64, 128)
UNET = UNet2D(
    in_channels=4,
    out_channels=4,
    block_out_channels=WIDTHS,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=32,
    norm_num_groups=8,
    class_embed_type="identity",
)
EMBEDDING = 4 * WIDTHS[0]
"""Numbers in z: the width that the UNet adds to its time embedding."""
ENCODER = ConvClassifier(features=(24, 48, 96, 128), classes=EMBEDDING, in_channels=1)


@dataclass(frozen=True)
class Config:
    data: Path = Path("../shared/data")
    out: Path = Path("runs/faces")
    steps: int = 3600
    batch: int = 32
    learning_rate: float = 1e-3
    ema: float = 0.999
    save_every: int = 50
    seed: int = 0
    export: Path | None = None
    """Trains nothing and writes the averaged weights of the run in --out to this folder."""


def blocks(images: Any) -> Any:
    """`[B, 2H, 2W, 1]` as `[B, H, W, 4]`."""
    b, height, width, _ = images.shape
    return images.reshape(b, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 2, 4).reshape(b, height // 2, width // 2, 4)


def pixels(blocks: Any) -> Any:
    """The inverse of `blocks`."""
    b, height, width, _ = blocks.shape
    return blocks.reshape(b, height, width, 2, 2).transpose(0, 1, 3, 2, 4).reshape(b, 2 * height, 2 * width, 1)


def resized(images: np.ndarray, side: int = 64) -> np.ndarray:
    """Bytes `[n, H, W]` as bytes `[n, side, side]`."""
    made = jax.image.resize(jnp.asarray(images, jnp.float32), (len(images), side, side), "linear")
    return np.asarray(jnp.round(jnp.clip(made, 0, 255)), np.uint8)


def orl_faces(data: Path, side: int = 64) -> np.ndarray:
    """ORL `[40, 10, side, side]`, uint8: the middle square of each image."""
    with np.load(data / "orl_faces.npz") as file:
        return resized(file["x"][:, 14:106], side).reshape(-1, 10, side, side)


def faces(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """FER2013 `[10000, 64, 64]` and ORL `[40, 10, 64, 64]`, uint8."""
    with np.load(data / "fer48_10k.npz") as file:
        fer = np.concatenate([resized(part) for part in np.split(file["x"], 10)])
    return fer, orl_faces(data)


def loss(params: Any, images: Any, key: Any) -> Any:
    """Mean squared error of v at stratified times, images `[B, 64, 64]` of bytes, each mirrored or not."""
    key_t, key_eps, key_null, key_flip = jax.random.split(key, 4)
    size = len(images)
    x = pictures.from_bytes(images[..., None])
    x = jnp.where(jax.random.bernoulli(key_flip, 0.5, (size, 1, 1, 1)), x[:, :, ::-1], x)
    z: Any = ENCODER.apply({"params": params["encoder"]}, x)
    z = jnp.where(jax.random.bernoulli(key_null, 0.1, (size, 1)), 0, z)
    t = jnp.floor(stratified(key_t, size) * SCHEDULER["num_train_timesteps"]).astype(jnp.int32)
    at, x_0 = level(PROCESS, t.astype(jnp.float32)[:, None, None, None]), blocks(x)
    eps = jax.random.normal(key_eps, x_0.shape)
    v = UNET.apply({"params": params["unet"]}, at.alpha * x_0 + at.sigma * eps, t, z)
    return jnp.mean((v - target(PREDICTION, at, x_0, eps)) ** 2)


def export(average: Any, folder: Path) -> None:
    """Writes averaged weights, in half precision, as the folders `unet` and `encoder`, in the place of an earlier export."""
    average = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), average)
    for name, module, schedule in (("unet", UNET, SCHEDULER), ("encoder", ENCODER, None)):
        fresh, target = folder / f"{name}.new", folder / name
        shutil.rmtree(fresh, ignore_errors=True)
        checkpoints.save(fresh, module, average[name], schedule)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def main(config: Config) -> None:
    if config.export is not None:
        state = serialization.msgpack_restore((config.out / STATE).read_bytes())
        return export(state["average"], config.export)
    fer, orl = faces(config.data)
    shown = orl[:, :8].reshape(-1, 64, 64)
    quarter = config.batch // 4

    def items(step: int) -> np.ndarray:
        known = np.random.default_rng((config.seed, 1, step)).integers(len(shown), size=quarter)
        return np.concatenate([fer[batch_indices(config, step, len(fer))[quarter:]], shown[known]])

    key = jax.random.key(config.seed)
    z, x = jnp.zeros((1, EMBEDDING)), jnp.zeros((1, 64, 64, 1))
    params = {"unet": jax.jit(UNET.init)(key, blocks(x), jnp.zeros(1), z)["params"], "encoder": jax.jit(ENCODER.init)(key, x)["params"]}
    return export(train(loss, params, items, config), config.out)


if __name__ == "__main__":
    command(main, Config)
