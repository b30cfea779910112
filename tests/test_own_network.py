"""The examples of one's own network give the outputs that their originals gave; and all examples start."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative
from own_network.flow_vit import load_flow_vit
from own_network.mobileface import load_mobileface
from own_network.unet64 import load_unet64
from shared import ROOT, shared


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """JAX's own promotion rules, not this suite's."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_flow_vit():
    """Every label and the null class, at four times; embeddings in the labels' place give the same."""
    term, params = load_flow_vit(shared("data/mnist_flow_vit.npz"))
    with np.load(shared("data/mnist_flow_vit_fixture.npz")) as file:
        x, s, y, expected = (file[name] for name in ("x", "t", "y", "x1_pred"))
    for i in range(len(x)):
        image = jnp.asarray(x[i : i + 1]).transpose(0, 2, 3, 1)
        for cond in (int(y[i]), params["y_encoder.weight"][y[i : i + 1]]):
            found = term.network(image, 1 - s[i], {"params": params, "cond": cond})
            assert relative(found[0].transpose(2, 0, 1), expected[i]) < 1e-4


def test_unet64():
    with np.load(shared("data/wang64_fixture.npz")) as file:
        x, t, expected, products = (file[name] for name in ("x_nhwc", "t", "eps_nhwc", "alphas_cumprod"))
    term, params = load_unet64(shared("data/wang64_unet_uint8.npz"), products)
    network = jax.jit(lambda x, t: term.network(x, t, {"params": params}))
    assert sum(leaf.size for leaf in params.values()) == 63_200_387
    for i in range(len(x)):
        assert relative(network(x[i : i + 1], np.float32(t[i]))[0], expected[i]) < 1e-4


def test_mobileface():
    features, params = load_mobileface(shared("data/mobileface_v2.npz"), shared("data/MobileFace_Identification_V2-symbol.json"))
    with np.load(shared("data/mobileface_v2_fixture.npz")) as file:
        x, expected = file["x_nchw"], file["feat"]
    found = jax.jit(features)(params, jnp.asarray(x.transpose(0, 2, 3, 1)))
    for mine, theirs in zip(found, expected, strict=True):
        assert relative(mine, theirs) < 1e-4


def test_the_examples_start_as_their_commands_say():
    """`python examples/NAME.py` finds what it imports beside it, with nothing more on the path."""
    code = "import runpy, sys; sys.path[0] = 'examples'; [runpy.run_path(name, run_name='imported') for name in sys.argv[1:]]"
    names = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py"))
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, env=bare, check=True)
