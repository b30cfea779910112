"""Trains the embedded digit networks on MNIST: the class-conditional UNet (`unet`) and the classifier (`classifier`).

    python examples/train_digits.py unet --data ../shared/data/mnist.npz --out runs/unet
    python examples/train_digits.py classifier --steps 3000 --out runs/classifier

The UNet predicts v on the linear 1000-step schedule of DDPM, images in [-1, 1]; one label in ten becomes the null class, so that
guidance works. `training` has the loop, whose state a killed run goes on from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from training import PREDICTION, PROCESS, SCHEDULER, batch_indices, stratified, train

from adjoint_jax import checkpoints
from adjoint_jax.experiments import pictures
from adjoint_jax.experiments.options import guarded
from adjoint_jax.models import ConvClassifier, UNet2D
from adjoint_jax.networks import target
from adjoint_jax.splitting import level

UNET = UNet2D(
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_num_groups=8,
    num_class_embeds=11,
)
NULL_CLASS = 10
CLASSIFIER = ConvClassifier()
ATTACK = 4.0
"""l2 radius of the classifier's adversarial training, pixels in [-1, 1]."""


@dataclass(frozen=True)
class Config:
    model: tyro.conf.Positional[Literal["unet", "classifier"]]
    data: Path = Path("../shared/data/mnist.npz")
    out: Path = Path("runs/digits")
    steps: int = 6000
    batch: int = 64
    learning_rate: float = 2e-3
    ema: float = 0.999
    save_every: int = 250
    seed: int = 0


def unet_loss(params, images, labels, key):
    """Mean squared error of v at stratified times."""
    key_t, key_eps, key_null = jax.random.split(key, 3)
    size = len(images)
    t = jnp.floor(stratified(key_t, size) * SCHEDULER["num_train_timesteps"]).astype(jnp.int32)
    at = level(PROCESS, t.astype(jnp.float32)[:, None, None, None])
    eps = jax.random.normal(key_eps, images.shape)
    labels = jnp.where(jax.random.bernoulli(key_null, 0.1, labels.shape), NULL_CLASS, labels)
    v = UNET.apply({"params": params}, at.alpha * images + at.sigma * eps, t, labels)
    return jnp.mean((v - target(PREDICTION, at, images, eps)) ** 2)


def attacked(loss, images, radius):
    """`images`, each moved by three normalised gradient steps to where `loss` is larger, inside the l2 ball of `radius` `[B]`."""

    def scaled(x, to):
        norm = jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True)) + 1e-12
        return x * to(norm) / norm

    radius = radius[:, None, None, None]
    change = jnp.zeros_like(images)
    for _ in range(3):
        gradient = jax.grad(lambda change: loss(images + change))(change)
        change = scaled(change + scaled(gradient, lambda _: radius / 2), lambda norm: jnp.minimum(norm, radius))
    return jax.lax.stop_gradient(images + change)


def classifier_loss(params, images, labels, key):
    """Cross entropy on images moved by up to two pixels, blurred by a little noise and attacked in an l2 ball of up to ATTACK.

    Adversarial training makes the gradient in the image one that a person would recognise, which is what a metric to climb needs.
    """
    key_shift, key_noise, key_level, key_radius = jax.random.split(key, 4)
    shifts = jax.random.randint(key_shift, (len(images), 2), -2, 3)
    images = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(images, shifts)
    level = 0.3 * jax.random.uniform(key_level, (len(images), 1, 1, 1))
    images = images + level * jax.random.normal(key_noise, images.shape)

    def loss(images):
        logits: Any = CLASSIFIER.apply({"params": params}, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return loss(attacked(loss, images, jax.random.uniform(key_radius, labels.shape, maxval=ATTACK)))


def main(config: Config) -> None:
    with np.load(config.data) as data:
        images, labels = (jnp.asarray(data[f"{name}_train"]) for name in "xy")
    loss, module = (unet_loss, UNET) if config.model == "unet" else (classifier_loss, CLASSIFIER)

    def batch_loss(params, indices, key):
        x = pictures.from_bytes(images[indices, :, :, None])
        return loss(params, x, labels[indices].astype(jnp.int32), key)

    x, y = jnp.zeros((1, 28, 28, 1)), jnp.zeros(1, jnp.int32)
    inputs = (x, y, y) if module is UNET else (x,)
    params = jax.jit(module.init)(jax.random.key(config.seed), *inputs)["params"]
    average = train(batch_loss, params, lambda step: batch_indices(config, step, len(images)), config)
    checkpoints.save(config.out / "model", module, average, SCHEDULER if module is UNET else None)


if __name__ == "__main__":
    guarded(lambda argv: main(tyro.cli(Config, args=argv)), sys.argv[1:])
