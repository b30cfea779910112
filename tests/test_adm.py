"""ADM and its classifier give what the architecture says, to float32 rounding, over a table of options; and say what does not fit.

guided-diffusion is no package, so the original does not run here: the reference is torch code of our own (`guided.py`). The names of its tensors are
the original's state dict, and the sizes of the public checkpoints are those that it builds from the flags of its README.
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

from adjoint_jax import linen
from adjoint_jax.checkpoints import _models, _rules, load_model, save
from adjoint_jax.checkpoints._families import adm
from adjoint_jax.models import ADM, ADMClassifier
from adjoint_jax.models.adm._layers import Block, Settings
from adjoint_jax.models.adm._trunk import timestep_embedding

BASE = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
}
UNETS = {
    "plain": {"out_channels": 6, "num_heads": 4},
    "published": {"num_classes": 5, "use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16},
    "rest": {
        "conv_resample": False,
        "num_heads": 2,
        "num_heads_upsample": 4,
        "use_new_attention_order": True,
        "channel_mult": [2, 1],
        "attention_resolutions": [1, 2],
        "dropout": 0.1,
    },
}
CLASSIFIERS = {
    "adaptive": {"use_new_attention_order": True, "num_heads": 2, "channel_mult": [1]},
    "attention": {"num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True},
    "spatial": {"conv_resample": False, "channel_mult": [1, 1], "attention_resolutions": []},
    "spatial_v2": {"model_channels": 64, "channel_mult": [0.5]},
}
CASES = {f"unet {name}": {"_class_name": "ADM", **BASE, **case} for name, case in UNETS.items()}
CLASSES = {**BASE, "_class_name": "ADMClassifier", "out_channels": 7}
CASES |= {f"classifier {pool}": {**CLASSES, "pool": pool, **case} for pool, case in CLASSIFIERS.items()}
GRADIENTS = ("unet published", "classifier attention")
TIMES = np.array([3.5, 911.0], np.float32)
LABELS = np.array([1, 4], np.int32)


def checkpoint(folder, config):
    """A folder with the case's configuration and weights, and those weights."""
    table = _rules.rules(_models.read(config, "the case")[1], adm.LISTS)
    tensors = {name: guided.weight(name, rule.shape) for name, rule in table.items()}
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def reference(config, tensors):
    """The network of a configuration in torch, and the layers that it uses."""

    def heads(upsample):
        per_head, count = config.get("num_head_channels"), config.get("num_heads", 1)
        return lambda channels: channels // per_head if per_head else config.get("num_heads_upsample", count) if upsample else count

    net = guided.Reference(tensors, heads(False), config.get("use_new_attention_order", False))
    levels = len(config["channel_mult"])
    attended = [level for level in range(levels) if 2**level in config["attention_resolutions"]]
    options = config["num_res_blocks"], attended, config.get("resblock_updown"), config.get("conv_resample", True)

    def unet(x):
        emb = net.time("time_embed", TIMES, config["model_channels"])
        emb = emb + net["label_emb.weight"][net.torch.from_numpy(LABELS)] if "num_classes" in config else emb
        h, skips = net.encode(x, levels, *options, emb)
        net.heads = heads(True)
        return net.decode(h, skips, *options, emb)

    def classifier(x):
        h, skips = net.encode(x, levels, *options, net.time("time_embed", TIMES, config["model_channels"]))
        if config["pool"].startswith("spatial"):
            # The blocks that halve the resolution are the first of the next level's outputs.
            means = net.torch.cat([output.mean(dim=(2, 3)) for level in [*skips, [h]] for output in level], dim=1)
            hidden = net.layer("out.0", means)
            if config["pool"] == "spatial":
                return net.layer("out.2", hidden.clamp(min=0))
            return net.layer("out.3", net.silu(net.norm("out.1", hidden)))
        h = net.silu(net.norm("out.0", h))
        if config["pool"] == "adaptive":
            return net.layer("out.3", h.mean(dim=(2, 3), keepdim=True))[:, :, 0, 0]
        h = h.flatten(2)
        h = net.torch.cat([h.mean(dim=2, keepdim=True), h], dim=2) + net["out.2.positional_embedding"]
        h = net.attend(net.layer("out.2.qkv_proj", h), net.heads(h.shape[1]), new_order=True)
        return net.layer("out.2.c_proj", h)[:, :, 0]

    return net, unet if config["_class_name"] == "ADM" else classifier


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(tmp_path, case):
    config = CASES[case]
    net, function = reference(config, checkpoint(tmp_path, config))
    module, params = load_model(tmp_path)
    inputs = [jnp.asarray(TIMES), *([jnp.asarray(LABELS)] if "num_classes" in config else [])]
    image = config["_class_name"] == "ADM"
    x, cotangent = parity.draws(2, 8, 8, 3), parity.draws(2, *((8, 8) if image else ()), config["out_channels"], seed=1)
    layout = parity.nhwc if image else np.asarray
    network = functools.partial(module.apply, {"params": params})
    if case in GRADIENTS:
        y, gradient = parity.value_and_gradient(lambda x: network(x, *inputs), x, cotangent)
        expected, theirs = parity.torch_value_and_gradient(function, parity.nchw(x), parity.nchw(cotangent) if image else cotangent)
        assert parity.relative(gradient, parity.nhwc(theirs)) < 1e-3
    else:
        y = jax.jit(network, compiler_options=parity.QUICK)(jnp.asarray(x), *inputs)
        expected = function(net.torch.from_numpy(parity.nchw(x).copy())).numpy()
    assert parity.relative(y, layout(expected)) < 1e-4
    assert net.used == set(net.tensors)


