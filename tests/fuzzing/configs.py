"""Damage to the configurations: `config.json`, `model_index.json`, `scheduler_config.json`, a tokenizer's."""

import json
from typing import Any

from .case import ALL, FOLDERS, Case, mutation
from .subjects import END, MODULES

NESTED = "[" * 100_000
KINDS: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "text",
    "empty text": "",
    "long text": "x" * 20_000,
    "text of two lines": "a\nb",
    "zero": 0,
    "one": 1,
    "minus one": -1,
    "huge": 10**12,
    "beyond 64 bits": 10**30,
    "fraction": 0.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "negative fraction": -0.25,
    "tiny": 5e-324,
    "empty list": [],
    "list of nothing": [None],
    "list of zero": [0],
    "long list": [1] * 10_000,
    "mixed list": [1, "a", None, {}],
    "deep list": [[[[[[[[1]]]]]]]],
    "object": {"a": 1},
    "empty object": {},
    "object of objects": {"a": {"b": [1]}},
}
OPTIONS: dict[str, Any] = {
    "norm_num_groups": [2, 1, 3, 8, 32],
    "attn_norm_num_groups": [2, 3],
    "act_fn": ["gelu", "mish", "relu", "silu", "swish", "tanh"],
    "hidden_act": ["gelu", "quick_gelu", "gelu_new", "relu"],
    "activation_fn": ["gelu", "geglu", "gelu-approximate"],
    "time_embedding_type": ["positional", "fourier", "learned"],
    "resnet_time_scale_shift": ["scale_shift", "default", "ada_group", "spatial"],
    "downsample_type": ["resnet", "conv"],
    "upsample_type": ["resnet", "conv"],
    "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
    "addition_embed_type": ["text", "text_time", "image"],
    "attention_head_dim": [1, 2, 3, 4, 8, [2]],
    "num_attention_heads": [1, 2, 3, 4],
    "num_heads": [1, 2, 3, 4],
    "num_head_channels": [8, 16, 5, -1, 0],
    "down_block_types": [
        ["DownBlock2D"],
        ["AttnDownBlock2D"] * 2,
        ["CrossAttnDownBlock2D"],
        ["ResnetDownsampleBlock2D"],
        ["SimpleCrossAttnDownBlock2D"],
    ],
    "up_block_types": [["UpBlock2D"], ["AttnUpBlock2D"], ["CrossAttnUpBlock2D"], ["ResnetUpsampleBlock2D"], ["UpDecoderBlock2D"]],
    "embedding_type": ["fourier", "positional", "zero"],
    "encoder_type": ["residual", "skip", "standard"],
    "decoder_type": ["skip", "standard"],
    "resample_filter": [[1, 3, 3, 1], [1, 1]],
    "precond": ["vp", "ve", "edm", "iddpm"],
    "qk_norm": ["layer_norm", "rms_norm", None],
    "dual_attention_layers": [[0, 1], [5], [-1], [0, 0]],
    "mid_block_type": ["UNetMidBlock2D", "UNetMidBlock2DCrossAttn", None],
    "block_out_channels": [[8, 8], [12], [16], []],
    "channel_mult": [[1, 1], [2], [], [0.5], [0.3]],
    "features": [[4], [4, 4, 4], [6, 4], []],
    "patch_size": [1, 3, 4, 16],
    "sample_size": [4, 16, [8, 8], 4096],
    "image_size": [4, 16, 7],
    "cross_attention_dim": [4, [8], [8, 8]],
    "transformer_layers_per_block": [2, [1], [[1]], [1, 1]],
    "layers_per_block": [2, [1], 3],
    "_class_name": [*MODULES, "CLIPTextModel", "UNet2DModel", "T5EncoderModel", "../x", "FlaxUNet2DModel"],
    "architectures": [["CLIPTextModel"], ["CLIPModel"], ["T5EncoderModel"], [["CLIPTextModel"]], "CLIPTextModel", [None]],
    "beta_schedule": ["linear", "squaredcos_cap_v2", "exp"],
}
MORE: dict[str, Any] = {
    "upcast": True, "encoder_hid_dim": 8, "dropout_rate": 0.1, "norm_epss": 1e-6, "a\nb": 1, "x" * 20_000: 1, "__init__": "x",
    "parent": 1, "name": "x",
    "remat": True, "auto_map": {"AutoModel": "evil.Evil"}, "quantization_config": {"bits": 4}, "self": 1, "": 0, "\ud800": 1, "norm_eps ": 3,
    "text_config": {"hidden_size": 8}, "text_config_dict": [1], "num_attention_heads": 2, "with_projection": False, "dummy_inputs": 3,
}  # fmt: skip


