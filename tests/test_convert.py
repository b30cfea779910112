"""`convert`: folders, files of known networks, torch pickles, what a pickle may not hold, and the command line. Stable Diffusion is in `test_ldm`."""

import json
import os
import pickle
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy

from adjoint_jax import checkpoints, cli
from adjoint_jax.checkpoints import _models, _tensors, convert, load_model, load_pipeline, save
from adjoint_jax.checkpoints._convert import _own
from adjoint_jax.models import ConvClassifier

NET = ConvClassifier(features=(8,), classes=4, norm_num_groups=4)
CONFIG = {"features": [8], "classes": 4, "norm_num_groups": 4}
WEIGHTS = "diffusion_pytorch_model.safetensors"
KIND = {"kind": "ConvClassifier", "config": CONFIG}


def parameters(module):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), _models.shapes(module))


PARAMS = parameters(NET)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "net"
    save(path, NET, PARAMS)
    return path


@pytest.fixture
def torch():
    return parity.original("torch")


@pytest.fixture
def state(sound, torch):
    """The tensors of the network, as torch's."""
    return {name: torch.from_numpy(tensor.copy()) for name, tensor in safetensors.numpy.load_file(sound / WEIGHTS).items()}


def pipeline(path):
    save(path / "unet", NET, PARAMS)
    files = {
        "model_index.json": {
            "_class_name": "TinyPipeline",
            "unet": ["diffusers", "ConvClassifier"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        },
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
        "text_encoder_3/config.json": {"architectures": ["T5EncoderModel"]},
        "tokenizer/vocab.json": {"a": 1},
    }
    for name, value in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(value))
    (path / "tokenizer" / "code.py").write_text("raise SystemExit")
    return path


def test_a_folder(tmp_path, sound):
    convert(sound, tmp_path / "same")
    module, params = load_model(tmp_path / "same")
    assert module == NET
    assert same(params, PARAMS)
    assert sorted(os.listdir(tmp_path / "same")) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(tmp_path, sound, dtype):
    convert(sound, tmp_path / "half", dtype=dtype)
    assert {str(tensor.dtype) for _, tensor in _tensors.read(tmp_path / "half" / WEIGHTS)} == {dtype}
    assert same(load_model(tmp_path / "half")[1], jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), PARAMS))


def test_a_pipeline(tmp_path):
    converted = convert(pipeline(tmp_path / "pipe"), tmp_path / "new")
    assert converted.dropped == ("text_encoder_3",)
    loaded = load_pipeline(tmp_path / "new")
    assert same(loaded.components["unet"][1], PARAMS)
    assert loaded.scheduler == {"_class_name": "DDIMScheduler"}
    assert loaded.config["text_encoder_3"] == [None, None]
    assert os.listdir(loaded.tokenizers["tokenizer"]) == ["vocab.json"]


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_a_file(tmp_path, sound, state, torch, suffix):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        file.write_bytes((sound / WEIGHTS).read_bytes())
    else:
        torch.save({"state_dict": state, "global_step": 7} if suffix == ".ckpt" else state, file)
    convert(file, tmp_path / "new", **KIND)
    module, params = load_model(tmp_path / "new")
    assert module == NET
    assert same(params, PARAMS)


def test_a_scheduler_may_be_given(tmp_path, sound):
    scheduler = {"beta_schedule": "squaredcos_cap_v2"}
    convert(sound / WEIGHTS, tmp_path / "new", kind="ConvClassifier", config={**CONFIG, "scheduler": scheduler})
    assert json.loads((tmp_path / "new" / "scheduler_config.json").read_text()) == {"_class_name": "DDPMScheduler", **scheduler}
    for wrong in ("cosine", {"beta_schedule": "cosine"}, {"beta_end": "1"}):
        with pytest.raises(ValueError, match=r"scheduler|beta_schedule|beta_end"):
            convert(sound / WEIGHTS, tmp_path / "other", kind="ConvClassifier", config={**CONFIG, "scheduler": wrong})


