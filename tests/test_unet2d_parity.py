"""UNet2D beside diffusers' UNet2DModel in the same run: values, gradients, files both ways, and the shapes of the public checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax.traverse_util import flatten_dict
from parity import QUICK, draws, nchw, nhwc, relative

from adjoint_jax.checkpoints import _models, _rules, load, load_model, save
from adjoint_jax.models import UNet2D
from adjoint_jax.models.unet2d._layers import ResnetBlock, TimeProjection, fir_down, fir_up
from adjoint_jax.networks._predictions import conversions
from adjoint_jax.splitting import level

BASE = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
CASES = {  # an epsilon of 0.1 is so large that a norm with another one shows
    "consistency": SCALE_SHIFT
    | {"down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"], "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"]}
    | {"downsample_type": "resnet", "attn_norm_num_groups": 8, "num_class_embeds": 5, "norm_eps": 0.1},
    "resnet": {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"]}
    | {"upsample_type": "resnet", "act_fn": "mish", "time_embedding_dim": 12, "class_embed_type": "identity"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 10, "act_fn": "relu", "class_embed_type": "timestep"}
    | {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "downsample_padding": 0},
    "bare middle": {"add_attention": False, "act_fn": "swish", "mid_block_scale_factor": 1.5, "center_input_sample": True}
    | {"time_embedding_type": "fourier", "class_embed_type": "timestep"},
    "ncsnpp": SCALE_SHIFT  # the middle level's group norms are those that the original counts in its own way
    | {"block_out_channels": [32, 32, 16], "norm_num_groups": None, "mid_block_scale_factor": math.sqrt(2.0), "norm_eps": 0.1, "act_fn": "gelu"}
    | {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"], "attention_head_dim": None}
    | {"up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"], "time_embedding_type": "fourier", "center_input_sample": True},
    "skip and plain": {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"], "up_block_types": ["UpBlock2D", "SkipUpBlock2D"]}
    | {"mid_block_type": None, "flip_sin_to_cos": False, "freq_shift": 1},
}
REMAT = ("consistency", "skip and plain")


def inputs(config):
    """x, t and labels, two of each."""
    kind = config.get("time_embedding_type", "positional")
    t = {"positional": [17.25, 940.0], "fourier": [0.3, 40.0], "learned": [0.0, 9.0]}[kind]
    width = config.get("time_embedding_dim", 4 * config["block_out_channels"][0])
    labels = {"timestep": np.array(t[::-1], np.float32), "identity": draws(2, width, seed=2)}.get(config.get("class_embed_type"))
    labels = np.array([3, 0], np.int32) if "num_class_embeds" in config else labels
    return draws(2, 8, 8, 3) + np.float32(0.5), np.array(t, np.float32), labels


def original(config):
    return parity.randomise(parity.original("diffusers").UNet2DModel(**config))


def theirs(model, config, cotangent):
    """y and its vjp in x and t, or in x alone where the original looks t up."""
    torch = parity.original("torch")
    x, t, labels = (None if value is None else torch.from_numpy(value) for value in inputs(config))
    learned = config.get("time_embedding_type") == "learned"
    t, labels = (t.long(), labels if labels is None else labels.long()) if learned else (t.requires_grad_(), labels)
    x = x.permute(0, 3, 1, 2).contiguous().requires_grad_()
    y = model(x, t, labels if labels is None or labels.is_floating_point() else labels.long()).sample
    gradients = torch.autograd.grad(y, [x] if learned else [x, t], torch.from_numpy(np.ascontiguousarray(nchw(cotangent))))
    return nhwc(y.detach().numpy()), nhwc(gradients[0].numpy()), *(g.numpy() for g in gradients[1:])


def ours(module, params, config, cotangent):
    x, t, labels = inputs(config)

    def both(params, x, t, labels, cotangent):
        y, back = jax.vjp(lambda x, t: module.apply({"params": params}, x, t, labels), x, t)
        return y, *back(cotangent)

    labels = None if labels is None else jnp.asarray(labels)
    return jax.jit(both, compiler_options=QUICK)(params, jnp.asarray(x), jnp.asarray(t), labels, jnp.asarray(cotangent))


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(tmp_path, case):
    """Values, gradients in the image and in time, the file read, and our file read by the original; some with blocks recomputed."""
    config, cotangent = BASE | CASES[case], draws(2, 8, 8, 3, seed=1)
    model = original(config)
    model.save_pretrained(tmp_path / "theirs")
    module, params = load_model(tmp_path / "theirs")
    found, expected = ours(module.clone(remat=case in REMAT), params, config, cotangent), theirs(model, config, cotangent)
    assert found[0].dtype == jnp.float32
    assert relative(found[0], expected[0]) < 1e-4
    for gradient, other in zip(found[1:], expected[1:], strict=False):
        assert relative(gradient, other) < 1e-3

    save(tmp_path / "ours", module, params)
    again = type(model).from_pretrained(tmp_path / "ours")
    assert all(again.config[key] == model.config[key] or list(again.config[key]) == value for key, value in config.items())
    mine, state = again.state_dict(), model.state_dict()
    assert list(mine) == list(state)
    assert all((mine[name] == state[name]).all() for name in state)


def test_a_folder_of_ncsnpp_is_a_process(tmp_path):
    """Told what `ScoreSdeVePipeline` tells its network, the score at its first and a middle level, and the mean of its predictor's step."""
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    config, steps = BASE | CASES["ncsnpp"], 11
    model, scheduler = original(config), diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    model.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    network, params, process, prediction = load(tmp_path)
    assert (type(process).__name__, prediction, network == load(tmp_path).network) == ("VE", "score", True)
    scheduler.set_timesteps(steps, sampling_eps=0.0)
    scheduler.set_sigmas(steps, sampling_eps=0.0)
    program = jax.jit(network, compiler_options=QUICK)
    for i in (0, 5):
        t, sigma, x = scheduler.timesteps[i], scheduler.sigmas[i], 3 * draws(2, 8, 8, 3, seed=i)
        with torch.no_grad():
            score = model(torch.from_numpy(nchw(x)), sigma * torch.ones(2)).sample
        mean = scheduler.step_pred(score, t, torch.from_numpy(nchw(x))).prev_sample_mean
        found = program(jnp.asarray(x), jnp.asarray(t.numpy()), {"params": params})
        assert relative(found, nhwc(score.numpy())) < 1e-4
        (of_x, of_p), _ = conversions(prediction, level(process, np.float64(t)))
        ratio = float(np.exp(2 * (process.log_sigma(np.float64(scheduler.timesteps[i + 1])) - process.log_sigma(np.float64(t)))))
        x0 = of_x * x + of_p * np.asarray(found, np.float64)
        assert relative(x + (1 - ratio) * (x0 - x), nhwc(mean.numpy())) < 1e-4


