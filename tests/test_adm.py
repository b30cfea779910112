"""ADM and its classifier give what the architecture says, to float32 rounding, over a table of options; and say what does not fit.

guided-diffusion is no package, so the original does not run here: the reference is torch code of our own (`guided.py`). The names of its tensors are
the original's state dict, and the sizes of the public checkpoints are those that it builds from the flags of its README.
"""

import json

import guided
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy

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
        **{"conv_resample": False, "num_heads": 2, "num_heads_upsample": 4, "use_new_attention_order": True},
        **{"channel_mult": [2, 1], "attention_resolutions": [1, 2], "dropout": 0.1},
    },
}
CLASSIFIERS = {
    "adaptive": {"use_new_attention_order": True, "num_heads": 2},
    "attention": {"num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True},
    "spatial": {"conv_resample": False, "channel_mult": [1, 1]},
    "spatial_v2": {"model_channels": 64, "channel_mult": [0.5, 1]},
}
CASES = {f"unet {name}": {"_class_name": "ADM", **BASE, **case} for name, case in UNETS.items()}
CASES |= {
    f"classifier {pool}": {"_class_name": "ADMClassifier", **BASE, "out_channels": 7, "pool": pool, **case} for pool, case in CLASSIFIERS.items()
}
TIMES = np.array([3.5, 911.0], np.float32)
LABELS = np.array([1, 4], np.int32)


def checkpoint(folder, config):
    """A folder with the case's configuration and weights, and those weights."""
    shapes = _rules.rules(_models.read(config, "the case")[1], adm.LISTS)
    tensors = {name: guided.weight(name, rule.shape) for name, rule in shapes.items()}
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
            means = net.torch.cat([output.mean(dim=(2, 3)) for output in [*sum(skips, []), h]], dim=1)
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
    y, gradient = parity.value_and_gradient(lambda x: module.apply({"params": params}, x, *inputs), x, cotangent)
    expected, their_gradient = parity.torch_value_and_gradient(function, parity.nchw(x), parity.nchw(cotangent) if image else cotangent)
    assert parity.relative(y, parity.nhwc(expected) if image else expected) < 1e-4
    assert parity.relative(gradient, parity.nhwc(their_gradient)) < 1e-3
    assert net.used == set(net.tensors)


@pytest.mark.parametrize("new_order", [False, True])
def test_blocks(new_order):
    settings = Settings(0.0, new_order, True, not new_order, new_order, 2, -1)
    kinds, changes = ("res", "attention", "down", "attention", "up"), {2: "down", 4: "up"}
    module, x, emb = Block(kinds, 64, settings), parity.draws(2, 8, 8, 32), parity.draws(2, 16, seed=1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(x), jnp.asarray(emb), True)["params"]
    table = _rules.rules(shapes, adm.LISTS)
    tensors = {name: guided.weight(name, rule.shape) for name, rule in table.items()}
    params = _rules.to_flax(adm.UNET, shapes, list(tensors.items()), "the block", jnp.float32)
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
CLASSIFIER = ADMClassifier(image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 1), num_head_channels=16, pool="attention")


def random(module, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), _models.shapes(module))


def test_what_is_saved_is_loaded(tmp_path):
    module = TINY.clone(num_classes=3, remat=True)
    params = random(module)
    save(tmp_path / "network", module, params)
    again, loaded = load_model(tmp_path / "network")
    assert again == module.clone(remat=False)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, loaded))


def test_remat_and_the_gradient_in_label_and_time():
    """Recomputing blocks changes neither values nor gradients; a label's embedding and the time have one."""
    module, x, y = TINY.clone(num_classes=3), jnp.asarray(parity.draws(1, 4, 4, 3)), jnp.asarray([2])
    params = random(module)
    t, table = jnp.asarray(3.5, jnp.float32), params["label_emb"]["embedding"]

    def energy(remat, x, t, y):
        return jnp.sum(jnp.square(module.clone(remat=remat).apply({"params": params}, x, t, y)))

    def all_of_them(x, t, y, labels):
        both = [jax.value_and_grad(lambda *inputs: energy(remat, *inputs), argnums=(0, 1, 2))(x, t, y) for remat in (False, True)]
        return both, energy(False, x, t, labels)

    (plain, again), by_label = jax.jit(all_of_them, compiler_options=parity.QUICK)(x, t, table[y], y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)
    np.testing.assert_allclose(plain[0], by_label, rtol=1e-5)
    assert all(np.abs(gradient).max() > 0 for gradient in plain[1])