def test_old_files_and_bfloat16(tmp_path, state, torch):
    state["head.bias"] = state["head.bias"].to(torch.bfloat16)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pth", tmp_path / "new", **KIND)
    found = dict(_tensors.read(tmp_path / "new" / WEIGHTS))
    assert found["head.bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["head.bias"].astype(np.float32), state["head.bias"].float().numpy())


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_what_a_pickle_may_not_hold(tmp_path, state, torch):
    cases = {
        "code.ckpt": lambda path: torch.save({"state_dict": state, "callbacks": Evil()}, path),
        "plain.pt": lambda path: path.write_bytes(pickle.dumps(Evil(), protocol=2)),
        "cut.pt": lambda path: (torch.save(state, path), path.write_bytes(path.read_bytes()[:-200])),
        "empty.pt": lambda path: path.write_bytes(b""),
    }
    for name, write in cases.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match="is not read, for it is damaged or holds more than tensors, which could be code") as error:
            convert(tmp_path / name, tmp_path / "new", **KIND)
        assert "\n" not in str(error.value)
    torch.save({**state, "step": 3}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"holds 1 entries that are no named tensors \(step\)"):
        convert(tmp_path / "odd.pt", tmp_path / "new", **KIND)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list where a state_dict was expected"):
        convert(tmp_path / "list.pt", tmp_path / "new", **KIND)
    torch.save({**state, "head.bias": state["head.bias"].to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match=r"has head\.bias as a torch\.sparse_coo tensor of torch\.float32, which numpy does not know"):
        convert(tmp_path / "sparse.pt", tmp_path / "new", **KIND)
    assert not (tmp_path / "new").exists()


def test_without_torch(tmp_path, monkeypatch):
    (tmp_path / "x.ckpt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="is a torch pickle, which torch has to read: pip install torch, or give the safetensors file"):
        convert(tmp_path / "x.ckpt", tmp_path / "new")


def rewritten(sound, path, **changes):
    """The network's file with tensors changed, None for removed."""
    tensors = {name: tensor for name, tensor in {**safetensors.numpy.load_file(sound / WEIGHTS), **changes}.items() if tensor is not None}
    safetensors.numpy.save_file(tensors, path)
    return path


REFUSED = {
    "unknown kind": ({"kind": "Flux", "config": CONFIG}, "would be of class 'Flux', which has no Flax module here: known are UNet2DModel"),
    "no kind": ({}, "is of no kind that is recognised by its tensors"),
    "no configuration": ({"kind": "ConvClassifier"}, "whose architecture cannot be seen in its tensors: give its options as --config"),
    "another configuration": ({"kind": "ConvClassifier", "config": CONFIG | {"classes": 5}}, "2 misshapen"),
    "unknown option": ({"kind": "ConvClassifier", "config": CONFIG | {"odd": 5}}, "does not compute: odd=5"),
    "prediction": ({**KIND, "prediction": "epsilon"}, "is for Stable Diffusion alone"),
    "weights": ({**KIND, "weights": "both"}, "use one of ema, raw"),
    "dtype": ({**KIND, "dtype": "int8"}, "one of float32, float16, bfloat16"),
    "components": ({"kind": "ldm", "config": CONFIG}, "has the components unet, vae, text_encoder, text_encoder_2, scheduler"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, sound, case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        convert(sound / WEIGHTS, tmp_path / "new", **options)
    assert str(error.value).endswith((".", "}."))
    assert os.listdir(tmp_path) == []


def test_tensors_that_do_not_fit(tmp_path, sound):
    changes = {"head.bias": None, "odd": np.zeros(1, np.float32), "head.weight": np.full((4, 8), np.nan, np.float32)}
    file = rewritten(sound, tmp_path / "x.safetensors", **changes)
    with pytest.raises(ValueError, match=r"1 missing \(head.bias\), 1 unexpected \(odd\), 1 not finite \(head.weight\)"):
        convert(file, tmp_path / "new", **KIND)
    file = rewritten(sound, tmp_path / "x.safetensors", **{"head.bias": np.zeros(4, np.int64)})
    with pytest.raises(ValueError, match=r"dtype I64 where floats were expected \(head.bias\)"):
        convert(file, tmp_path / "new", **KIND)


def test_paths(tmp_path, sound):
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(sound, sound)
    with pytest.raises(FileNotFoundError, match="There is no file and no folder at"):
        convert(tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(ValueError, match="a folder tells its own kind and config: leave out --kind, --config"):
        convert(sound, tmp_path / "new", **KIND)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"ends in \.txt: a \.safetensors file, or one of"):
        convert(tmp_path / "x.txt", tmp_path / "new")


def test_an_interruption_leaves_nothing(tmp_path, sound, monkeypatch):
    replace, done = os.replace, []

    def stop(source, target):
        if done:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(sound, tmp_path / "new")
    assert os.listdir(tmp_path) == []


def adm(channels=4, mult=(1, 2), repeats=1, classes=None, updown=True, attention=(2,)):
    """Names and shapes of guided-diffusion's UNet that tell its architecture."""
    state: dict[str, tuple[int, ...]] = {"input_blocks.0.0.weight": (int(channels * mult[0]), 3, 3, 3), "out.2.weight": (6, channels, 3, 3)}
    state["time_embed.0.weight"] = (4 * channels, channels)
    state |= {} if classes is None else {"label_emb.weight": (classes, 4 * channels)}
    i = 1
    for level, ratio in enumerate(mult):
        for _ in range(repeats):
            state[f"input_blocks.{i}.0.out_layers.3.weight"] = (int(channels * ratio), 1, 3, 3)
            state[f"input_blocks.{i}.0.emb_layers.1.weight"] = (2 * int(channels * ratio), 1)
            state |= {f"input_blocks.{i}.1.qkv.weight": (1, 1, 1)} if 2**level in attention else {}
            i += 1
        if level + 1 < len(mult):
            state |= {f"input_blocks.{i}.0.{'in_layers.0' if updown else 'op'}.weight": (1,)}
            i += 1
    for level in reversed(range(len(mult))):
        for j in range(repeats + 1):
            number = (len(mult) - 1 - level) * (repeats + 1) + j
            state[f"output_blocks.{number}.0.in_layers.0.weight"] = (1,)
            if level and j == repeats:
                state[f"output_blocks.{number}.2.{'in_layers.0' if updown else 'conv'}.weight"] = (1,)
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in state.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"channel_mult": [1, 2], "attention_resolutions": [2], "num_classes": None, "resblock_updown": True, "num_res_blocks": 1}),
        ({"mult": (0.5, 1, 1, 2), "repeats": 2, "classes": 10}, {"channel_mult": [0.5, 1, 1, 2], "num_res_blocks": 2, "num_classes": 10}),
        ({"updown": False, "attention": (1, 2)}, {"attention_resolutions": [1, 2], "resblock_updown": False, "conv_resample": True}),
    ],
)
def test_the_architecture_of_guided_diffusion(options, expected):
    told = _own._adm(adm(**options), {"num_head_channels": 64}, "the file")
    assert {name: told[name] for name in expected} == expected
    assert told["use_scale_shift_norm"]
    assert (told["in_channels"], told["out_channels"], told["model_channels"]) == (3, 6, 4)
    assert _own.recognise(adm(**options)) == "ADM"
    with pytest.raises(ValueError, match="whose heads cannot be seen in its tensors: give --config"):
        _own._adm(adm(**options), {}, "the file")


