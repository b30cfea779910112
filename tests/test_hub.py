"""Folders, shards, variants and ids of the hub: what is found, what is fetched, and each refusal as one sentence."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants, errors

import adjoint_jax as aj
from adjoint_jax.checkpoints import _hub, _models, _tensors, convert, load, load_model, load_pipeline, save, save_pipeline
from adjoint_jax.models import CLIPText, ConvClassifier, UNet2D

ONE = {"block_out_channels": (8,), "layers_per_block": 1, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
UNET = UNet2D(in_channels=1, out_channels=1, norm_num_groups=4, attention_head_dim=None, add_attention=False, **ONE)
NET = ConvClassifier(features=(8,), classes=4, norm_num_groups=4)
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARDS = tuple(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
SHA = "0123456789abcdef0123456789abcdef01234567"
ID = "org/tiny-model"
SCHEDULER = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def parameters(module, scale=1.0):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), _models.shapes(module))


PARAMS = parameters(NET)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "unet"
    save(path, NET, PARAMS)
    return path


@pytest.fixture
def folder(tmp_path, sound):
    """A sound checkpoint to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "unet"))


def shard(folder, names=SHARDS, index=INDEX):
    """Splits the weights of a folder in two and writes their index. Returns the map of tensors to files."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return places


def rewrite(folder, places):
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_shards_are_the_whole(folder):
    shard(folder)
    assert same(load_model(folder)[1], PARAMS)


def test_variants(folder):
    halves = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    save(folder.parent / "double", NET, halves)
    shutil.move(folder.parent / "double" / WEIGHTS, folder / "diffusion_pytorch_model.bf16.safetensors")
    assert same(load_model(folder)[1], PARAMS)
    assert same(load_model(folder, variant="bf16")[1], halves)
    with pytest.raises(FileNotFoundError, match=r"no weights of the variant 'fp16': it has .*bf16"):
        load_model(folder, variant="fp16")
    with pytest.raises(ValueError, match="not a part of a file's name"):
        load_model(folder, variant="../x")
    (folder / "diffusion_pytorch_model.bf16.safetensors").unlink()
    shard(folder, [name.replace("model-", "model.fp16-") for name in SHARDS], "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert same(load_model(folder, variant="fp16")[1], PARAMS)
    assert same(load_model(folder)[1], PARAMS)


def test_tensors_stay_in_the_file(folder):
    named = dict(_tensors.read(folder / WEIGHTS))
    kernel = named["head.weight"]
    while isinstance(kernel.base, np.ndarray):
        kernel = kernel.base
    assert isinstance(kernel, np.memmap)
    assert not kernel.flags.writeable


@pytest.mark.parametrize("dtype", [None, np.float16, jnp.bfloat16])
def test_what_is_written_is_what_safetensors_reads(tmp_path, dtype):
    given = {"b": np.arange(3, dtype=np.float16), "a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "none": np.zeros((0, 2), np.float32)}
    with open(tmp_path / "x.safetensors", "wb") as file:
        _tensors.writer(given.items(), dtype)(file)
    found = dict(_tensors.read(tmp_path / "x.safetensors"))
    expected = {name: tensor if dtype is None else tensor.astype(dtype) for name, tensor in given.items()}
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in expected.items()}
    assert all((found[name] == expected[name]).all() for name in given)
    if dtype is not jnp.bfloat16:
        theirs = safetensors.numpy.load_file(tmp_path / "x.safetensors")
        assert all((theirs[name] == expected[name]).all() for name in given)


SPOILT = {}


def spoil(kind, message):
    """A way to spoil a sharded folder, with the error that it must bring."""

    def decorate(function):
        SPOILT[function.__name__] = (function, kind, message)
        return function

    return decorate


@spoil(
    ValueError,
    r"index\.json does not fit its files: .*00001-of-00002\.safetensors lacks junk.*00002-of-00002\.safetensors has head\.weight beyond",
)
def tensors_are_not_where_they_belong(folder, places):
    missing = {name: file for name, file in places.items() if name != "head.weight"}
    rewrite(folder, missing | {"junk": SHARDS[0]})


@spoil(FileNotFoundError, "has no diffusion_pytorch_model-00002-of-00002")
def a_shard_is_absent(folder, places):
    (folder / SHARDS[1]).unlink()


@spoil(ValueError, "'head.bias' stands twice")
def a_tensor_is_placed_twice(folder, places):
    (folder / INDEX).write_text(json.dumps({"weight_map": places | {"other": SHARDS[1]}}).replace('"other"', '"head.bias"'))


@spoil(ValueError, "no weight_map")
def no_map(folder, places):
    (folder / INDEX).write_text('{"weight_map": []}')


@spoil(ValueError, "is a link that leaves")
def a_shard_is_elsewhere(folder, places):
    (folder / SHARDS[1]).rename(folder.parent / "elsewhere.safetensors")
    (folder / SHARDS[1]).symlink_to(folder.parent / "elsewhere.safetensors")


@spoil(ValueError, "is not a file")
def a_shard_is_a_loop(folder, places):
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(SHARDS[1])


@spoil(ValueError, "is not a file")
def a_shard_is_a_pipe(folder, places):
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])


@spoil(ValueError, r"index\.json is not a file")
def the_index_is_a_folder(folder, places):
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()


@spoil(ValueError, r"config\.json is not a file")
def the_configuration_is_a_pipe(folder, places):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@spoil(ValueError, "'_class_name' stands twice")
def a_name_stands_twice(folder, places):
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel", "_class_name": "UNet2DModel"}')


@spoil(ValueError, r"config\.json is not JSON")
def a_bottomless_configuration(folder, places):
    (folder / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize("case", SPOILT)
def test_errors_of_shards(folder, case):
    change, kind, message = SPOILT[case]
    change(folder, shard(folder))
    with pytest.raises(kind, match=message) as error:
        load_model(folder)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


NAMES = (
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "a\\b.safetensors",
    "..",
    "",
    ".safetensors",
    "x.bin",
    3,
    None,
    "x\x00.safetensors",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_not_beside_the_index(folder, name):
    places = shard(folder)
    rewrite(folder, places | {"head.bias": name})
    with pytest.raises(ValueError, match=r"no name of a safetensors file beside it"):
        load_model(folder)


@pytest.mark.parametrize("subfolder", ["../unet", "/unet", "", ".", "a/../b"])
def test_subfolders_lie_below(folder, subfolder):
    with pytest.raises(ValueError, match="does not name a folder below"):
        load_model(folder.parent, subfolder=subfolder)


VALUES = {
    "negative": ({"norm_num_groups": -4}, r"norm_num_groups=-4 \(between 1 and"),
    "zero": ({"block_out_channels": [0]}, r"block_out_channels=\[0\] \(between 1 and"),
    "huge": ({"layers_per_block": 10**9}, r"layers_per_block=1000000000 \(between 1 and 32"),
    "huge beyond floats": ({"norm_eps": 10**400}, r"norm_eps=1"),
    "a bool for an integer": ({"in_channels": True}, r"in_channels=True \(an integer"),
    "a number for a string": ({"resnet_time_scale_shift": 3}, r"resnet_time_scale_shift=3 \(a string"),
    "a string for a number": ({"norm_eps": "1e-5"}, r"norm_eps='1e-5' \(a number"),
    "not a number": ({"norm_eps": float("nan")}, r"norm_eps=nan \(a finite number"),
    "infinite": ({"mid_block_scale_factor": float("inf")}, r"mid_block_scale_factor=inf \(a finite number"),
    "negative epsilon": ({"norm_eps": -1e-5}, "no negative number"),
    "many": ({"block_out_channels": [8] * 1000}, "at most 16 entries"),
    "strings for numbers": ({"block_out_channels": ["a"]}, r"block_out_channels=\['a'\] \(a list of an integer"),
    "two": ({"in_channels": -1, "out_channels": 1.5}, r"in_channels=-1.*out_channels=1.5 \(an integer"),
    "a long string": ({"down_block_types": ["x" * 1000]}, "at most 200 letters"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_no_network_has(case):
    options, message = VALUES[case]
    with pytest.raises(ValueError, match=message) as error:
        _models.read({**_models.describe(UNET), **options}, "config.json")
    assert len(str(error.value)) < 800


@pytest.mark.parametrize(
    "options",
    [{"num_train_timesteps": 10**12}, {"num_train_timesteps": True}, {"beta_start": float("nan")}, {"trained_betas": "x"}, {"beta_end": [1]}],
)
def test_schedulers_that_nobody_has(tmp_path, options):
    with pytest.raises(ValueError, match=r"The scheduler to be saved has .* where finite numbers were expected"):
        save(tmp_path / "new", NET, PARAMS, options)


def pipeline(path, **more):
    """A pipeline of one network, with a scheduler, a tokenizer and components that have no module."""
    save(path / "unet", NET, PARAMS)
    for name, files in {
        "scheduler": {"scheduler_config.json": SCHEDULER},
        "tokenizer": {"vocab.json": {}},
        "text_encoder_3": {"config.json": {"architectures": ["T5EncoderModel"]}},
    }.items():
        (path / name).mkdir()
        for file, value in files.items():
            (path / name / file).write_text(json.dumps(value))
    index = {
        "_class_name": "TinyPipeline",
        "requires_safety_checker": True,
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "feature_extractor": [None, None],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    (path / "model_index.json").write_text(json.dumps(index | more))
    return path


def test_pipeline(tmp_path):
    path = pipeline(tmp_path / "pipe")
    components, scheduler, tokenizers, config, unknown = load_pipeline(path)
    assert set(components) == {"unet"}
    assert components["unet"][0] == NET
    assert same(components["unet"][1], PARAMS)
    assert scheduler == SCHEDULER
    assert tokenizers == {"tokenizer": path / "tokenizer"}
    assert config["_class_name"] == "TinyPipeline"
    assert unknown == {"text_encoder_3": "T5EncoderModel", "safety_checker": "StableDiffusionSafetyChecker"}
    assert same(load_model(path, subfolder="unet")[1], PARAMS)


def test_an_id_in_a_fresh_interpreter(tmp_path):
    """Where nobody has imported the hub's package before."""
    code = "import adjoint_jax.cli; adjoint_jax.cli.main(['convert', 'nobody/nothing', 'new'])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"adjoint-jax: There is no folder at nobody/nothing, and the hub's cache has nothing of that id .*\n", done.stderr)


