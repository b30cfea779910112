"""DiT gives what diffusers' DiTTransformer2DModel gives, gradients and files included; and says what does not fit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from adjoint_jax.checkpoints import _models, load_model, save
from adjoint_jax.checkpoints._adapters import FirstChannels
from adjoint_jax.models import DiT
from adjoint_jax.models.dit._blocks import Block

BASE = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 2,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 3,
}
CASES = {
    "published": {},
    "sample_size": {"sample_size": 12},  # images stay 8 x 8: the positions are stretched
    "patch": {"patch_size": 4, "out_channels": None},
    "affine": {"norm_elementwise_affine": True, "attention_bias": False, "activation_fn": "geglu"},
    "norm_eps": {"norm_eps": 0.3, "activation_fn": "gelu", "num_layers": 1},  # of the block's second norm alone
}
TINY = DiT(**BASE)
TIMES, LABELS = np.array([3.25, 999.0], np.float32), np.array([1, 3])


@functools.cache
def original(case):
    return parity.randomise(parity.original("diffusers").DiTTransformer2DModel(**BASE | CASES[case]))


def torch_answer(model, x, t, cotangent):
    """The answer, in NHWC, and the gradients with respect to x and t."""
    torch = parity.original("torch")
    x, t = (torch.from_numpy(np.array(a)).requires_grad_() for a in (parity.nchw(x), t))
    y = model(x, t, torch.from_numpy(LABELS)).sample
    dx, dt = torch.autograd.grad(y, (x, t), torch.from_numpy(np.array(parity.nchw(cotangent))))
    return parity.nhwc(y.detach()), parity.nhwc(dx), dt.numpy()


@functools.cache
def compiled(module):
    def both(params, x, t, labels, cotangent):
        y, back = jax.vjp(lambda x, t: module.apply({"params": params}, x, t, labels), x, t)
        return y, *back(cotangent)

    return jax.jit(both, compiler_options=parity.QUICK)


def answer(module, params, x, cotangent, labels=LABELS):
    labels = jnp.asarray(labels, jnp.int32 if np.asarray(labels).dtype.kind == "i" else jnp.float32)
    return compiled(module)(params, jnp.asarray(x), jnp.asarray(TIMES), labels, jnp.asarray(cotangent))


def inputs(channels=4):
    return parity.draws(2, 8, 8, 2), parity.draws(2, 8, 8, channels, seed=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The tiny network of the original's file, its parameters, and the file's folder."""
    folder = tmp_path_factory.mktemp("dit")
    original("published").save_pretrained(folder)
    return *load_model(folder), folder


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(tmp_path, case):
    original(case).save_pretrained(tmp_path)
    module, params = load_model(tmp_path)
    x, cotangent = inputs(module.out_channels or module.in_channels)
    ours, theirs = answer(module, params, x, cotangent), torch_answer(original(case), x, TIMES, cotangent)
    assert ours[0].dtype == jnp.float32
    assert parity.relative(ours[0], theirs[0]) < 1e-4
    assert parity.relative(ours[1], theirs[1]) < 1e-3
    assert parity.relative(ours[2], theirs[2]) < 1e-3


def test_diffusers_reads_what_is_saved(tmp_path, published):
    module, params, _ = published
    save(tmp_path / "ours", module, params)
    again = parity.original("diffusers").DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert again.config.out_channels == 4
    for name, tensor in parity.tensors(original("published")):
        np.testing.assert_array_equal(dict(parity.tensors(again))[name], tensor)


def test_reads_files_of_the_older_class(published):
    module, _, folder = published
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
    old = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    assert _models.read(config | old, "file")[0] == module
    for wrong in ({"norm_type": "ada_norm_single"}, {"cross_attention_dim": 8}, {"caption_channels": 8}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            _models.read(config | wrong, "file")
    with pytest.raises(ValueError, match="norm_type='layer_norm'"):
        _models.read({key: value for key, value in config.items() if key != "norm_type"}, "file")


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_block(published, scale):
    """On its own; tokens near 1e-3 have a variance near the epsilons, 1e-6 and 1e-5, of the two norms."""
    torch, theirs, params = parity.original("torch"), original("published").transformer_blocks[1], published[1]["transformer_blocks_1"]
    x = scale * parity.draws(2, 5, 16)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), timestep=torch.from_numpy(TIMES), class_labels=torch.from_numpy(LABELS)).numpy()
        sinusoids = theirs.norm1.emb.time_proj(torch.from_numpy(TIMES)).numpy()
    attention = {"heads": 2, "head_dim": 8, "bias": True, "dropout": 0.0}
    block = Block(4, attention, {"activation": "gelu-approximate", "dropout": 0.0}, affine=False, eps=1e-5, deterministic=True)
    ours = jax.jit(block.apply, compiler_options=parity.QUICK)({"params": params}, jnp.asarray(x), jnp.asarray(sinusoids), jnp.asarray(LABELS))[0]
    assert parity.relative(ours, expected) < 1e-5


