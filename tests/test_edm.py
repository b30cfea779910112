"""SongUNet and DhariwalUNet give what a second implementation gives, over a table of options; their files, and how they are preconditioned.

The original (NVlabs/edm) is no package: `Reference` is written from the paper's appendix F.2, in torch and NCHW, with the original's tensor names.
The original itself, run beside these modules by hand, agreed to 1e-6 in the values, and to 1.4e-6 in the gradients, of raw networks of every option.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy

import adjoint_jax as aj
from adjoint_jax.checkpoints import _models, _rules, load, load_model, save
from adjoint_jax.checkpoints._families import edm as files
from adjoint_jax.models import DhariwalUNet, SongUNet
from adjoint_jax.models.edm._blocks import Block, Style
from adjoint_jax.models.edm._inputs import conditionings

SONG = {"eps": 1e-6, "scale": 0.5**0.5, "adaptive": False, "projected": True, "head": None}
ADM = {"eps": 1e-5, "scale": 1.0, "adaptive": True, "projected": False, "head": 64}
NCSN = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
SKIP = {"encoder_type": "skip", "decoder_type": "skip"}
BOTH = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "num_blocks": 1}
CASES = {
    "DDPM++": ("SongUNet", {"model_channels": 8, "channel_mult": [1, 2], "attn_resolutions": [4], "label_dim": 5, "augment_dim": 9}),
    "NCSN++": ("SongUNet", {"model_channels": 8, "channel_mult": [1, 2, 2], "attn_resolutions": [], **NCSN}),
    "skip": ("SongUNet", {"model_channels": 8, "channel_mult": [2, 1], "attn_resolutions": [8], **NCSN, **SKIP}),
    "ADM": ("DhariwalUNet", {"model_channels": 32, "channel_mult": [1, 4], "attn_resolutions": [8, 4], "label_dim": 5, "augment_dim": 9}),
}
X, COTANGENT = parity.draws(2, 8, 8, 3), parity.draws(2, 8, 8, 3, seed=1)
TIMES, LABELS, AUGMENT = np.array([-0.7, 0.9], np.float32), parity.draws(2, 5, seed=2), parity.draws(2, 9, seed=3)


class Reference:
    """Draws each weight when it is first asked for; `state` is then the state dict."""

    def __init__(self, style, taps):
        self.torch = parity.original("torch")
        self.F, self.style, self.state = self.torch.nn.functional, style, {}
        f = self.torch.tensor(taps, dtype=self.torch.float32)
        self.filter = f.outer(f)[None, None] / f.sum() ** 2

    def weight(self, name, *shape):
        scale = 5 if name.endswith("freqs") else 1
        return self.state.setdefault(name, scale * self.torch.from_numpy(parity.weight(name, shape)))

    def dense(self, name, x, width, bias=True):
        return self.F.linear(x, self.weight(f"{name}.weight", width, x.shape[1]), self.weight(f"{name}.bias", width) if bias else None)

    def conv(self, name, x, width, size, resample="", fused=False):
        c = x.shape[1]
        if resample:
            self.state[f"{name}.resample_filter"] = self.filter
        pad = self.filter.shape[-1] // 2 - 1
        if resample == "up":
            x = self.F.conv_transpose2d(x, 4 * self.filter.repeat(c, 1, 1, 1), groups=c, stride=2, padding=pad)
        if resample == "down" and not fused:
            x = self.F.conv2d(x, self.filter.repeat(c, 1, 1, 1), groups=c, stride=2, padding=pad)
        if size:
            x = self.F.conv2d(x, self.weight(f"{name}.weight", width, c, size, size), padding=size // 2 + pad * fused)
        if fused:
            x = self.F.conv2d(x, self.filter.repeat(width, 1, 1, 1), groups=width, stride=2)
        return x + self.weight(f"{name}.bias", width)[:, None, None] if size else x

    def norm(self, name, x):
        c = x.shape[1]
        return self.F.group_norm(x, min(32, c // 4), self.weight(f"{name}.weight", c), self.weight(f"{name}.bias", c), self.style["eps"])

    def block(self, name, x, emb, width, resample="", attention=False):
        style, silu, skip = self.style, self.F.silu, x
        h = self.conv(f"{name}.conv0", silu(self.norm(f"{name}.norm0", x)), width, 3, resample)
        emb = self.dense(f"{name}.affine", emb, width * (1 + style["adaptive"]))[..., None, None]
        norm1 = f"{name}.norm1"
        h = self.norm(norm1, h) * (1 + emb[:, :width]) + emb[:, width:] if style["adaptive"] else self.norm(norm1, h + emb)
        h = self.conv(f"{name}.conv1", silu(h), width, 3)
        if resample or x.shape[1] != width:
            skip = self.conv(f"{name}.skip", x, width, int(style["projected"] or x.shape[1] != width), resample)
        x = (skip + h) * style["scale"]
        heads = 1 if style["head"] is None else width // style["head"]
        if not attention or not heads:
            return x
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * width, 1)
        q, k, v = (qkv[:, i::3].unflatten(1, (heads, -1)).flatten(3) for i in range(3))  # q, k, v alternate
        scores = self.torch.einsum("bhcq,bhck->bhqk", q, k) / (width // heads) ** 0.5
        a = self.torch.einsum("bhqk,bhck->bhcq", scores.softmax(-1), v).reshape(x.shape)
        return (x + self.conv(f"{name}.proj", a, width, 1)) * style["scale"]

    def sinusoids(self, t, width, fourier, endpoint):
        k = self.torch.arange(width // 2, dtype=self.torch.float32)
        frequencies = 2 * np.pi * self.weight("map_noise.freqs", width // 2) if fourier else 1e4 ** (-k / (width // 2 - endpoint))
        angles = t[:, None] * frequencies
        return self.torch.cat([angles.sin(), angles.cos()] if endpoint else [angles.cos(), angles.sin()], 1)

    def embedding(self, o, t, labels, augment):
        song, silu = self.style is SONG, self.F.silu
        width, wide = o["model_channels"] * o.get("channel_mult_noise", 1), 4 * o["model_channels"]
        emb = self.sinusoids(t, width, o.get("embedding_type") == "fourier", song)
        if song and labels is not None:
            emb = emb + self.dense("map_label", labels * 5**0.5, width)
        emb = emb if augment is None else emb + self.dense("map_augment", augment, width, bias=False)
        emb = self.dense("map_layer1", silu(self.dense("map_layer0", emb, wide)), wide)
        if not song and labels is not None:
            emb = emb + self.dense("map_label", labels, wide, bias=False)
        return silu(emb)

    def __call__(self, o, x, t, labels=None, augment=None):
        song, silu, base, mult = self.style is SONG, self.F.silu, o["model_channels"], o["channel_mult"]
        emb, encoder, last = self.embedding(o, t, labels, augment), o.get("encoder_type"), len(mult) - 1
        attends, aux = [8 >> i in o["attn_resolutions"] for i in range(len(mult))], x
        skips = [x := self.conv("enc.8x8_conv", x, base if song else base * mult[0], 3)]
        for i, m in enumerate(mult):
            at = f"enc.{8 >> i}x{8 >> i}"
            if i:
                skips.append(x := self.block(f"{at}_down", x, emb, x.shape[1], "down"))
                if encoder == "skip":
                    aux = self.conv(f"{at}_aux_down", aux, 0, 0, "down")
                    skips[-1] = x = x + self.conv(f"{at}_aux_skip", aux, x.shape[1], 1)
                if encoder == "residual":
                    skips[-1] = x = aux = (x + self.conv(f"{at}_aux_residual", aux, x.shape[1], 3, "down", fused=True)) / 2**0.5
            skips.append(x := self.block(f"{at}_block0", x, emb, base * m, attention=attends[i]))
        image = 0
        for i in reversed(range(len(mult))):
            at = f"dec.{8 >> i}x{8 >> i}"
            if i == last:
                x = self.block(f"{at}_in1", self.block(f"{at}_in0", x, emb, x.shape[1], attention=True), emb, x.shape[1])
            else:
                x = self.block(f"{at}_up", x, emb, x.shape[1], "up")
            for j in (0, 1):
                attention = attends[i] and (j == 1 or not song)
                x = self.block(f"{at}_block{j}", self.torch.cat([x, skips.pop()], 1), emb, base * mult[i], attention=attention)
            if song and (i == 0 or o.get("decoder_type") == "skip"):
                image = image if i == last or o.get("decoder_type") != "skip" else self.conv(f"{at}_aux_up", image, 0, 0, "up")
                image = image + self.conv(f"{at}_aux_conv", silu(self.norm(f"{at}_aux_norm", x)), 3, 3)
        return image if song else self.conv("out_conv", silu(self.norm("out_norm", x)), 3, 3)


def write(folder, state, config):
    safetensors.numpy.save_file({name: tensor.numpy() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(tmp_path, case):
    kind, options = CASES[case]
    reference, torch = Reference(SONG if kind == "SongUNet" else ADM, options.get("resample_filter", [1, 1])), parity.original("torch")
    labelled = "label_dim" in options
    cond = [torch.from_numpy(LABELS), torch.from_numpy(AUGMENT)] if labelled else []

    def theirs(x):
        return reference(options, x, torch.from_numpy(TIMES), *cond)

    y, gradient = parity.torch_value_and_gradient(theirs, parity.nchw(X), parity.nchw(COTANGENT))
    state = {f"model.{name}" if labelled else name: tensor for name, tensor in reference.state.items()}  # with the wrapper's prefix, or without
    write(tmp_path, state, {"_class_name": kind, **BOTH, **options})
    module, params = load_model(tmp_path)
    given = {"class_labels": jnp.asarray(LABELS), "augment_labels": jnp.asarray(AUGMENT)} if labelled else None
    ours = parity.value_and_gradient(lambda x: module.apply({"params": params}, x, jnp.asarray(TIMES), given), X, COTANGENT)
    assert ours[0].dtype == jnp.float32
    assert parity.relative(ours[0], parity.nhwc(y)) < 1e-4
    assert parity.relative(ours[1], parity.nhwc(gradient)) < 1e-3


BLOCKS = {
    "projected, filtered": (SONG, (1, 3, 3, 1), 8, 8, "down", True),
    "up": (SONG, (1, 3, 3, 1), 8, 12, "up", False),
    "six taps": (ADM, (1, -2, 4, 5, 3, 1), 8, 8, "up", True),
    "two heads": (ADM, (1, 1), 64, 128, "", True),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_equals_the_reference(case):
    """On inputs as small as 1e-3, where the epsilon of the norms shows."""
    o, taps, width, features, resample, attention = BLOCKS[case]
    reference, torch = Reference(o, taps), parity.original("torch")
    x, emb = 1e-3 * parity.draws(2, 4, 4, width), parity.draws(2, 6, seed=1)
    y = reference.block("b", torch.from_numpy(parity.nchw(x).copy()), torch.from_numpy(emb), features, resample, attention)
    style = Style(o["eps"], o["scale"], o["adaptive"], taps, o["projected"], o["head"], 0.0)
    block, emb = Block(features, style, resample, attention), jnp.asarray(emb)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, emb, True), jnp.asarray(x))["params"]
    named = [(name[2:], tensor.numpy()) for name, tensor in reference.state.items() if "filter" not in name]
    params = _rules.to_flax(_models.FAMILIES[0], shapes, named, "the reference", jnp.float32)
    ours = jax.jit(lambda x: block.apply({"params": params}, x, emb, True), compiler_options=parity.QUICK)(jnp.asarray(x))
    assert parity.relative(ours, parity.nhwc(y)) < 1e-5


def count(module):
    flat = jax.tree_util.tree_leaves_with_path(_models.shapes(module))
    return sum(int(np.prod(leaf.shape)) for path, leaf in flat if "freqs" not in str(path))  # constants, which torch counts as a buffer


CIFAR, PLUS = {"channel_mult": (2, 2, 2)}, {name: tuple(value) if isinstance(value, list) else value for name, value in NCSN.items()}
COUNTS = {
    "cifar10-32x32-cond-vp": (SongUNet, 32, {**CIFAR, "label_dim": 10, "augment_dim": 9}, 55_735_299),
    "cifar10-32x32-cond-ve": (SongUNet, 32, {**CIFAR, **PLUS, "label_dim": 10, "augment_dim": 9}, 56_400_643),
    "ffhq-64x64-uncond-vp": (SongUNet, 64, {"augment_dim": 9}, 61_805_571),
    "imagenet-64x64-cond-adm": (DhariwalUNet, 64, {"label_dim": 1000}, 295_899_267),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if i % 2 else []) for i, case in enumerate(COUNTS)])
def test_published_sizes(case):
    """The public checkpoints: what the original's modules count with these options (the paper says 296 million of the last)."""
    module, resolution, options, parameters = COUNTS[case]
    assert count(module(resolution, 3, 3, **options)) == parameters