@pytest.mark.parametrize("new_order", [False, True])
def test_blocks(new_order):
    settings = Settings(0.0, new_order, True, not new_order, new_order, 2, -1)
    kinds, changes = ("res", "attention", "down", "attention", "up"), {2: "down", 4: "up"}
    module, x, emb = Block(kinds, 64, settings), parity.draws(2, 8, 8, 32), parity.draws(2, 16, seed=1)
    tree = jax.eval_shape(lambda *inputs: module.init(jax.random.key(0), *inputs, True), jnp.asarray(x), jnp.asarray(emb))["params"]
    table = _rules.rules(tree, adm.LISTS)
    tensors = {name: guided.weight(name, rule.shape) for name, rule in table.items()}
    params = _rules.to_flax(adm.UNET, tree, list(tensors.items()), "the block", jnp.float32)
    ours = jax.jit(lambda *inputs: module.apply({"params": params}, *inputs, True), compiler_options=parity.QUICK)(jnp.asarray(x), jnp.asarray(emb))

    net = guided.Reference(tensors, lambda channels: 2, new_order)
    h, theirs = (net.torch.from_numpy(np.ascontiguousarray(value)) for value in (parity.nchw(x), emb))
    for i, kind in enumerate(kinds):
        if i in changes:
            h = net.change(str(i), h, changes[i], not new_order, True, theirs)
        else:
            h = net.attention(str(i), h) if kind == "attention" else net.res(str(i), h, theirs)
    assert parity.relative(ours, parity.nhwc(h)) < 1e-5
    assert net.used == set(net.tensors)


TINY = ADM(**{key: tuple(value) if isinstance(value, list) else value for key, value in BASE.items()})
SMALL = TINY.clone(num_classes=3, channel_mult=(1,), use_scale_shift_norm=True)  # one channel a group: a shift alone would do nothing
CLASSIFIER = ADMClassifier(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 1), num_head_channels=16, pool="attention")


@functools.cache
def shapes(module):
    return _models.shapes(module)


def random(module):
    table = _rules.rules(shapes(module), adm.LISTS)
    named = [(name, guided.weight(name, rule.shape)) for name, rule in table.items()]
    return _rules.to_flax(adm.UNET, shapes(module), named, "the weights", jnp.float32)


def test_what_is_saved_is_loaded(tmp_path):
    params = random(SMALL)
    save(tmp_path / "network", SMALL.clone(remat=True), params)
    again, loaded = load_model(tmp_path / "network")
    assert again == SMALL
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, loaded))


def test_remat_and_labels():
    """Recomputing blocks, and a label's embedding in place of the label, change neither value nor gradient; embedding and time have one."""
    x, t, labels, params = jnp.asarray(parity.draws(1, 4, 4, 3)), jnp.asarray(3.5, jnp.float32), jnp.asarray([2]), random(SMALL)

    def energy(x, t, y, remat):
        return jnp.sum(jnp.square(SMALL.clone(remat=remat).apply({"params": params}, x, t, y)))

    def both(x, t, y, labels):
        return jax.value_and_grad(energy, argnums=(0, 1))(x, t, labels, False), jax.value_and_grad(energy, argnums=(0, 1, 2))(x, t, y, True)

    embedded = params["label_emb"]["embedding"][labels]
    (value, gradients), (again, more) = jax.jit(both, compiler_options=parity.QUICK)(x, t, embedded, labels)
    np.testing.assert_allclose(value, again, rtol=1e-5)
    for ours, theirs in zip(gradients, more, strict=False):
        assert parity.relative(ours, theirs) < 1e-4
    assert all(np.abs(gradient).max() > 0 for gradient in more)