def load(path: Any) -> Any:
    return json.loads(path.read_text())


def chosen(case: Case) -> tuple[Any, dict[str, Any], str]:
    """A configuration, its contents and one of its entries."""
    model = case.subject.kind == "model" or (case.subject.kind == "pipeline" and case.pick([True, False]))
    path = case.config if model else case.json_file()
    config = load(path)
    return path, config, case.pick(config)


@mutation(*FOLDERS, "tokenizer", weight=9)
def entry_removed(case: Case) -> str:
    path, config, name = chosen(case)
    del config[name]
    path.write_text(json.dumps(config))
    return f"{path.name} {name}"


@mutation(*FOLDERS, "tokenizer", weight=30)
def entry_of_another_kind(case: Case) -> str:
    path, config, name = chosen(case)
    kind = case.pick(KINDS)
    path.write_text(json.dumps(config | {name: KINDS[kind]}))
    return f"{path.name} {name} {kind}"


@mutation(*FOLDERS, weight=9)
def another_option(case: Case) -> str:
    path, config, name = chosen(case)
    if known := [key for key in config if key in OPTIONS]:
        name = case.pick(known)
    value = case.pick(OPTIONS.get(name, [config[name]]))
    path.write_text(json.dumps(config | {name: value}))
    return f"{path.name} {name} {value}"


@mutation(*FOLDERS, weight=6)
def number_changed(case: Case) -> str:
    path, config, _ = chosen(case)
    names = [name for name, value in config.items() if type(value) in (int, float)]
    name = case.pick(names) if names else case.pick(config)
    old = config[name] if names else 0
    value = case.pick([-old, old + 1, old - 1, old * 2, old / 2, float(old), str(old), [old], 0, old * 10**6, 1e308, 1e-308])
    path.write_text(json.dumps(config | {name: value}))
    return f"{path.name} {name} {str(value)[:20]}"


@mutation(*FOLDERS, weight=4)
def item_of_a_list(case: Case) -> str:
    path, config, _ = chosen(case)
    lists = [name for name, value in config.items() if isinstance(value, list) and value] or [case.pick(config)]
    name = case.pick(lists)
    items = list(config[name]) if isinstance(config[name], list) else [config[name]]
    i = int(case.rng.integers(len(items)))
    items[i] = case.pick([None, 0, -1, 10**9, "", "x", True, 1.5, [], {}, float("nan"), "a\nb", "../x"])
    items = case.pick([items, items, items * 2, items[:i]])
    path.write_text(json.dumps(config | {name: items}))
    return f"{path.name} {name} {str(items)[:40]}"


@mutation(*FOLDERS, weight=4)
def entry_added(case: Case) -> str:
    path, config, _ = chosen(case)
    name = case.pick(MORE)
    path.write_text(json.dumps(config | {name: MORE[name]}))
    return f"{path.name} {name[:20]!r}"


@mutation(*FOLDERS, weight=3)
def of_another_class(case: Case) -> str:
    other = case.subject.path.parent / case.pick(MODULES)
    text = (other / "config.json").read_text()
    case.config.write_text(text)
    return other.name


@mutation(*FOLDERS, "tokenizer", weight=3)
def entry_twice(case: Case) -> str:
    path, config, name = chosen(case)
    value = case.pick([config[name], None, 1, "x"])
    path.write_text(f"{json.dumps(config)[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}")
    return f"{path.name} {name}"


