"""AutoencoderKL gives what diffusers' AutoencoderKL gives, over a table of options; files go both ways; tiles; and what does not fit is said."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from adjoint_jax.checkpoints import _families, _models, _rules, load_model, save
from adjoint_jax.models import AutoencoderKL, decode_tiled
from adjoint_jax.models.autoencoder_kl._blocks import ACTIVATIONS, Stage

TINY = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
TWO = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CASES = {
    "sd": {**TINY, **TWO},
    "flux": {
        **TINY,
        **TWO,
        "in_channels": 1,
        "out_channels": 2,
        "latent_channels": 3,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1159,
        "mid_block_add_attention": False,
        "act_fn": "mish",
    },
    "attention everywhere": {
        **TINY,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "act_fn": "GELU",
        "use_quant_conv": False,
    },
}
SMALL = AutoencoderKL(**{**TINY, **TWO})
ONE = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)  # one level
QUIET = 1e-3  # a first convolution so small that the epsilon of the norms behind it is seen


@functools.cache
def original(case):
    """diffusers' network of a case, with weights by the rule, a quiet first convolution, and log variances beyond both limits."""
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    network = parity.randomise(diffusers.AutoencoderKL(**CASES[case]))
    with torch.no_grad():
        for half in (network.encoder, network.decoder):
            half.conv_in.weight.mul_(QUIET)
            half.conv_in.bias.mul_(QUIET)
        last = network.quant_conv or network.encoder.conv_out
        last.bias[-2:] = torch.tensor([-60.0, 40.0])
    return network


@functools.cache
def ours(case):
    module, shapes = _models.read({"_class_name": "AutoencoderKL", **CASES[case]}, "the test")
    return module, _rules.to_flax(_models.family_of(module), shapes, parity.tensors(original(case)), "the test", jnp.float32)


def call(module, params, method):
    return lambda x: module.apply({"params": params}, x, method=method)


@pytest.mark.parametrize("case", CASES)
def test_encodes_as_diffusers(case):
    network, (module, params) = original(case), ours(case)
    side, latents = 4 * module.factor, 2 * module.latent_channels
    x, cotangent = parity.draws(2, module.in_channels, side, 8), parity.draws(2, latents, side // module.factor, 8 // module.factor, seed=1)
    y, gradient = parity.value_and_gradient(
        lambda x: jnp.concatenate(call(module, params, "encode")(x), axis=-1), parity.nhwc(x), parity.nhwc(cotangent)
    )

    def theirs(x):
        moments = network.encode(x).latent_dist
        return parity.original("torch").cat([moments.mean, moments.logvar], dim=1)

    expected, slope = parity.torch_value_and_gradient(theirs, x, cotangent)
    y = parity.nchw(y)
    assert np.all(y[:, -2] == -30)
    assert np.all(y[:, -1] == 20)
    assert np.all(expected[:, -2:] == y[:, -2:])
    assert parity.relative(y[:, :-2], expected[:, :-2]) < 1e-4
    assert parity.relative(parity.nchw(gradient), slope) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_decodes_as_diffusers(case):
    network, (module, params) = original(case), ours(case)
    z, cotangent = parity.draws(2, module.latent_channels, 4, 2), parity.draws(2, module.out_channels, 4 * module.factor, 2 * module.factor, seed=1)
    y, gradient = parity.value_and_gradient(call(module, params, "decode"), parity.nhwc(z), parity.nhwc(cotangent))
    expected, slope = parity.torch_value_and_gradient(lambda z: network.decode(z).sample, z, cotangent)
    assert parity.relative(parity.nchw(y), expected) < 1e-4
    assert parity.relative(parity.nchw(gradient), slope) < 1e-3


STAGES = {
    "down": (Stage(8, 1, 4, "silu", attention=False, resize="down"), "encoder.down_blocks.0", 8),
    "mid": (Stage(16, 2, 4, "silu", attention=True, bare=1), "decoder.mid_block", 16),
    "up": (Stage(16, 2, 4, "silu", attention=False, resize="up"), "decoder.up_blocks.0", 16),
}


@pytest.mark.parametrize("case", STAGES)
def test_a_stage_equals_diffusers(case):
    torch, (stage, name, channels) = parity.original("torch"), STAGES[case]
    half, part = name.split(".", 1)
    params, x = ours("sd")[1][half][part.replace(".", "_")], parity.draws(2, channels, 4, 6)
    with torch.no_grad():
        expected = original("sd").get_submodule(name)(torch.from_numpy(x)).numpy()
    y = jax.jit(stage.apply, compiler_options=parity.QUICK)({"params": params}, jnp.asarray(parity.nhwc(x)))
    assert parity.relative(parity.nchw(y), expected) < 1e-5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_diffusers(name):
    torch, activations = parity.original("torch"), parity.original("diffusers.models.activations")
    x = np.linspace(-6, 6, 25).astype(np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), activations.get_activation(name)(torch.from_numpy(x)).numpy(), atol=2e-6)