def test_a_learned_variance_is_left_out():
    module = TINY.clone(out_channels=6, num_classes=3)
    network, x = adm.adapt(module), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    args = {"params": _models.shapes(module), "cond": jax.ShapeDtypeStruct((1,), jnp.int32)}
    assert jax.eval_shape(network, x, jnp.asarray(1.0, jnp.float32), args).shape == (1, 8, 8, 3)
    assert network == adm.adapt(module) and hash(network) == hash(adm.adapt(module))
    assert network.channels == 3 and adm.adapt(TINY) == network.network.__class__(TINY, network.network.call)
    with pytest.raises(ValueError, match="3 to 5 channels"):
        adm.adapt(TINY.clone(out_channels=5))


LARGE = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
PUBLISHED = {"use_scale_shift_norm": True, "resblock_updown": True}
SIZES = {
    "64": (ADM, 64, 295_904_454, {"model_channels": 192, "num_res_blocks": 3, "num_classes": 1000, "use_new_attention_order": True}),
    "128": (ADM, 128, 421_529_606, {"num_heads": 4, "num_head_channels": -1, "num_classes": 1000}),
    "256": (ADM, 256, 553_838_086, {"num_classes": 1000}),
    "256 unconditional": (ADM, 256, 552_814_086, {}),
    "512": (ADM, 512, 558_997_638, {"num_classes": 1000}),
    "64 classifier": (ADMClassifier, 64, 65_438_568, {"num_res_blocks": 4}),
    "128 classifier": (ADMClassifier, 128, 42_568_040, {}),
    "256 classifier": (ADMClassifier, 256, 54_096_360, {}),
    "512 classifier": (ADMClassifier, 512, 54_448_360, {}),
}


@pytest.mark.parametrize("name", SIZES)
def test_public_checkpoints_have_their_size(name):
    kind, size, count, options = SIZES[name]
    own = {"model_channels": 256, "out_channels": 6} if kind is ADM else {"pool": "attention"}
    rates = tuple(size // resolution for resolution in (32, 16, 8))
    module = kind(
        **{"image_size": size, "channel_mult": LARGE[size], "attention_resolutions": rates, "num_head_channels": 64, **PUBLISHED, **own, **options}
    )
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(_models.shapes(module))) == count


def out(module, *inputs, dtype=jnp.float32):
    """The abstract answer to inputs of the given shapes and dtypes."""
    inputs = [jax.ShapeDtypeStruct(*given) if isinstance(given, tuple) else given for given in inputs]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _models.shapes(module))
    return jax.eval_shape(lambda params, *inputs: module.apply({"params": params}, *inputs), params, *inputs)


F, X, T = jnp.float32, ((2, 8, 8, 3), jnp.float32), ((2,), jnp.float32)
COND = TINY.clone(num_classes=3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("module", [TINY, CLASSIFIER, CLASSIFIER.clone(pool="spatial_v2")], ids=["unet", "attention", "spatial"])
def test_keeps_the_dtype(module, dtype):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(module, ((2, 8, 8, 3), dtype), T, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("label", [((), jnp.int32), ((2,), jnp.int32), ((128,), F), ((2, 128), F)])
def test_labels_are_numbers_or_embeddings(label):
    assert out(COND, X, T, label).shape == (2, 8, 8, 3)


ERRORS = {
    "channels": (TINY, [((2, 8, 8, 1), F), T], r"ADM takes x of shape \[B, H, W, 3\].*got \(2, 8, 8, 1\)"),
    "resolution": (TINY, [((2, 9, 8, 3), F), T], "multiples of 2"),
    "unconditional": (TINY, [X, T, ((2,), jnp.int32)], "must be None"),
    "conditional": (COND, [X, T], "give labels"),
    "embedding": (COND, [X, T, ((2,), F)], r"got an embedding of shape \(2,\)"),
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
    np.testing.assert_allclose(
        timestep_embedding(jnp.asarray(t, jnp.float32), dim), expected, atol=1e-4
    )  # float32 angles near 1000 are exact to 6e-5