def test_blocks():
    """A residual block in each of its changes of resolution, and the filters alone."""
    torch, resnet = parity.original("torch"), pytest.importorskip("diffusers.models.resnet")
    x, temb = draws(2, 6, 4, 8) + 1, draws(2, 12, seed=1)
    kinds = {"": {}, "down": {"down": True}, "up": {"up": True}, "fir_down": {"down": True, "kernel": "fir"}, "fir_up": {"up": True, "kernel": "fir"}}
    expected, programs = {}, {}
    for kind, options in kinds.items():
        wider = {"out_channels": 12} if kind == "" else {"use_in_shortcut": kind.startswith("fir")}
        block = resnet.ResnetBlock2D(
            in_channels=8, temb_channels=12, groups=4, groups_out=2, eps=0.1, non_linearity="mish", output_scale_factor=1.5, **wider, **options
        )
        block = parity.randomise(block)
        with torch.no_grad():
            expected[kind] = nhwc(block(torch.from_numpy(nchw(x).copy()), torch.from_numpy(temb)).numpy())
        options = {"groups_out": 2, "resample": kind, "shortcut": kind.startswith("fir")}
        module = ResnetBlock(12 if kind == "" else 8, 4, 0.1, False, 0.0, "mish", 1.5, **options)
        shapes = jax.eval_shape(lambda x, temb, module=module: module.init(jax.random.key(0), x, temb, True), x, temb)["params"]
        params = _rules.to_flax(_models.family_of(UNet2D()), shapes, parity.tensors(block), kind, jnp.float32)
        programs[kind] = (module, params)
    with torch.no_grad():
        for kind, layer in (("down", resnet.FirDownsample2D), ("up", resnet.FirUpsample2D)):
            expected[f"filter {kind}"] = nhwc(layer(8)(torch.from_numpy(nchw(x).copy())).numpy())

    def run(x, temb, params):
        answers = {kind: module.apply({"params": params[kind]}, x, temb, True) for kind, (module, _) in programs.items()}
        return answers | {"filter down": fir_down(x), "filter up": fir_up(x)}

    found = jax.jit(run, compiler_options=QUICK)(jnp.asarray(x), jnp.asarray(temb), {kind: params for kind, (_, params) in programs.items()})
    for kind, y in expected.items():
        assert relative(found[kind], y) < 1e-5, kind


def test_a_learned_time_is_linear_between_rows():
    table = draws(4, 3)
    layer = TimeProjection("learned", 3, True, 0, 4)
    y = jax.jit(layer.apply)({"params": {"embedding": jnp.asarray(table)}}, jnp.array([0.0, 1.25, 3.0, -1.0, 3.5, 4.0], jnp.float32))
    np.testing.assert_allclose(y[:3], [table[0], 0.75 * table[1] + 0.25 * table[2], table[3]], rtol=1e-6)
    assert np.isnan(y[3:]).all()


def test_frequencies_that_the_first_releases_wrote_twice():
    family, w = _models.family_of(UNet2D()), draws(4)
    assert family.tensors([("time_proj.W", w), ("time_proj.weight", w)]) == [("time_proj.weight", w)]