def test_a_learned_variance_is_left_out():
    module = SMALL.clone(out_channels=6)
    network, x = adm.adapt(module), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    args = {"params": shapes(module), "cond": jax.ShapeDtypeStruct((1,), jnp.int32)}
    assert jax.eval_shape(network, x, jnp.asarray(1.0, jnp.float32), args).shape == (1, 8, 8, 3)
    assert network == adm.adapt(module)
    assert hash(network) == hash(adm.adapt(module))
    assert adm.adapt(TINY) == linen(TINY)
    with pytest.raises(ValueError, match="3 to 5 channels"):
        adm.adapt(TINY.clone(out_channels=5))


MULTIPLIERS = {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
SIZES = {
    "64": (ADM, 64, 295_904_454, {"model_channels": 192, "num_res_blocks": 3, "num_classes": 1000, "use_new_attention_order": True}),
    "256": (ADM, 256, 553_838_086, {"num_classes": 1000}),
    "64 classifier": (ADMClassifier, 64, 65_438_568, {"num_res_blocks": 4}),
}


@pytest.mark.parametrize("name", SIZES)
def test_public_checkpoints_have_their_size(name):
    kind, size, count, options = SIZES[name]
    own = {"model_channels": 256, "out_channels": 6} if kind is ADM else {"pool": "attention"}
    rates = tuple(size // side for side in (32, 16, 8))
    shared = {"image_size": size, "channel_mult": MULTIPLIERS[size], "attention_resolutions": rates, "num_head_channels": 64}
    module = kind(**{**shared, "use_scale_shift_norm": True, "resblock_updown": True, **own, **options})
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(module))) == count


def out(module, *inputs, dtype=jnp.float32):
    """The abstract answer to inputs of the given shapes and dtypes."""
    inputs = [jax.ShapeDtypeStruct(*given) if isinstance(given, tuple) else given for given in inputs]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes(module))
    return jax.eval_shape(lambda params, *inputs: module.apply({"params": params}, *inputs), params, *inputs)


F, X, T = jnp.float32, ((2, 8, 8, 3), jnp.float32), ((2,), jnp.float32)


@pytest.mark.parametrize(("module", "dtype"), [(TINY, jnp.bfloat16), (CLASSIFIER, jnp.bfloat16), (CLASSIFIER.clone(pool="spatial_v2"), jnp.float16)])
def test_keeps_the_dtype(module, dtype):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(module, ((2, 8, 8, 3), dtype), T, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("label", [((), jnp.int32), ((2,), jnp.int32), ((128,), F), ((2, 128), F)])
def test_labels_are_numbers_or_embeddings(label):
    assert out(SMALL, X, T, label).shape == (2, 8, 8, 3)


ERRORS = {
    "channels": (TINY, [((2, 8, 8, 1), F), T], r"ADM takes x of shape \[B, H, W, 3\].*got \(2, 8, 8, 1\)"),
    "resolution": (TINY, [((2, 9, 8, 3), F), T], "multiples of 2"),
    "unconditional": (TINY, [X, T, ((2,), jnp.int32)], "must be None"),
    "conditional": (SMALL, [X, T], "give labels"),
    "embedding": (SMALL, [X, T, ((2,), F)], r"got \(2,\)"),
    "image size": (CLASSIFIER, [((2, 16, 16, 3), F), T], "must be 8 pixels high and wide"),
}
CONFIGURATIONS = {
    "groups": ({"model_channels": 48}, "do not split into 32 groups"),
    "heads": ({"num_heads": 3}, "num_heads=3 does not divide the 64 channels"),
    "head channels": ({"num_head_channels": 48}, "num_head_channels=48 does not divide"),
    "resolutions as a flag": ({"attention_resolutions": "32,16,8"}, "wrong kind"),
    "dimensions": ({"dims": 3}, "dims=3"),
    "pool": ({"pool": "mean"}, "pool='mean' is not known"),
    "heads of the pool": ({"pool": "attention"}, "counts its heads by num_head_channels"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, inputs, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, *inputs)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_refuses_a_configuration(case):
    options, message = CONFIGURATIONS[case]
    with pytest.raises(ValueError, match=message):
        _models.read({"_class_name": "ADMClassifier" if "pool" in options else "ADM", **BASE, **options}, "the file")


@pytest.mark.parametrize("dim", [8, 7])
def test_timestep_embedding(dim):
    t, half = np.array([0.0, 3.5, 999.0]), dim // 2
    angles = t[:, None] * np.exp(-np.log(1e4) * np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((3, dim % 2))], axis=1)
    ours = timestep_embedding(jnp.asarray(t, jnp.float32), dim)
    np.testing.assert_allclose(ours, expected, atol=1e-4)  # float32 angles near 1000 are exact to 6e-5