def test_which_weights_of_a_training_checkpoint():
    state = {"ema_model.x": np.ones(1), "model.x": np.zeros(1), "conds_mean": np.zeros(1)}
    assert _own.recognise(state) == "DiffAE"
    assert _own._weights(state, "ema") == ({"x": np.ones(1)}, ("conds_mean", "model.x"))
    assert _own._weights(state, "raw") == ({"x": np.zeros(1)}, ("conds_mean", "ema_model.x"))


def test_command(tmp_path, sound, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = ["convert", str(sound / WEIGHTS), str(tmp_path / "new"), "--kind", "ConvClassifier"]
    cli.main([*given, "--config", str(tmp_path / "config.json"), "--dtype", "bfloat16"])
    assert "ConvClassifier" in capsys.readouterr().out
    assert load_model(tmp_path / "new")[0] == NET
    for argv, message in ((given, "exists and is not an empty folder"), ([*given[:2], str(tmp_path / "b")], "give --kind and --config")):
        with pytest.raises(SystemExit) as error:
            cli.main(argv)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_torch_and_the_hub_are_imported_where_they_are_needed():
    files = list(Path(checkpoints.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    assert not [path for path in files if re.search(r"^(import|from) (torch|huggingface_hub|diffusers|transformers)", path.read_text(), re.MULTILINE)]