TINY = SongUNet(4, 1, 1, label_dim=3, augment_dim=2, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), precond="edm")


def parameters(module):
    shapes = _models.shapes(module)
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * parity.draws(*leaf.shape, seed=i)) for i, leaf in enumerate(leaves)])


LABELLINGS = {
    "none": (None, np.zeros((2, 3))),
    "one for all": (2, np.eye(3)[[2, 2]]),
    "integers": (np.array([0, 2], np.int32), np.eye(3)[[0, 2]]),
    "vector": (np.array([0.5, 1, 2], np.float32), np.array([[0.5, 1, 2]] * 2)),
    "dict": ({"class_labels": np.array([2, 1], np.int32), "augment_labels": None}, np.eye(3)[[2, 1]]),
    "out of range": (np.array([-1, 3], np.int32), np.full((2, 3), np.nan)),
}


@pytest.mark.parametrize("case", LABELLINGS)
def test_labels(case):
    cond, expected = LABELLINGS[case]
    labels, augment = conditionings(TINY, cond, jnp.zeros((2, 4, 4, 1), jnp.float32))
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(augment, np.zeros((2, 2)))
    assert labels.dtype == augment.dtype == jnp.float32


def test_remat_dropout_and_gradients_in_the_conditioning():
    x, t, cotangent = jnp.asarray(parity.draws(2, 4, 4, 1)), jnp.asarray(TIMES), jnp.asarray(parity.draws(2, 4, 4, 1, seed=1))
    params, cond = parameters(TINY), {"class_labels": jnp.asarray(LABELS[:, :3]), "augment_labels": jnp.asarray(AUGMENT[:, :2])}

    def gradients(module, params):
        return jax.grad(lambda *inputs: jnp.vdot(cotangent, module.apply({"params": inputs[0]}, x, *inputs[1:])), (0, 1, 2))(params, t, cond)

    def run(params):
        forgetful = TINY.clone(dropout=0.0, label_dropout=1.0, remat=True)
        dropped = forgetful.apply({"params": params}, x, t, cond["class_labels"], deterministic=False, rngs={"dropout": jax.random.key(0)})
        return gradients(TINY, params), gradients(TINY.clone(remat=True), params), dropped, TINY.apply({"params": params}, x, t)

    with jax.numpy_dtype_promotion("standard"):
        plain, remat, dropped, unlabelled = jax.jit(run, compiler_options=parity.QUICK)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)
    np.testing.assert_allclose(dropped, unlabelled, rtol=1e-5, atol=1e-6)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(plain[1:]))