DDPM = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None}
DDPM_256 = DDPM | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
NCSNPP = {"time_embedding_type": "fourier", "norm_num_groups": None, "mid_block_scale_factor": 1.41421356237, "norm_eps": 1e-6}
RESNETS = {"downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 64}
PUBLIC = {
    "google/ddpm-cifar10-32": (
        DDPM
        | {"block_out_channels": [128, 256, 256, 256], "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]}
        | {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]},
        35_746_307,
    ),
    "google/ddpm-celebahq-256, church, bedroom, cat": (DDPM_256, 113_673_219),
    "google/ncsnpp-celebahq-256, church, ffhq": (
        NCSNPP
        | {"block_out_channels": [128, 128, 256, 256, 256, 256, 256], "attention_head_dim": None}
        | {"down_block_types": ["SkipDownBlock2D"] * 4 + ["AttnSkipDownBlock2D"] + ["SkipDownBlock2D"] * 2}
        | {"up_block_types": ["SkipUpBlock2D"] * 2 + ["AttnSkipUpBlock2D"] + ["SkipUpBlock2D"] * 4},
        65_574_549,
    ),
    "google/ncsnpp-ffhq-1024": (
        NCSNPP
        | {"block_out_channels": [16, 32, 64, 128, 256, 512, 512, 512], "layers_per_block": 1, "attention_head_dim": None}
        | {"down_block_types": ["SkipDownBlock2D"] * 6 + ["AttnSkipDownBlock2D", "SkipDownBlock2D"]}
        | {"up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D"] + ["SkipUpBlock2D"] * 6},
        105_785_896,
    ),
    "openai/diffusers-cd_imagenet64": (
        RESNETS
        | {"block_out_channels": [192, 384, 576, 768], "layers_per_block": 3, "num_class_embeds": 1000, "attn_norm_num_groups": 32}
        | {"down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3, "resnet_time_scale_shift": "scale_shift"}
        | {"up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"]},
        295_899_267,
    ),
    "openai/diffusers-cd_cat256, bedroom": (
        RESNETS
        | {"block_out_channels": [256, 256, 512, 512, 1024, 1024]}
        | {"down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3}
        | {"up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3},
        526_304_771,
    ),
    "CompVis/ldm-celebahq-256": ({"attention_head_dim": 32}, 274_056_163),
}
"""Configurations in the manner of public checkpoints (their files were not at hand, but for copies of cifar10-32's and cat-256's), and numbers of
parameters: the first two are the published ones, the others are those of the original built from the same configuration."""


FEW = ("google/ddpm-celebahq-256, church, bedroom, cat", "google/ncsnpp-ffhq-1024")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in PUBLIC])
def test_public_checkpoints(name):
    torch, diffusers = parity.original("torch"), parity.original("diffusers")
    config, count = PUBLIC[name]
    with torch.device("meta"):
        state = diffusers.UNet2DModel(**config).state_dict()
    module, shapes = _models.read({"_class_name": "UNet2DModel", **config}, name)
    table = _rules.rules(shapes, _models.family_of(module).lists)
    assert {key: rule.shape for key, rule in table.items()} == {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert sum(math.prod(leaf.shape) for leaf in flatten_dict(shapes).values()) == count


def built(config, dtype=jnp.float32, deterministic=True):
    """The abstract answer of a module."""
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in (BASE | config).items()}
    module = UNet2D(**config)
    x, t, labels = inputs(config)

    def init_and_apply(x, t, labels):
        params = module.init(jax.random.key(0), x.astype(jnp.float32), t, labels)["params"]
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return module.apply({"params": params}, x, t, labels, deterministic, rngs={"dropout": jax.random.key(1)})

    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms promote half precision to float32 and back
        return jax.eval_shape(init_and_apply, jnp.asarray(x, dtype), jnp.asarray(t), None if labels is None else jnp.asarray(labels))


@pytest.mark.parametrize("case", ["consistency", "learned", "ncsnpp", "skip and plain"])
def test_keeps_bfloat16_and_drops_out_in_a_recomputed_block(case):
    answer = built(CASES[case] | {"remat": True, "dropout": 0.5}, jnp.bfloat16, deterministic=False)
    assert (answer.shape, answer.dtype) == ((2, 8, 8, 3), jnp.bfloat16)


ERRORS = {
    "activation": ({"act_fn": "tanh"}, "act_fn='tanh' is not known: use one of"),
    "k blocks": ({"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, r"does not know the block types \['KDownBlock2D'\]"),
    "table": (CASES["learned"] | {"num_train_timesteps": None}, "give num_train_timesteps"),
    "groups": ({"norm_num_groups": None}, "give a number of groups"),
    "widths": ({"norm_num_groups": 3}, r"norm_num_groups=3 does not divide the widths \[8, 16\]"),
    "padding": ({"downsample_padding": 2}, "downsample_padding=2 is not known"),
    "order": ({"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]}, "Skip blocks come before all others"),
    "channels": (CASES["skip and plain"] | {"out_channels": 6}, "out_channels=6: give 3"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_does_not_fit(case):
    config, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        built(config)
    assert str(error.value).endswith(".")
