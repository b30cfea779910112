"""DiffAE gives what the architecture says, to float32 rounding, over a table of options; and says what does not fit.

diffae is no package, so the original does not run here: the reference is torch code of our own (`guided.py`). The names of its tensors are the
original's state dict, and the sizes of the public checkpoints are those that it builds from its templates.
"""

import functools
import json

import guided
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy

from adjoint_jax.checkpoints import _models, _rules, load, load_model, save
from adjoint_jax.checkpoints._families import diffae
from adjoint_jax.models import DiffAE
from adjoint_jax.models.diffae._layers import Block, Settings

FAMILY = diffae.FAMILY
BASE = {
    "_class_name": "DiffAE",
    "image_size": 8,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "channel_mult": [1, 2],
    "embed_channels": 24,
    "enc_num_res_block": 1,
    "enc_out_channels": 24,
    "enc_channel_mult": [1, 1, 1],
    "resnet_two_cond": True,
    "enc_pool": "adaptivenonzero",
}
CASES = {
    "published": {},
    "lopsided": {
        "num_input_res_blocks": 1,
        "num_res_blocks": 2,
        "input_channel_mult": [2, 3],
        "resblock_updown": False,
        "conv_resample": False,
        "num_heads": 2,
        "use_new_attention_order": True,
    },
    "rest": {
        "num_input_res_blocks": 2,
        "num_head_channels": 8,
        "channel_mult": [1],
        "enc_channel_mult": None,
        "enc_attn_resolutions": [8],
        "resnet_cond_channels": 12,
        "enc_out_channels": 12,
    },
}
TIMES = np.array([3.5, 911.0], np.float32)


def weights(module):
    """Tensors under the original's names."""
    table = _rules.rules(shapes(module), FAMILY.lists)
    return {name: guided.weight(name, rule.shape) for name, rule in table.items()}


@functools.cache
def shapes(module):
    return _models.shapes(module)


def reference(config, tensors):
    """An image encoded and the same image denoised given the code, in torch, and the layers that this uses."""
    per_head, count = config.get("num_head_channels"), config.get("num_heads", 1)
    net = guided.Reference(tensors, lambda channels: channels // per_head if per_head else count, config.get("use_new_attention_order", False))
    options = config.get("resblock_updown", True), config.get("conv_resample", True)

    def attended(mult, resolutions):
        return [level for level in range(len(mult)) if config["image_size"] // 2**level in resolutions]

    def network(x):
        mult, side = config["enc_channel_mult"] or config["channel_mult"], config["attention_resolutions"]
        places = attended(mult, config.get("enc_attn_resolutions", side))
        h, _ = net.encode(x, len(mult), config["enc_num_res_block"], places, *options, prefix="encoder.")
        z = net.layer("encoder.out.3", net.silu(net.norm("encoder.out.0", h)).mean(dim=(2, 3), keepdim=True))[:, :, 0, 0]
        emb, mult = net.time("time_embed.time_embed", TIMES, config["model_channels"]), config["channel_mult"]
        layers = config.get("num_input_res_blocks", config["num_res_blocks"])
        h, skips = net.encode(x, len(mult), layers, attended(mult, side), *options, emb, z)
        return net.decode(h, skips, config["num_res_blocks"], attended(mult, side), *options, emb, z)

    return net, network


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(tmp_path, case):
    config = BASE | CASES[case]
    tensors = weights(_models.read(config, "the case")[0])
    safetensors.numpy.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    module, params = load_model(tmp_path)
    net, function = reference(config, tensors)

    def network(x):
        z = module.apply({"params": params}, x, method="encode")
        return module.apply({"params": params}, x, jnp.asarray(TIMES), z)

    x, cotangent = parity.draws(2, 8, 8, 3), parity.draws(2, 8, 8, 3, seed=1)
    if case == "published":
        y, gradient = parity.value_and_gradient(network, x, cotangent)
        expected, theirs = parity.torch_value_and_gradient(function, parity.nchw(x), parity.nchw(cotangent))
        assert parity.relative(gradient, parity.nhwc(theirs)) < 1e-3
    else:
        y = jax.jit(network, compiler_options=parity.QUICK)(jnp.asarray(x))
        expected = function(net.torch.from_numpy(parity.nchw(x).copy())).numpy()
    assert parity.relative(y, parity.nhwc(expected)) < 1e-4
    assert net.used == set(net.tensors)


@pytest.mark.parametrize("conditioned", [False, True])
def test_blocks(conditioned):
    kinds, changes = ("res", "attention", "down", "up"), {2: "down", 3: "up"}
    module = Block(kinds, 64, Settings(0.0, True, conditioned, False, 2, -1))
    x, emb, z = parity.draws(2, 8, 8, 32), parity.draws(2, 16, seed=1), parity.draws(2, 12, seed=2)
    inputs = [jnp.asarray(x), *((jnp.asarray(emb), jnp.asarray(z)) if conditioned else (None, None))]
    tree = jax.eval_shape(lambda *inputs: module.init(jax.random.key(0), *inputs, True), *inputs)["params"]
    tensors = {name: guided.weight(name, rule.shape) for name, rule in _rules.rules(tree, FAMILY.lists).items()}
    params = _rules.to_flax(FAMILY, tree, list(tensors.items()), "the block", jnp.float32)
    ours = jax.jit(lambda *inputs: module.apply({"params": params}, *inputs, True), compiler_options=parity.QUICK)(*inputs)

    net = guided.Reference(tensors, lambda channels: 2)
    h, *condition = (net.torch.from_numpy(np.ascontiguousarray(value)) for value in (parity.nchw(x), emb, z))
    condition = condition if conditioned else []
    for i, kind in enumerate(kinds):
        if i in changes:
            h = net.change(str(i), h, changes[i], conditioned, True, *condition)
        else:
            h = net.attention(str(i), h) if kind == "attention" else net.res(str(i), h, *condition)
    assert parity.relative(ours, parity.nhwc(h)) < 1e-5
    assert net.used == set(net.tensors)


TINY = DiffAE(
    image_size=8,
    model_channels=32,
    num_res_blocks=1,
    attention_resolutions=(),
    channel_mult=(1, 1),
    embed_channels=24,
    enc_num_res_block=1,
    enc_out_channels=24,
)


def test_what_is_saved_is_loaded(tmp_path):
    """Of a training checkpoint, the averaged weights."""
    tensors = weights(TINY)
    params = _rules.to_flax(FAMILY, shapes(TINY), list(tensors.items()), "the weights", jnp.float32)
    save(tmp_path / "network", TINY, params)
    again = load(tmp_path / "network")
    assert again.network.module == TINY
    training = [(f"ema_model.{name}", tensor) for name, tensor in tensors.items()] + [
        (f"model.{name}", 2 * tensor) for name, tensor in tensors.items()
    ]
    averaged = _rules.to_flax(FAMILY, shapes(TINY), [*training, ("x_T", np.zeros((1, 3)))], "training", jnp.float32)
    for tree in (again.params, averaged):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, tree))