@mutation(*FOLDERS, "tokenizer", weight=5)
def not_json(case: Case) -> str:
    path = chosen(case)[0]
    raw = path.read_bytes()
    texts = [
        b"", b"{", b"[]", b"null", b"5", b'"x"', raw[:-2], raw + b"}", raw + raw, b"\xff\xfe" + raw, b"\x80\x04\x95",
        NESTED.encode(), b'{"a":' * 50_000,
        b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), b"{" + b" " * 2**20, b'{"x": ' + b"9" * 5000 + b"}", raw.replace(b":", b"=", 1),
        b"{}", b"\x00" * 50,
    ]  # fmt: skip
    text = case.pick(texts)
    path.write_bytes(text)
    return f"{path.name} {text[:10]!r} of {len(text)}"


@mutation(*ALL, weight=1)
def too_long(case: Case) -> str:
    if case.subject.kind in ("lora", "convert"):
        with case.weights.open("r+b") as file:
            file.truncate(2**33)  # sparse
        return case.weights.name
    path = chosen(case)[0]
    with path.open("r+b") as file:
        file.truncate(2**33)
    return path.name


@mutation(*FOLDERS, "tokenizer", weight=4)
def byte_of_a_configuration(case: Case) -> str:
    path = chosen(case)[0]
    raw = bytearray(path.read_bytes())
    for _ in range(case.pick([1, 1, 3])):
        raw[int(case.rng.integers(len(raw)))] = int(case.rng.integers(256))
    path.write_bytes(raw)
    return path.name


BAD_PAIRS: tuple[Any, ...] = (
    None, "x", [], ["diffusers"], ["diffusers", "UNet2DModel", "x"], [None, None], ["diffusers", None], [1, 2], ["a", ["b"]], ["evil", "Evil"],
    ["diffusers", "AutoencoderKL"], ["diffusers", "x" * 9000], ["../x", "../y"], {"a": 1}, ["transformers", "CLIPTextModel"], True,
)  # fmt: skip


@mutation("pipeline", weight=14)
def component(case: Case) -> str:
    path = case.folder / "model_index.json"
    index = load(path)
    name = case.pick(
        [*(key for key in index if not key.startswith("_")), "../unet", "/etc", "transformer", "x\ny", ".", "unet/../vae", "x" * 3000, ""]
    )
    value = case.pick(BAD_PAIRS)
    path.write_text(json.dumps(index | {name: value}))
    return f"{name[:20]!r} {str(value)[:40]}"


@mutation("tokenizer", "pipeline", weight=4)
def vocabulary(case: Case) -> str:
    folder = case.folder if case.subject.kind == "tokenizer" else case.folder / "tokenizer"
    value = case.pick([-1, 2**31, 2**40, 0, None, "1", 1.5, [1]])
    words = load(folder / "vocab.json")
    name = case.pick(words)
    (folder / "vocab.json").write_text(json.dumps(words | {name: value}))
    return f"{name} {value}"


@mutation("tokenizer", weight=3)
def merges(case: Case) -> str:
    text = case.pick(["", "x", "a b c\n", "l o\nl o\n", "q z\n", "l\n", "\ud800", "#version: 9\n", "l o\n" * 9999, "\x00 \x00\n"])
    (case.folder / "merges.txt").write_bytes(text.encode(errors="surrogatepass"))
    return repr(text[:20])


@mutation("tokenizer", weight=3)
def tokenizer_json(case: Case) -> str:
    texts = ["{}", "[]", "", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', '{"model": {"type": "Evil"}}', "[" * 99999]
    text = case.pick(texts)
    (case.folder / "tokenizer.json").write_text(text)
    return text[:30]


@mutation("tokenizer", weight=4)
def special_tokens(case: Case) -> str:
    name = case.pick(["tokenizer_config.json", "special_tokens_map.json"])
    key = case.pick(["pad_token", "bos_token", "eos_token", "unk_token", "added_tokens_decoder", "model_max_length"])
    value = case.pick([None, 5, [], {}, {"content": 5}, {"content": END, "lstrip": "x"}, "absent", "a\nb", {"x": {"content": "y"}}, {"-1": "y"},
                       {"0": None}, {"0": {"content": "l", "special": "no"}}, -3, float("nan"), float("inf"), 10**30,
                       "x" * 9000, 60_000])  # fmt: skip
    path = case.folder / name
    path.write_text(json.dumps(load(path) | {key: value}))
    return f"{name} {key} {str(value)[:30]}"
