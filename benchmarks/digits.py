"""How good the embedded digit network is: 500 guided samples judged by a LeNet that our training never saw.

    python benchmarks/digits.py --lenet ../shared/data/mnist_lenet5.npz --out runs/digits

Prints the share of samples that read as their class, per class and in all, for several guidance scales, and writes a grid of them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import adjoint_jax as aj
from adjoint_jax.checkpoints import EMBEDDED
from adjoint_jax.experiments import pictures

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from own_network.lenet import load_lenet


@dataclass(frozen=True)
class Config:
    model: Path = EMBEDDED / "digits"
    lenet: Path = Path("../shared/data/mnist_lenet5.npz")
    out: Path = Path("runs/digits")
    samples: int = 500
    steps: int = 20
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0)
    seed: int = 1


def main(config: Config) -> None:
    from PIL import Image

    network, params, process, prediction = aj.load(config.model)
    judge = load_lenet(config.lenet)
    grid = aj.grids.log_snr(process, config.steps)
    labels = jnp.arange(config.samples) % 10
    x_T = jax.random.normal(jax.random.key(config.seed), (config.samples, 28, 28, 1))

    @jax.jit
    def draw(x_T, labels, scale):
        term = aj.DiffusionTerm(aj.cfg(network, scale), process, prediction)
        return aj.sample(term, x_T, {"params": params, "cond": labels, "uncond": jnp.full_like(labels, 10)}, grid=grid)

    config.out.mkdir(parents=True, exist_ok=True)
    for scale in config.guidance:
        parts = [draw(x_T[i : i + 100], labels[i : i + 100], scale) for i in range(0, config.samples, 100)]
        images = np.concatenate(parts)
        right = np.argmax(judge(jnp.asarray(images)), axis=1) == np.asarray(labels)
        per_class = " ".join(f"{right[np.asarray(labels) == k].mean():.2f}" for k in range(10))
        print(f"guidance {scale:g}: {100 * right.mean():.1f} % of {config.samples} read as their class; per class {per_class}", flush=True)
        tiles = pictures.as_bytes(images[:100, :, :, 0]).reshape(10, 10, 28, 28)
        Image.fromarray(tiles.transpose(0, 2, 1, 3).reshape(280, 280)).resize((560, 560), 0).save(config.out / f"samples_{scale:g}.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