def test_the_first_pipelines_lie_in_one_folder(tmp_path):
    """As google/ddpm-cifar10-32: the network's configuration, the scheduler's and the pipeline's side by side."""
    path, params = tmp_path / "pipe", parameters(UNET)
    save(path, UNET, params, SCHEDULER)
    (path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}))
    first = load_pipeline(path)
    assert same(first.components["unet"][1], params)
    assert first.scheduler == SCHEDULER
    convert(path, tmp_path / "new")
    assert (tmp_path / "new" / "scheduler" / "scheduler_config.json").is_file()
    assert same(load_pipeline(tmp_path / "new").components["unet"][1], params)
    (path / "scheduler").mkdir()
    (path / "scheduler_config.json").rename(path / "scheduler" / "scheduler_config.json")
    assert load(path).prediction == load(tmp_path / "new").prediction == "v"
    (path / "scheduler" / "scheduler_config.json").unlink()
    for read in (load, load_pipeline):
        with pytest.raises(FileNotFoundError, match=r"scheduler has no scheduler_config\.json"):
            read(path)


def test_the_class_in_the_pipeline_goes_before_transformers_architectures(tmp_path):
    module = CLIPText(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4)
    path = pipeline(tmp_path / "pipe", text_encoder=["transformers", "CLIPTextModel"])
    save(path / "text_encoder", module, parameters(module))
    config = json.loads((path / "text_encoder" / "config.json").read_text())
    (path / "text_encoder" / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPModel"]}))
    assert load_pipeline(path).components["text_encoder"][0] == module


def test_a_pipeline_is_written_and_read(tmp_path):
    first = load_pipeline(pipeline(tmp_path / "pipe"))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    save_pipeline(tmp_path / "new", first._replace(components={"unet": (NET, doubled)}))
    again = load_pipeline(tmp_path / "new")
    assert same(again.components["unet"][1], doubled)
    assert again.scheduler == SCHEDULER
    assert (again.tokenizers["tokenizer"] / "vocab.json").read_text() == "{}"
    assert again.config["text_encoder_3"] == [None, None]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_pipeline(tmp_path / "new", first)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"unet": [None, None]}, "names no unet and no transformer"),
        ({"../unet": ["diffusers", "UNet2DModel"]}, "a name and a pair"),
        ({"unet": ["diffusers"]}, "a name and a pair"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "has no config.json"),
    ],
)
def test_errors_of_pipelines(tmp_path, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pipeline(pipeline(tmp_path / "pipe", **more))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_pipeline(tmp_path / "nothing")


def test_a_transformer_is_a_network_too(tmp_path):
    save(tmp_path / "transformer", NET, PARAMS)
    assert same(load_model(tmp_path)[1], PARAMS)
    save(tmp_path / "unet", NET, PARAMS)
    with pytest.raises(ValueError, match="the networks unet and transformer: give one as subfolder="):
        load_model(tmp_path)


def test_guidance_passes_a_dict_of_conditions():
    seen = []

    def network(x, t, args):
        seen.append(args["cond"])
        return x * args["cond"]["scale"]

    cond, null = ({"scale": jnp.float64(value), "ids": jnp.arange(2)} for value in (3.0, 1.0))
    y = aj.cfg(network, 2.0)(jnp.ones((1, 2)), 0.5, {"cond": cond, "uncond": null})
    np.testing.assert_allclose(y, 5.0)
    assert [set(each) for each in seen] == [{"scale", "ids"}] * 2


# The hub: a cache as the package leaves it, and a server that is a folder.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return path


def cached(cache, source, names=None):
    """Puts files into the cache under their hashes, as the package does: blobs, and a snapshot of links to them. Returns the snapshot."""
    model = cache / "models--org--tiny-model"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "blobs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(SHA)
    snapshot = model / "snapshots" / SHA
    for file in (path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        link = snapshot / name
        if (names is None or name in names) and not link.is_symlink():
            blob = model / "blobs" / hashlib.sha256(name.encode()).hexdigest()
            shutil.copy(file, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def server(tmp_path, cache, monkeypatch):
    """A repository on the hub; the names fetched from it are recorded."""
    source, fetched = tmp_path / "server", set()
    source.mkdir()
    download = huggingface_hub.snapshot_download

    def names(self, repo_id, **kwargs):
        return sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_files_only=False, **kwargs):
        if local_files_only:
            return download(repo_id, revision=revision, allow_patterns=allow_patterns, local_files_only=True, **kwargs)
        found = set(huggingface_hub.utils.filter_repo_objects(names(None, repo_id), allow_patterns=allow_patterns))
        fetched.update(found)
        return str(cached(cache, source, found))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return source, fetched


def test_offline_from_the_cache(cache, sound, tmp_path, monkeypatch):
    cached(cache, pipeline(tmp_path / "pipe"))
    assert same(load_model(ID, local_files_only=True)[1], PARAMS)
    assert load_pipeline(ID, local_files_only=True).scheduler == SCHEDULER
    assert same(load_model(ID, local_files_only=True, revision=SHA)[1], PARAMS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load_pipeline(ID).components["unet"][1], PARAMS)
    with pytest.raises(ConnectionError, match="There is no folder at org/other, and the hub's cache has nothing of that id"):
        load_model("org/other")
    with pytest.raises(ConnectionError, match="nothing of the revision 'v2'"):
        load_model(ID, revision="v2")


def test_shards_in_the_cache_are_links_to_blobs(cache, folder):
    shard(folder)
    snapshot = cached(cache, folder)
    assert (snapshot / SHARDS[0]).is_symlink()
    assert same(load_model(ID, local_files_only=True)[1], PARAMS)
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to(folder / SHARDS[0])
    with pytest.raises(ValueError, match="is a link that leaves"):
        load_model(ID, local_files_only=True)


def test_what_is_fetched(server):
    source, fetched = server
    pipeline(source)
    shard(source / "unet", [name.replace("model-", "model.fp16-") for name in SHARDS], "diffusion_pytorch_model.safetensors.index.fp16.json")
    save(source / "again", NET, PARAMS)
    for name in ("model.ckpt", "model.safetensors", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        (source / name).write_bytes(b"never read")
    for name in ("safety_checker/model.safetensors", "text_encoder_3/model.safetensors", "unet/code.py", "tokenizer/merges.txt", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    assert same(load_pipeline(ID, variant="fp16").components["unet"][1], PARAMS)
    weights = {name for name in fetched if not name.endswith(".json")}
    assert weights == {"tokenizer/merges.txt", *(f"unet/{name.replace('model-', 'model.fp16-')}" for name in SHARDS)}
    fetched.clear()
    assert same(load_model(ID, subfolder="again")[1], PARAMS)
    assert {name for name in fetched if name.endswith(".safetensors")} == {f"again/{WEIGHTS}"}
    with pytest.raises(FileNotFoundError, match="org/tiny-model/again has no weights of the variant 'bf16'"):
        load_model(ID, subfolder="again", variant="bf16")


def test_pickles_on_the_hub_are_not_fetched(server, folder):
    source, fetched = server
    shutil.copytree(folder, source, dirs_exist_ok=True)
    (source / WEIGHTS).rename(source / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="org/tiny-model has pickled weights only"):
        load_model(ID)
    assert fetched == {"config.json"}


def http(kind):
    """An error of the package as the server's answer would make it, whatever its constructor asks for."""
    error = kind.__new__(kind)
    Exception.__init__(error, "said the server")
    return error


REFUSALS = {
    "gated": (errors.GatedRepoError, PermissionError, "is gated: accept its terms at https://huggingface.co/org/tiny-model"),
    "not found": (errors.RepositoryNotFoundError, FileNotFoundError, "neither a folder nor a repository on the hub named org/tiny-model"),
    "revision": (errors.RevisionNotFoundError, FileNotFoundError, "has no revision 'v2'"),
    "network": (RuntimeError, ConnectionError, r"the hub's cache has nothing of the revision 'v2' of that id \(said the server\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_the_hub(cache, monkeypatch, case):
    theirs, ours, message = REFUSALS[case]

    def refuse(*args, **kwargs):
        raise http(theirs)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(ours, match=message) as error:
        load_model(ID, revision="v2")
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_network_that_fails_leaves_the_cache(cache, folder, monkeypatch):
    cached(cache, folder)

    def refuse(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    assert same(load_model(ID)[1], PARAMS)


def test_a_path_wins_and_belongs_to_no_revision(cache, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    shutil.copytree(folder, folder.parent / ID)
    assert same(load_model(ID)[1], PARAMS)
    with pytest.raises(ValueError, match="revision='v2' is one of a repository on the hub, and org/tiny-model is none"):
        load_model(ID, revision="v2")
    with pytest.raises(FileNotFoundError, match="There is no folder at org/other"):
        load_model(Path("org/other"))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./a/b", "/a/b", "a--b/c", "a/..", "../a", "a/b.", "~/model"])
def test_what_is_no_id(cache, name):
    with pytest.raises(FileNotFoundError, match="There is no folder at"):
        load_model(name)


def test_without_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"There is no folder at org/tiny-model, .*pip install 'adjoint-jax\[hub\]'"):
        load_model(ID)


def test_ids():
    assert all(_hub.ID.fullmatch(name) for name in ("google/ddpm-cat-256", "CompVis/stable-diffusion-v1-4", "a/b", "org_x/model.v1"))
    assert re.compile(_hub.DESCRIBING).fullmatch("unet/config.json")
    assert not any(_hub.DESCRIBING.fullmatch(name) for name in ("x.ckpt", "unet/a/b.json", "unet/merges.txt", "code.py"))