def test_oblong_latents(published):
    """diffusers embeds the positions of 4 x 12 but cannot put the patches together again: its tokens are taken before that."""
    torch, (module, params, _) = parity.original("torch"), published
    x, tokens = parity.draws(2, 4, 12, 2), []
    handle = original("published").proj_out_2.register_forward_hook(lambda _module, _inputs, y: tokens.append(y.detach().numpy()))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        original("published")(torch.from_numpy(parity.nchw(x).copy()), torch.from_numpy(TIMES), torch.from_numpy(LABELS))
    handle.remove()
    expected = np.einsum("bhwpqc->bhpwqc", tokens[0].reshape(2, 2, 6, 2, 2, 4)).reshape(2, 4, 12, 4)
    y = answer(module, params, x, np.zeros((2, 4, 12, 4), np.float32))[0]
    assert parity.relative(y, expected) < 1e-4


def parameters(module):
    """Random parameters of the right shapes, without compiling an initialisation."""
    leaves, tree = jax.tree.flatten(_models.shapes(module))
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * parity.draws(*leaf.shape, seed=i)) for i, leaf in enumerate(leaves)])


def test_labels_may_be_embeddings_and_blocks_may_be_recomputed():
    """One row a block gives what the labels give; one row for all what equal tables give. `remat` changes neither values nor gradients."""
    params, (x, cotangent) = parameters(TINY), inputs()
    expected = answer(TINY, params, x, cotangent)
    tables = [params[f"transformer_blocks_{i}"]["norm1"]["emb"]["class_embedder"]["embedding_table"]["embedding"] for i in range(2)]
    rows = np.stack([table[LABELS] for table in tables], axis=1)
    for got in (answer(TINY, params, x, cotangent, rows), answer(TINY.clone(remat=True), params, x, cotangent)):
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    first = params["transformer_blocks_1"]["norm1"]["emb"]["class_embedder"]["embedding_table"]
    first["embedding"] = tables[0]
    np.testing.assert_allclose(answer(TINY, params, x, cotangent, rows[:, 0])[0], answer(TINY, params, x, cotangent)[0], rtol=1e-4, atol=1e-5)


def test_the_answer_of_a_loaded_network_is_the_prediction():
    network = _models.family_of(TINY).adapt(TINY)
    assert isinstance(network, FirstChannels)
    args = {"params": shapes(TINY), "cond": jax.ShapeDtypeStruct((2,), jnp.int32)}
    x = jax.ShapeDtypeStruct((2, 8, 8, 2), jnp.float32)
    assert jax.eval_shape(network, x, jax.ShapeDtypeStruct((), jnp.float32), args).shape == x.shape


def test_published_size():
    """DiT-XL/2 as diffusers stores it: 28 times the embedders, and the positions are computed, not stored, so 256 and 512 pixels weigh the same."""
    for size in (32, 64):
        assert sum(leaf.size for leaf in jax.tree.leaves(_models.shapes(DiT(out_channels=8, sample_size=size)))) == 749_826_464
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    with torch.device("meta"):
        assert sum(p.numel() for p in diffusers.DiTTransformer2DModel(out_channels=8).parameters()) == 749_826_464


shapes = functools.cache(_models.shapes)


def out(module, x=(2, 8, 8, 2), t=(), labels=((2,), jnp.int32), dtype=jnp.float32, **options):
    """The abstract answer; labels are a shape and a dtype."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes(TINY))
    labels = None if labels is None else jax.ShapeDtypeStruct(*labels)
    x, t = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(t, jnp.float32)
    return jax.eval_shape(lambda params, *inputs: module.apply({"params": params}, *inputs, **options), params, x, t, labels)


@pytest.mark.parametrize("labels", [((), jnp.int32), ((16,), jnp.float32), ((2, 16), jnp.float32), ((2, 2, 16), jnp.float32)])
def test_labels_are_numbers_or_embeddings(labels):
    assert out(TINY, labels=labels).shape == (2, 8, 8, 4)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype(dtype):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(TINY, t=(2,), dtype=dtype).dtype == dtype


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_is_drawn_in_training_alone(remat):
    noisy = TINY.clone(dropout=0.5, remat=remat)
    assert out(noisy).shape == (2, 8, 8, 4)
    assert out(noisy, deterministic=False, rngs={"dropout": jax.random.key(0)}).shape == (2, 8, 8, 4)
    with pytest.raises(Exception, match="dropout"):
        out(noisy, deterministic=False)


ERRORS = {
    "channels": (TINY, {"x": (2, 8, 8, 3)}, r"\[B, H, W, 2\].*got \(2, 8, 8, 3\)"),
    "resolution": (TINY, {"x": (2, 9, 8, 2)}, "multiples of 2"),
    "activation": (TINY.clone(activation_fn="swiglu"), {}, "activation_fn='swiglu' is not known"),
    "positions": (TINY.clone(num_attention_heads=1, attention_head_dim=6), {}, "a multiple of 4.*got 6"),
    "unconditional": (TINY, {"labels": None}, "give class_labels, the null class being 3"),
    "label shape": (TINY, {"labels": ((3,), jnp.int32)}, r"got int32 \(3,\)"),
    "embedding shape": (TINY, {"labels": ((2, 8), jnp.float32)}, r"\[16\], \[2, 16\] or \[2, 2, 16\]; got float32 \(2, 8\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, **arguments)
