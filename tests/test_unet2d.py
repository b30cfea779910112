"""UNet2D gives what diffusers' UNet2DModel gives, to float32 rounding, over a table of options; and says what does not fit."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures import make_unet2d as reference
from parity import QUICK

from adjoint_jax.checkpoints import load_model
from adjoint_jax.models import UNet2D
from adjoint_jax.models.unet2d._layers import _norm, timestep_embedding

FIXTURES = Path(__file__).parent / "fixtures"
TINY = UNet2D(
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    attention_head_dim=None,
)


def checkpoint(folder, case):
    """The folder that diffusers would write for a case: its names and shapes from the fixture, its weights from the rule."""
    with np.load(FIXTURES / "unet2d.npz") as file:
        shapes, y = json.loads(zlib.decompress(file[f"{case}_shapes"].tobytes())), file[f"{case}_y"]
    tensors = {name: reference.weight(name, tuple(shape)) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **reference.BASE, **reference.CASES[case]}))
    return y


def answer(module, params, case, embed=False):
    x, labels = reference.inputs(case)
    if labels is not None:
        labels = jnp.asarray(labels, jnp.int32 if labels.dtype.kind == "i" else jnp.float32)
    labels = params["class_embedding"]["embedding"][labels] if embed else labels
    return jax.jit(module.apply, compiler_options=QUICK)({"params": params}, jnp.asarray(x), jnp.asarray(reference.TIMES), labels)


@pytest.mark.parametrize("case", reference.CASES)
def test_equals_diffusers(tmp_path, case):
    expected = checkpoint(tmp_path, case)
    y = answer(*load_model(tmp_path), case)
    assert y.dtype == jnp.float32
    assert np.max(np.abs(y - expected)) < 5e-6 * np.max(np.abs(expected))


def test_a_label_may_be_its_embedding(tmp_path):
    expected = checkpoint(tmp_path, "labels")
    y = answer(*load_model(tmp_path), "labels", embed=True)
    np.testing.assert_allclose(y, expected, atol=5e-6)


def out(module, x=(2, 8, 8, 1), t=(), labels=None, dtype=jnp.float32):
    """The abstract answer of a freshly initialised module; labels are a shape and a dtype."""
    x, t = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(t, jnp.float32)
    labels = None if labels is None else jax.ShapeDtypeStruct(*labels)

    def init_and_apply(x, t, labels):
        params = module.init(jax.random.key(0), x.astype(jnp.float32), t, labels)["params"]
        return module.apply({"params": jax.tree.map(lambda leaf: leaf.astype(dtype), params)}, x, t, labels)

    return jax.eval_shape(init_and_apply, x, t, labels)


@pytest.mark.parametrize("labels", [((), jnp.int32), ((2,), jnp.int32), ((32,), jnp.float32), ((2, 32), jnp.float32)])
def test_labels_are_numbers_or_embeddings(labels):
    assert out(TINY.clone(num_class_embeds=3), labels=labels).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype(dtype):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(TINY, t=(2,), dtype=dtype).dtype == dtype


ERRORS = {
    "channels": (TINY, {"x": (2, 8, 8, 3)}, r"\[B, H, W, 1\].*got \(2, 8, 8, 3\)"),
    "resolution": (TINY, {"x": (2, 9, 8, 1)}, "multiples of 2"),
    "block": (TINY.clone(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")), {}, "CrossAttnDownBlock2D"),
    "levels": (TINY.clone(up_block_types=("UpBlock2D",)), {}, "1 block types"),
    "shift": (TINY.clone(resnet_time_scale_shift="spatial"), {}, "resnet_time_scale_shift='spatial'"),
    "kind": (TINY.clone(class_embed_type="projection"), {}, "class_embed_type='projection'"),
    "heads": (TINY.clone(attention_head_dim=3), {}, "attention_head_dim=3 does not divide the 16 channels"),
    "unconditional": (TINY, {"labels": ((2,), jnp.int32)}, "must be None"),
    "conditional": (TINY.clone(num_class_embeds=3), {}, "give class_labels"),
    "float number": (TINY.clone(num_class_embeds=3), {"labels": ((2,), jnp.float32)}, r"got float32 \(2,\)"),
    "identity of integers": (TINY.clone(class_embed_type="identity"), {"labels": ((2,), jnp.int32)}, r"got int32 \(2,\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, **arguments)


@pytest.mark.parametrize(("dim", "flip", "shift"), [(8, False, 0), (8, True, 1), (7, False, 1)])
def test_timestep_embedding(dim, flip, shift):
    t, half = np.array([0.0, 3.5, 999.0]), dim // 2
    angles = t[:, None] * np.exp(-np.log(1e4) * np.arange(half) / (half - shift))
    parts = [np.cos(angles), np.sin(angles)] if flip else [np.sin(angles), np.cos(angles)]
    expected = np.concatenate([*parts, np.zeros((3, dim % 2))], axis=1)
    embedding = timestep_embedding(jnp.asarray(t, jnp.float32), dim, flip_sin_to_cos=flip, freq_shift=shift)
    np.testing.assert_allclose(embedding, expected, atol=1e-4)  # float32 angles near 1000 are exact to 6e-5


def test_group_norm_survives_a_large_mean():
    x = (1e3 + np.random.default_rng(0).normal(size=(1, 8, 8, 4))).astype(np.float32)
    grouped = x.astype(np.float64).reshape(64, 2, 2)
    expected = (grouped - grouped.mean((0, 2), keepdims=True)) / np.sqrt(grouped.var((0, 2), keepdims=True) + 1e-5)
    y = _norm(2, 1e-5, "norm").apply({"params": {"scale": jnp.ones(4, jnp.float32), "bias": jnp.zeros(4, jnp.float32)}}, jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(y).reshape(64, 2, 2), expected, atol=2e-3)