def out(module, x=(2, 4, 4, 1), cond=None, dtype=jnp.float32):
    """The abstract answer of a freshly initialised module; conditionings are shapes and dtypes."""

    def init_and_apply(x, t, cond):
        params = module.init(jax.random.key(0), x.astype(jnp.float32), t, cond)["params"]
        return module.apply({"params": jax.tree.map(lambda leaf: leaf.astype(dtype), params)}, x, t, cond)

    return jax.eval_shape(init_and_apply, jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct((), jnp.float32), cond)


ADM_TINY = DhariwalUNet(4, 1, 1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=())


@pytest.mark.parametrize("module", [TINY, TINY.clone(embedding_type="fourier"), ADM_TINY], ids=["DDPM++", "NCSN++", "ADM"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype(module, dtype):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        assert out(module, dtype=dtype).dtype == dtype


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


ERRORS = {
    "channels": (TINY, {"x": (2, 4, 4, 3)}, r"\[B, H, W, 1\].*got \(2, 4, 4, 3\)"),
    "side": (ADM_TINY, {"x": (2, 5, 4, 1)}, "multiples of 2"),
    "resolution": (ADM_TINY.clone(img_resolution=5), {}, "img_resolution that is a multiple of 2"),
    "width": (TINY.clone(model_channels=18), {}, "18 channels do not split into min"),
    "heads": (ADM_TINY.clone(model_channels=352, channel_mult=(1,)), {}, "352 channels do not split into the 5 heads"),
    "embedding": (TINY.clone(embedding_type="learned"), {}, "embedding_type='learned' is not known"),
    "encoder": (TINY.clone(encoder_type="dense"), {}, "encoder_type='dense' is not known"),
    "filter": (TINY.clone(resample_filter=(1, 2, 1)), {}, "even number of taps"),
    "unconditional": (ADM_TINY, {"cond": array(2, dtype=jnp.int32)}, "takes no class_labels"),
    "unaugmented": (ADM_TINY, {"cond": {"augment_labels": array(9)}}, "takes no augment_labels"),
    "name": (TINY, {"cond": {"labels": array(3)}}, r"conditionings \['labels'\]"),
    "number of classes": (TINY, {"cond": array(2, 4)}, r"got float32 \(2, 4\)"),
    "integer vectors": (TINY, {"cond": array(2, 3, dtype=jnp.int32)}, r"got int32 \(2, 3\)"),
    "integer augmentation": (TINY, {"cond": {"augment_labels": array(2, dtype=jnp.int32)}}, r"augment_labels are floats .* got int32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    module, arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        out(module, **arguments)


class Raw(SongUNet):
    """F(x, t) = sin(x) + cos(t), with the fields that say how it is preconditioned."""

    @nn.compact
    def __call__(self, x, t):
        return jnp.sin(x) + jnp.cos(t)


@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 60.0])
def test_preconditioning_is_that_of_table_1(precond, sigma):
    x, d = sigma * np.linspace(-2, 2, 7), 0.7
    time = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + sigma**2)) - 0.1) / 19.9
    c_skip, c_out, c_in, c_noise = {
        "edm": (d**2 / (sigma**2 + d**2), sigma * d / np.sqrt(sigma**2 + d**2), 1 / np.sqrt(sigma**2 + d**2), np.log(sigma) / 4),
        "vp": (1, -sigma, 1 / np.sqrt(sigma**2 + 1), 999 * time),
        "ve": (1, sigma, 1, np.log(0.5 * sigma)),
    }[precond]
    module = Raw(8, 1, 1, precond=precond, sigma_data=d)
    process, prediction = files.process(module, {})
    answer = files.adapt(module)(jnp.asarray(x), jnp.asarray(sigma), {"params": {}})
    denoised = answer if prediction == "x0" else x - sigma * answer
    np.testing.assert_allclose(denoised, c_skip * x + c_out * (np.sin(c_in * x) + np.cos(c_noise)), rtol=1e-9, atol=1e-12)
    assert type(process) is aj.EDM