def same(ours, theirs):
    theirs = dict(parity.tensors(theirs))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("case", ["flux", "attention everywhere"])
def test_files_go_both_ways(tmp_path, case):
    network, (module, params) = original(case), ours(case)
    network.save_pretrained(tmp_path / "theirs")
    loaded, read = load_model(tmp_path / "theirs")
    assert loaded == module
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
    save(tmp_path / "ours", module, params)
    again = type(network).from_pretrained(tmp_path / "ours")
    same(dict(parity.tensors(network)), again)
    entries = {key: value for key, value in _models.describe(module).items() if not key.startswith("_")}
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in again.config.items() if key in entries} == entries


def test_reads_the_names_of_2022():
    module, params = ours("sd")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    named = parity.tensors(original("sd"))
    for new, name in old.items():
        named = [(key.replace(f".{new}.", f".{name}."), tensor) for key, tensor in named]
    assert sum(".proj_attn." in name for name, _ in named) == 4
    read = _rules.to_flax(_families.autoencoder_kl.FAMILY, _models.shapes(module), named, "the test", jnp.float32)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))


PUBLISHED = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
UNQUANTISED = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
COUNTS = {
    "Stable Diffusion 1 and 2": ({"sample_size": 512}, 83_653_863),
    "SDXL": ({"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True, "latents_mean": None, "latents_std": None}, 83_653_863),
    "Stable Diffusion 3": ({**UNQUANTISED, "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024}, 83_819_683),
    "Flux": ({**UNQUANTISED, "scaling_factor": 0.3611, "shift_factor": 0.1159, "mid_block_add_attention": True}, 83_819_683),
}


@pytest.mark.parametrize("case", COUNTS)
def test_published_sizes(case):
    options, count = COUNTS[case]
    module, shapes = _models.read({"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", **PUBLISHED, **options}, case)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert all(getattr(module, key) == value for key, value in options.items() if key != "sample_size")


def test_latents_are_shifted_and_scaled():
    z = jnp.asarray(parity.draws(1, 2, 2, 4))
    shifted = SMALL.clone(scaling_factor=0.3611, shift_factor=0.1159)
    np.testing.assert_allclose(shifted.to_latents(z), (z - 0.1159) * 0.3611, rtol=1e-6)
    mean, std = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)
    standard = SMALL.clone(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    np.testing.assert_allclose(standard.to_latents(z), (z - np.float32(mean)[None, None, None]) * 0.5 / np.float32(std)[None, None, None], rtol=1e-5)
    for module in (SMALL, shifted, standard):
        np.testing.assert_allclose(module.from_latents(module.to_latents(z)), z, rtol=1e-5, atol=1e-6)


def test_keeps_the_dtype():
    dtype = jnp.bfloat16
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _models.shapes(ONE))
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        y = jax.eval_shape(lambda p, x: ONE.apply({"params": p}, x), shapes, jax.ShapeDtypeStruct((1, 8, 8, 3), dtype))
    assert (y.shape, y.dtype) == ((1, 8, 8, 3), dtype)


def test_remat_changes_no_number():
    shapes = _models.shapes(ONE)
    params = jax.tree.map(lambda leaf: jnp.asarray(parity.draws(*leaf.shape) * np.float32(leaf.size) ** np.float32(-0.5)), shapes)
    z, cotangent = parity.draws(1, 2, 2, 4), parity.draws(1, 2, 2, 3, seed=1)
    plain, remat = (parity.value_and_gradient(call(m, params, "decode"), z, cotangent) for m in (ONE, ONE.clone(remat=True)))
    assert parity.relative(remat[0], plain[0]) < 1e-5
    assert parity.relative(remat[1], plain[1]) < 1e-4
    with jax.numpy_dtype_promotion("standard"):
        program = str(jax.make_jaxpr(call(ONE.clone(remat=True), params, None))(jnp.zeros((1, 2, 2, 3), jnp.float32)))
    assert len(re.findall(r"= (?:remat2?|checkpoint)\[", program)) == 1 + 2 + 2 * (2 + 1)  # down, up, the two middles


ERRORS = {
    "image": ({}, "encode", (1, 9, 8, 3), r"images of shape \[B, H, W, 3\], H and W multiples of 2; got \(1, 9, 8, 3\)"),
    "channels": ({}, "decode", (1, 8, 8, 3), r"latents of shape \[B, H, W, 4\]"),
    "blocks": ({"down_block_types": ("DownBlock2D",) * 2}, "encode", (1, 8, 8, 3), "DownBlock2D"),
    "levels": ({"up_block_types": ("UpDecoderBlock2D",)}, "encode", (1, 8, 8, 3), "1 block types"),
    "activation": ({"act_fn": "tanh"}, "encode", (1, 8, 8, 3), "act_fn='tanh'"),
    "groups": ({"norm_num_groups": 3}, "encode", (1, 8, 8, 3), "norm_num_groups=3 does not divide"),
    "scales": ({"latents_mean": (0.0,) * 4}, "to_latents", (1, 8, 8, 4), "do not go together"),
    "numbers": ({"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 4}, "from_latents", (1, 8, 8, 4), "give 4"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    options, method, shape, message = ERRORS[case]
    module, x = SMALL.clone(**options), jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, method=method), x)


class Pointwise(nn.Module):
    """A decoder that sees one pixel at a time, so that tiles make no error."""

    @nn.compact
    def decode(self, z):
        return jnp.repeat(jnp.repeat(jnp.sin(z) + z**3, 3, axis=1), 3, axis=2)


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(11, 4, 4, 2), (5, 13, 6, 0), (9, 10, 4, 1), (7, 7, 5, 2)])
def test_tiles_of_a_pointwise_decoder_make_no_error(height, width, tile, overlap):
    z, cotangent = parity.draws(2, height, width, 3), parity.draws(2, 3 * height, 3 * width, 3, seed=1)
    tiled = parity.value_and_gradient(lambda z: decode_tiled(Pointwise(), {}, z, tile=tile, overlap=overlap), z, cotangent)
    whole = parity.value_and_gradient(lambda z: Pointwise().apply({}, z, method="decode"), z, cotangent)
    assert parity.relative(tiled[0], whole[0]) < 1e-6
    assert parity.relative(tiled[1], whole[1]) < 1e-5


def test_tiles_are_decoded_alone_and_blended():
    module, params = ours("sd")
    decode = jax.jit(call(module, params, "decode"), compiler_options=parity.QUICK)
    z = parity.draws(1, 4, 7, 4)
    # Two tiles of 4 x 4 that overlap by one pixel of z, which is two of the image: weights 3/4, 1/4 of the left and 1/4, 3/4 of the right.
    left, right = np.asarray(decode(z[:, :, :4])), np.asarray(decode(z[:, :, 3:]))
    share = np.array([0.75, 0.25], np.float32)[:, None]
    expected = np.concatenate([left[:, :, :6], left[:, :, 6:] * share + right[:, :, :2] * share[::-1], right[:, :, 2:]], axis=2)
    tiled = functools.partial(decode_tiled, module, params, tile=4, overlap=1)
    assert parity.relative(jax.jit(tiled, compiler_options=parity.QUICK)(jnp.asarray(z)), expected) < 1e-5
    assert parity.relative(jax.jit(tiled, compiler_options=parity.QUICK)(jnp.asarray(z[:, :, :4])), left) < 1e-6


def test_tiles_err_less_than_those_of_diffusers():
    torch, network, (module, params) = parity.original("torch"), original("sd"), ours("sd")
    z = parity.draws(1, 4, 14, 14)
    with torch.no_grad():
        whole = network.decode(torch.from_numpy(z)).sample.numpy()
        network.tile_latent_min_size, network.tile_sample_min_size = 8, 16
        theirs = network.tiled_decode(torch.from_numpy(z)).sample.numpy()
    tiled = jax.jit(functools.partial(decode_tiled, module, params, tile=8, overlap=2), compiler_options=parity.QUICK)(jnp.asarray(parity.nhwc(z)))
    assert 0 < parity.relative(parity.nchw(tiled), whole) < parity.relative(theirs, whole)


def test_tiles_keep_memory_small():
    module = ONE.clone(mid_block_add_attention=False)

    def scratch(decode, width):
        z = jax.ShapeDtypeStruct((1, 8, width, 4), jnp.float32)
        gradient = jax.grad(lambda z, params: jnp.sum(decode(params, z) ** 2))
        return jax.jit(gradient).lower(z, _models.shapes(module)).compile().memory_analysis().temp_size_in_bytes

    def whole(params, z):
        return call(module, params, "decode")(z)

    def tiled(params, z):
        return decode_tiled(module, params, z, tile=8, overlap=2)

    one, images = scratch(whole, 8), 8 * 62 * 3 * 4
    assert scratch(tiled, 62) < 2 * one + 4 * images
    assert scratch(whole, 62) > 5 * one


@pytest.mark.parametrize(("tile", "overlap"), [(4, 3), (4, -1), (0, 0)])
def test_says_which_tiles_do_not_fit(tile, overlap):
    with pytest.raises(ValueError, match="overlap from 0 to half a tile"):
        decode_tiled(SMALL, {}, jnp.zeros((1, 8, 8, 4), jnp.float32), tile=tile, overlap=overlap)
