"""Makes the observations that the configs of inpainting, deblurring and layout go back from, out of one sample of the embedded digits.

python examples/observe.py --label 5 --seed 3 --out configs/pictures      # the defaults

digit.png = x_0,    seen.png = mask (white where seen),    hidden.png = mask x_0 + noise,    blurred.png = K x_0 + noise
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

import adjoint_jax as aj
from adjoint_jax.experiments import command, pictures
from adjoint_jax.experiments.metrics import blurred
from adjoint_jax.experiments.run import write


@dataclass(frozen=True)
class Options:
    """Hides and blurs a sample."""

    out: str = "configs/pictures"
    """The folder to write into."""
    seed: int = 3
    """Seed of the sample and of the noise."""
    label: int = 5
    """The digit."""
    blur: float = 2.0
    """Standard deviation of the blur in pixels."""
    noise_level: float = 0.1
    """Standard deviation of the noise, pixels in [-1, 1]."""


def png(image: Any) -> bytes:
    """An image `[H, W, 1]` in [-1, 1], a pixel a pixel."""
    buffer = io.BytesIO()
    Image.fromarray(pictures.as_bytes(image[..., 0]), "L").save(buffer, "PNG")
    return buffer.getvalue()


def main(options: Options) -> None:
    network, params, process, prediction = aj.load()
    key_x, key_noise = jax.random.split(jax.random.key(options.seed))
    term = aj.DiffusionTerm(aj.cfg(network, 2.0), process, prediction)
    x_T = jax.random.normal(key_x, (1, 28, 28, 1))
    args = {"params": params, "cond": options.label, "uncond": 10}
    digit = jnp.clip(aj.sample(term, x_T, args, grid=aj.grids.log_snr(process, 20)), -1, 1)
    noise = options.noise_level * jax.random.normal(key_noise, digit.shape)
    seen = jnp.where(jnp.arange(28)[None, :, None, None] < 14, 1.0, -1.0) * jnp.ones_like(digit)
    made = {"digit": digit, "seen": seen, "hidden": jnp.where(seen > 0, digit + noise, -1), "blurred": blurred(digit, options.blur) + noise}
    write(Path(options.out), {f"{name}.png": png(image[0]) for name, image in made.items()})


if __name__ == "__main__":
    command(main, Options)