def test_remat_and_gradients():
    """Recomputing the blocks changes neither value nor gradient; z_sem and the time have one."""
    module = TINY.clone(channel_mult=(1,))
    params = _rules.to_flax(FAMILY, shapes(module), list(weights(module).items()), "the weights", jnp.float32)
    inputs = jnp.asarray(parity.draws(1, 4, 4, 3)), jnp.asarray(3.5, jnp.float32), jnp.asarray(parity.draws(24, seed=1))

    def energy(remat, *inputs):
        return jnp.sum(jnp.square(module.clone(remat=remat).apply({"params": params}, *inputs)))

    def both(*inputs):
        return [jax.value_and_grad(energy, argnums=(1, 2, 3))(remat, *inputs) for remat in (False, True)]

    (value, gradients), (again, more) = jax.jit(both, compiler_options=parity.QUICK)(*inputs)
    np.testing.assert_allclose(value, again, rtol=1e-5)
    for ours, theirs in zip(gradients, more, strict=True):
        assert parity.relative(ours, theirs) < 1e-4
        assert np.abs(ours).max() > 0


SIZES = {
    "ffhq128": ({"image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "enc_channel_mult": (1, 1, 2, 3, 4, 4)}, 128_545_155, 24_673_536),
    "ffhq256": ({"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "enc_channel_mult": (1, 1, 2, 2, 4, 4, 4)}, 168_492_291, 30_150_400),
}


@pytest.mark.parametrize("name", SIZES)
def test_public_checkpoints_have_their_size(name):
    options, count, in_encoder = SIZES[name]
    tree = shapes(DiffAE(model_channels=128, **options))
    assert [sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for part in (tree, tree["encoder"])] == [count, in_encoder]


def out(module, *inputs, dtype=jnp.float32, method=None):
    """The abstract answer to inputs of the given shapes and dtypes."""
    inputs = [jax.ShapeDtypeStruct(*given) if given else None for given in inputs]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes(module))
    return jax.eval_shape(lambda params, *inputs: module.apply({"params": params}, *inputs, method=method), params, *inputs)


F, X, T, Z = jnp.float32, ((2, 8, 8, 3), jnp.float32), ((2,), jnp.float32), ((2, 24), jnp.float32)


def test_keeps_the_dtype():
    x = ((2, 8, 8, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(TINY, x, T, Z, dtype=jnp.bfloat16).dtype == jnp.bfloat16
        assert out(TINY, x, dtype=jnp.bfloat16, method="encode").dtype == jnp.bfloat16


ERRORS = {
    "channels": (TINY, [((2, 8, 8, 1), F), T, Z], r"images of shape \[B, H, W, 3\].*got \(2, 8, 8, 1\)"),
    "resolution": (TINY, [((2, 9, 8, 3), F), T, Z], "multiples of 2"),
    "no z": (TINY, [X, T, None], "cond is z_sem.*got None"),
    "z": (TINY, [X, T, ((2, 12), F)], r"`\[24\]` or `\[B, 24\]`.*got \(2, 12\)"),
}
CONFIGURATIONS = {
    "groups": ({"model_channels": 48}, "48 channels do not split into 32 groups"),
    "heads": ({"num_heads": 3}, "num_heads=3 does not divide the 32 channels"),
    "levels": ({"input_channel_mult": [1]}, "give input_channel_mult as many"),
    "image size": ({"image_size": 9}, "halves as often"),
    "latent": ({"latent_net_conf": {"num_layers": 10}}, "latent_net_conf"),
    "one condition": ({"resnet_two_cond": False}, "resnet_two_cond=False"),
    "pool": ({"enc_pool": "depthconv"}, "enc_pool='depthconv'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, inputs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, *inputs)


def test_encode_says_what_does_not_fit():
    with pytest.raises(ValueError, match="multiples of 2 here"):
        out(TINY, ((2, 9, 8, 3), F), method="encode")


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_refuses_a_configuration(case):
    options, message = CONFIGURATIONS[case]
    with pytest.raises(ValueError, match=message):
        _models.read(BASE | options, "the file")