@pytest.mark.parametrize("module", [TINY, TINY.clone(embedding_type="fourier", precond="vp")], ids=["edm", "vp"])
def test_save_load_and_differentiate_a_sample(tmp_path, module):
    weights = parameters(module)
    save(tmp_path / "net", module, weights)
    network, params, process, prediction = load(tmp_path / "net")
    jax.tree.map(np.testing.assert_array_equal, params, weights)
    assert hash(network) == hash(files.adapt(module)), "another trace for each load"
    term, grid = aj.DiffusionTerm(network, process, prediction), aj.grids.edm(process, 3)

    def loss(x, hot):
        return jnp.sum(aj.sample(term, 80 * x, {"params": params, "cond": hot}, grid=grid, solver=aj.DDIM()) ** 2)

    x, hot, direction = (jnp.asarray(parity.draws(*shape, seed=i), jnp.float64) for i, shape in enumerate([(2, 4, 4, 1), (2, 3), (2, 3)]))
    run = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=parity.QUICK)
    with jax.numpy_dtype_promotion("standard"):
        (_, (in_x, in_labels)), (above, _), (below, _) = (run(x, hot + step * direction) for step in (0, 1e-3, -1e-3))
    assert np.isfinite(in_x).all()
    assert np.abs(in_x).max() > 0
    np.testing.assert_allclose(jnp.vdot(in_labels, direction), (above - below) / 2e-3, rtol=1e-3)


