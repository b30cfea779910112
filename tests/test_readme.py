"""The README's library use runs as it stands, and the embedded digits are digits."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_network.lenet import load_lenet
from shared import shared

import adjoint_jax as aj

ROOT = Path(__file__).parent.parent


def test_the_ten_lines_run():
    code = re.search(r"<!-- use -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names, code = {}, code.replace("log_snr(process, 12)", "log_snr(process, 4)")  # for time
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, names)
    assert names["in_noise"].shape == (4, 28, 28, 1)
    assert np.isfinite(names["in_noise"]).all()
    assert abs(float(names["in_scale"])) > 0


def test_embedded_digits_read_as_their_class():
    """With guidance 2, at least 95 % of 40 samples in 12 steps; benchmarks/digits.py draws 500."""
    path = shared("data/mnist_lenet5.npz")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        network, params, process, prediction = aj.load()
        term = aj.DiffusionTerm(aj.cfg(network, 2.0), process, prediction)
        labels = jnp.arange(40) % 10
        args = {"params": params, "cond": labels, "uncond": jnp.full(40, 10)}
        run = jax.jit(lambda x, args: aj.sample(term, x, args, grid=aj.grids.log_snr(process, 12)))
        images = run(jax.random.normal(jax.random.key(5), (40, 28, 28, 1)), args)
        assert np.mean(np.argmax(load_lenet(path)(images), axis=1) == labels) >= 0.95


def test_weights_are_small():
    assert sum(file.stat().st_size for file in (Path(aj.__file__).parent / "assets").rglob("*.safetensors")) <= 4 * 2**20


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "examples/README.md", "examples/faces/README.md", "docs/mesh.md"])
def test_linked_files_and_those_of_commands_exist(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target
    for target in re.findall(r"(?:--config |python )([\w/]+\.\w+)", text):
        assert (ROOT / target).exists(), target
