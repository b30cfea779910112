"""Checkpoints: what is saved is loaded bit for bit, tensors map one to one, and each misfit is one clear sentence."""

import json
import os
import re
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import adjoint_jax.checkpoints as checkpoints
from adjoint_jax.checkpoints import _models, _rules, load, load_model, save
from adjoint_jax.models import ConvClassifier, UNet2D
from adjoint_jax.schedulers import _betas

UNET = UNet2D(
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
    norm_eps=1e-6,
    attention_head_dim=None,
    num_class_embeds=3,
)
CLASSIFIER = ConvClassifier(features=(8, 8), classes=4, norm_num_groups=4, in_channels=3)
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODULES = dict.fromkeys(family.module.__name__ for family in _models.FAMILIES)
COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def parameters(module):
    """Random parameters of the right shapes, without compiling an initialisation."""
    rng = np.random.default_rng(0)
    shapes = _models.shapes(module)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


PARAMS = parameters(UNET)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "unet"
    save(path, UNET, PARAMS)
    return path


@pytest.fixture
def folder(tmp_path, sound):
    """A sound checkpoint to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "unet"))


def tensors(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def configure(folder, **options):
    config = json.loads((folder / "config.json").read_text()) | options
    (folder / "config.json").write_text(json.dumps(config))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.mark.parametrize("module", [UNET, CLASSIFIER])
def test_round_trip_is_exact(tmp_path, module):
    params = parameters(module)
    save(tmp_path / "new" / "folder", module, params)
    loaded, again = load_model(tmp_path / "new" / "folder")
    assert loaded == module
    assert hash(loaded) == hash(module)
    assert same(again, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(again))


def test_layout_is_that_of_torch(folder):
    files = tensors(folder)
    kernel = PARAMS["mid_block"]["resnets_1"]["conv1"]["kernel"]
    np.testing.assert_array_equal(files["mid_block.resnets.1.conv1.weight"], np.transpose(kernel, (3, 2, 0, 1)))
    np.testing.assert_array_equal(files["mid_block.attentions.0.to_out.0.weight"], PARAMS["mid_block"]["attentions_0"]["to_out_0"]["kernel"].T)
    np.testing.assert_array_equal(files["time_embedding.linear_1.weight"], PARAMS["time_embedding"]["linear_1"]["kernel"].T)
    np.testing.assert_array_equal(files["conv_norm_out.weight"], PARAMS["conv_norm_out"]["scale"])
    np.testing.assert_array_equal(files["class_embedding.weight"], PARAMS["class_embedding"]["embedding"])
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert config["norm_eps"] == 1e-6


@pytest.mark.parametrize("module", [UNet2D(class_embed_type="timestep", layers_per_block=1), ConvClassifier()])
def test_names_are_a_bijection(module):
    shapes = _models.shapes(module)
    table = _rules.rules(shapes, _models.family_of(module).lists)
    assert {rule.path for rule in table.values()} == set(flatten_dict(shapes))
    assert all(not re.search(r"_\d+\.(?!weight|bias)", name) for name in table), "a list is left with an underscore"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_is_cast_up(folder, dtype):
    halves = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors(folder).items()}
    specs = {k: safetensors.TensorSpec(dtype=dtype, shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes) for k, x in halves.items()}
    (folder / WEIGHTS).write_bytes(safetensors.serialize(specs))
    _, params = load_model(folder)
    assert same(params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), PARAMS))
    _, params = load_model(folder, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_bfloat16_is_saved_as_float32(tmp_path):
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    save(tmp_path / "unet", UNET, halves)
    _, params = load_model(tmp_path / "unet")
    assert same(params, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), halves))


def test_names_of_2022(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {re.sub("|".join(map(re.escape, old)), lambda match: old[match[0]], name): tensor for name, tensor in tensors(folder).items()}
    assert "mid_block.attentions.0.proj_attn.bias" in renamed
    safetensors.numpy.save_file(renamed, folder / WEIGHTS)
    configure(folder, down_block_types=["UNetResAttnDownBlock2D"], _diffusers_version="0.0.4", sample_size=8)
    module, params = load_model(folder)
    assert module == UNET
    assert same(params, PARAMS)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors", "mine.safetensors"])
def test_other_file_names(folder, name):
    (folder / WEIGHTS).rename(folder / name)
    assert same(load_model(folder)[1], PARAMS)


def test_full_precision_is_preferred(folder):
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    (folder / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"")
    assert same(load_model(folder)[1], PARAMS)


def test_all_problems_in_one_error(folder):
    spoilt = tensors(folder)
    del spoilt["conv_in.bias"], spoilt["conv_in.weight"]
    spoilt["conv_out.bias"] = np.zeros(2, np.float32)
    spoilt["time_embedding.linear_1.bias"] = np.full(32, np.nan, np.float32)
    spoilt |= {f"junk.{i:02d}": np.zeros(1, np.float32) for i in range(25)}
    spoilt["mid_block.attentions.0.query.bias"] = np.zeros(8, np.float32)
    safetensors.numpy.save_file(spoilt, folder / WEIGHTS)
    with pytest.raises(ValueError, match="2 missing") as error:
        load_model(folder)
    text = str(error.value)
    for part in (
        "2 missing (conv_in.bias, conv_in.weight)",
        "25 unexpected (junk.00",
        "junk.19 and 5 more)",
        "1 given twice (mid_block.attentions.0.to_q.bias)",
        "1 misshapen (conv_out.bias (2,) instead of (1,))",
        "1 not finite (time_embedding.linear_1.bias)",
    ):
        assert part in text
    assert "\n" not in text


def spoil(change):
    """A named way to spoil a folder, with the error that it must bring."""

    def decorate(function):
        SPOILT[function.__name__] = (function, *change)
        return function

    return decorate


SPOILT = {}


@spoil((FileNotFoundError, "There is no folder"))
def no_folder(folder):
    folder.rename(folder.with_name("elsewhere"))


@spoil((FileNotFoundError, "has no config.json"))
def no_config(folder):
    (folder / "config.json").unlink()


@spoil((ValueError, "config.json is not JSON"))
def config_is_not_json(folder):
    (folder / "config.json").write_text('{"_class_name": ')


@spoil((ValueError, "config.json is not JSON"))
def config_is_binary(folder):
    (folder / "config.json").write_bytes(b"\x80\x04\xff")


@spoil((ValueError, "a JSON list where an object"))
def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


@spoil((ValueError, rf"'UNet3DConditionModel'.*known are {', '.join(_models.names())}\."))
def unknown_class(folder):
    configure(folder, _class_name="UNet3DConditionModel")


@spoil((ValueError, "known are"))
def class_is_a_path(folder):
    configure(folder, _class_name="../../config")


@spoil((ValueError, "value of the wrong kind"))
def wrong_kind_of_value(folder):
    configure(folder, block_out_channels=8)


@spoil((ValueError, "is not a whole safetensors file"))
def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@spoil((ValueError, "is not a whole safetensors file"))
def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


@spoil((ValueError, "nothing is unpickled.*save_pretrained"))
def pickled(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


@spoil((FileNotFoundError, "has no weights"))
def no_weights(folder):
    (folder / WEIGHTS).unlink()


@spoil((ValueError, "2 safetensors files .*keep one"))
def two_files(folder):
    (folder / "b.safetensors").write_bytes(b"")
    (folder / WEIGHTS).rename(folder / "a.safetensors")


@spoil((ValueError, "dtype I32 where floats"))
def integers(folder):
    safetensors.numpy.save_file(tensors(folder) | {"conv_in.bias": np.zeros(8, np.int32)}, folder / WEIGHTS)


@spoil((ValueError, "2 block types"))
def levels_disagree(folder):
    configure(folder, up_block_types=["UpBlock2D", "UpBlock2D"])


OPTIONS = {
    "act_fn": "tanh",
    "time_embedding_type": "sinusoidal",
    "downsample_type": "pool",
    "upsample_type": "nearest",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "ada_group",
    "encoder_hid_dim": 4,
}


@pytest.mark.parametrize("case", SPOILT)
def test_errors(folder, case):
    change, kind, message = SPOILT[case]
    change(folder)
    with pytest.raises(kind, match=message) as error:
        load_model(folder)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_the_arithmetic_are_refused(folder, option):
    configure(folder, **{option: OPTIONS[option]})
    with pytest.raises(ValueError, match=rf"{option}={OPTIONS[option]!r} (is not known: use one of|\(unknown\); drop)"):
        load_model(folder)


def test_options_that_mean_the_default_are_accepted(folder):
    configure(folder, act_fn="silu", time_embedding_type="positional", downsample_type="conv", mid_block_type="UNetMidBlock2D")
    assert load_model(folder)[0] == UNET


def test_save_refuses_what_exists(folder, tmp_path):
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save(folder, UNET, PARAMS)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save(folder / "config.json", UNET, PARAMS)
    assert (folder / WEIGHTS).read_bytes() == before
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", UNET, PARAMS)


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    replace, done = os.replace, []

    def stop_after_weights(source, target):
        if done:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", stop_after_weights)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "unet", UNET, PARAMS)
    assert os.listdir(tmp_path / "unet") == [WEIGHTS]
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path / "unet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((UNET, {"conv_in": PARAMS["conv_in"]}), "UNet2D to be saved do not fit its configuration: .* missing"),
        ((UNET, {"params": PARAMS}), "unexpected .*params.conv_in.weight"),
        ((CLASSIFIER.clone(features=(8,)), parameters(CLASSIFIER)), "misshapen|unexpected"),
        ((nn.Dense(3), PARAMS), rf"A Dense has no layout of files here: known are {', '.join(MODULES)};"),
        ((UNET, PARAMS, {"_class_name": "ScoreSdeVpScheduler"}), "'ScoreSdeVpScheduler' has no process here"),
    ],
)
def test_save_checks_before_it_writes(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["default", "scaled_linear", "cosine", "trained", "zero_snr"])
def test_schedules_are_those_of_diffusers(name):
    options = {
        "default": {},
        "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        "zero_snr": {"_class_name": "LCMScheduler", "rescale_betas_zero_snr": True},
        "trained": {"trained_betas": [0.1, 0.05, 0.3]},
    }[name]
    with np.load(Path(__file__).parent / "fixtures" / "unet2d.npz") as file:
        expected = file[f"{name}_abar"]
    abar = _betas.alphas_cumprod(options)
    assert abar.dtype == np.float64
    np.testing.assert_allclose(abar, expected, rtol=1e-4, atol=1e-7)  # theirs is a float32 product, ours keeps log(abar) finite at the end
    assert (np.diff(abar) < 0).all()
    assert abar[-1] > 0


def test_zero_terminal_snr_decreases_for_the_linear_schedule():
    abar = _betas.alphas_cumprod({"rescale_betas_zero_snr": True})
    assert (np.diff(abar) < 0).all()
    assert 0 < abar[-1] < 1e-8


SCHEDULERS = {
    "epsilon": ({}, "VPDiscrete", "eps"),
    "sample": ({"prediction_type": "sample"}, "VPDiscrete", "x0"),
    "v": (COSINE, "VPDiscrete", "v"),
    "flow class": (FLOW, "FlowMatching", "flow"),
    "flow sigmas": ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "FlowMatching", "flow"),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_process_from_config(case):
    config, kind, expected = SCHEDULERS[case]
    process, prediction = _betas.process_from_config(config)
    assert (type(process).__name__, prediction) == (kind, expected)
    if kind == "VPDiscrete":
        abar = _betas.alphas_cumprod(config)
        np.testing.assert_allclose(process.alpha(np.array([0.0, 500.0])) ** 2, abar[[0, 500]], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' has no process here: known are DDPMScheduler"),
        ({"beta_schedule": "exp"}, "beta_schedule='exp' is not known"),
        ({"prediction_type": "score"}, "prediction_type='score' is not known: use one of epsilon"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        ({"trained_betas": [0.1, 1.5]}, "between 0 and 1"),
        ({"trained_betas": []}, "two numbers or more"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 50, "sigma_max": 0.01}, "rises from sigma_min > 0 to sigma_max; got 50 and 0.01"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_max": None}, "rises from sigma_min > 0 to sigma_max; got 0.01 and None"),
    ],
)
def test_scheduler_errors(config, message):
    with pytest.raises(ValueError, match=message):
        _betas.process_from_config(config)


def test_load(tmp_path):
    save(tmp_path / "unet", UNET, PARAMS, COSINE)
    network, params, process, prediction = load(tmp_path / "unet")
    assert same(params, PARAMS)
    assert (type(process).__name__, prediction) == ("VPDiscrete", "v")
    assert hash(network) == hash(load(tmp_path / "unet").network), "another trace for each load"
    x, t, cond = jnp.ones((2, 4, 4, 1), jnp.float32), jnp.asarray(7.0, jnp.float32), jnp.array([0, 2], jnp.int32)
    y = jax.jit(network)(x, t, {"params": params, "cond": cond})
    np.testing.assert_allclose(y, jax.jit(UNET.apply)({"params": PARAMS}, x, t, cond), rtol=1e-5, atol=1e-6)


def test_load_a_pipeline(tmp_path):
    save(tmp_path / "unet", UNET, PARAMS)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(COSINE))
    assert load(tmp_path).prediction == "v"
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    assert load(tmp_path).prediction == "eps"


def test_a_flow_network_counts_training_steps(tmp_path):
    save(tmp_path / "unet", UNET, PARAMS, FLOW)
    network, _, process, prediction = load(tmp_path / "unet")
    assert (type(process).__name__, prediction) == ("FlowMatching", "flow")
    assert network == load(tmp_path / "unet").network
    assert isinstance(network, _betas.ScaledTime)
    assert _betas.ScaledTime(lambda x, t, args: t + x, network.unit)(jnp.zeros(()), 0.25, None) == 250.0


@pytest.mark.parametrize("module", [CLASSIFIER, UNET.clone(out_channels=2)])
def test_load_wants_a_prediction_of_the_shape_of_x(tmp_path, module):
    save(tmp_path / "model", module, parameters(module))
    with pytest.raises(ValueError, match="use load_model"):
        load(tmp_path / "model")


def test_public_names():
    own = {"Checkpoint", "EMBEDDED", "Pipeline", "convert", "load", "load_model", "load_pipeline", "save", "save_pipeline"}
    assert set(checkpoints.__all__) == own