CONFIG = {"_class_name": "SongUNet", "img_resolution": 4, "in_channels": 1, "out_channels": 1, "model_channels": 4, "channel_mult": [1, 1]}
CONFIG |= {"num_blocks": 1, "attn_resolutions": [], "precond": "edm"}
FILES = {
    "lacks entries": ({"_class_name": "DhariwalUNet", "precond": "edm"}, "lacks img_resolution, in_channels, out_channels: .* for example"),
    "no precond": (CONFIG | {"precond": None}, r"precond=None .* \['edm', 'vp', 've'\] into config.json, for example"),
    "unknown precond": (CONFIG | {"precond": "iddpm"}, "precond='iddpm'"),
    "unknown option": (CONFIG | {"num_heads": 2}, "num_heads=2 .unknown."),
    "model type": (CONFIG | {"model_type": "DhariwalUNet"}, "model_type='DhariwalUNet' .only 'SongUNet'"),
    "another filter": (CONFIG | {"resample_filter": [1, 3, 3, 1]}, r"resample_filter is .* not that of resample_filter=\[1.0, 3.0, 3.0, 1.0\]"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of CONFIG with the filter of one layer, as the original's files have it."""
    path = tmp_path_factory.mktemp("edm") / "net"
    module = SongUNet(**{key: tuple(value) if isinstance(value, list) else value for key, value in CONFIG.items() if key != "_class_name"})
    save(path, module, parameters(module))
    weights = path / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights) | {"enc.2x2_down.conv0.resample_filter": np.full((1, 1, 2, 2), 0.25, np.float32)}
    safetensors.numpy.save_file(tensors, weights)
    return path


@pytest.mark.parametrize("case", FILES)
def test_what_a_folder_must_say(folder, case):
    config, message = FILES[case]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_the_options_of_the_original_are_understood(folder):
    """`init_kwargs` of an EDMPrecond, as they are; but no scheduler beside them."""
    options = {name: value for name, value in CONFIG.items() if name not in ("in_channels", "out_channels")}
    options |= {"img_channels": 1, "model_type": "SongUNet", "use_fp16": True, "sigma_data": 0.4}
    (folder / "config.json").write_text(json.dumps(options))
    network, _, _, prediction = load(folder)
    assert (network.sigma_data, prediction) == (0.4, "x0")
    module = network.network.module
    assert (module.in_channels, module.out_channels) == (1, 1)
    with pytest.raises(ValueError, match="no scheduler"):
        files.process(module, {"_class_name": "DDPMScheduler"})
