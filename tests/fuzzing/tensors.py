"""Damage to a safetensors file: its bytes, its header, its tensors."""

import json

import ml_dtypes
import numpy as np

from .case import TENSORS, Case, mutation
from .reader import write

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
ODD = ["", ".", "a\nb", "\ud800", "x" * 5000, "../../etc/passwd", "__class__", "params", "😀" * 300, "conv_in..weight", "\x00", "NaN", "0"]


@mutation(*TENSORS, weight=2)
def truncated(case: Case) -> str:
    raw = case.weights.read_bytes()
    end = case.pick([0, 1, 7, 8, 9, len(raw) - 1, len(raw) // 2, int(case.rng.integers(len(raw)))])
    case.weights.write_bytes(raw[:end])
    return f"at {end}"


@mutation(*TENSORS)
def appended(case: Case) -> None:
    case.weights.write_bytes(case.weights.read_bytes() + bytes(int(case.rng.integers(1, 100))))


@mutation(*TENSORS, weight=2)
def header_length(case: Case) -> str:
    raw = case.weights.read_bytes()
    true = int.from_bytes(raw[:8], "little")
    length = case.pick([0, 1, true - 1, true + 1, true + 8, len(raw), 100_000_001, 2**31, 2**63, 2**64 - 1])
    case.weights.write_bytes(length.to_bytes(8, "little") + raw[8:])
    return str(length)


@mutation(*TENSORS, weight=5)
def bytes_of_header(case: Case) -> str:
    raw = bytearray(case.weights.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(case.pick([1, 1, 1, 2, 5])):
        raw[int(case.rng.integers(0, 8 + length))] = int(case.rng.integers(256))
    case.weights.write_bytes(raw)
    return "changed"


@mutation(*TENSORS, weight=2)
def bytes_anywhere(case: Case) -> None:
    raw = bytearray(case.weights.read_bytes())
    for _ in range(case.pick([1, 3, 20])):
        raw[int(case.rng.integers(len(raw)))] = int(case.rng.integers(256))
    case.weights.write_bytes(raw)


@mutation(*TENSORS, weight=2)
def header_is_something_else(case: Case) -> str:
    text = case.pick([b"", b"[]", b"null", b"{", b"{}", b'"' * 9, b"[" * 200_000, b'{"a":' * 100_000, b"\xff" * 16, b'{"__metadata__":5}', b"1e999"])
    case.put(text, case.header()[1])
    return text[:12].decode("latin1")


@mutation(*TENSORS, weight=6)
def entry_of_header(case: Case) -> str:
    header, data = case.header()
    name = case.pick(key for key in header if key != "__metadata__")
    entry = header[name]
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    changes = {
        "no dtype": {"dtype": None},
        "odd dtype": {"dtype": case.pick(["F128", "", "f32", "I32", "U32", "F8_E4M3", "BF16", "C64", 5])},
        "negative shape": {"shape": [-1, *shape]},
        "huge shape": {"shape": [2**40, 2**40]},
        "overflowing shape": {"shape": [2**63, 2, *shape]},
        "shape of strings": {"shape": [str(each) for each in shape]},
        "shape of floats": {"shape": [float(each) for each in shape]},
        "nested shape": {"shape": [shape]},
        "zero shape": {"shape": [0, *shape]},
        "reversed shape": {"shape": shape[::-1]},
        "longer shape": {"shape": [1, *shape]},
        "many dimensions": {"shape": [1] * 70 + shape},
        "overlap": {"data_offsets": [max(0, begin - 4), end]},
        "shifted": {"data_offsets": [begin + 4, end + 4]},
        "out of range": {"data_offsets": [begin, len(data) + 4]},
        "backwards": {"data_offsets": [end, begin]},
        "negative": {"data_offsets": [-4, end]},
        "huge": {"data_offsets": [begin, 2**64]},
        "three": {"data_offsets": [begin, end, end]},
        "no offsets": {"data_offsets": []},
        "more": {"more": 1},
    }
    how = case.pick(changes)
    entry |= changes[how]
    case.put(header, data)
    return f"{how} of {name}"


@mutation(*TENSORS, weight=2)
def metadata(case: Case) -> str:
    header, data = case.header()
    value = case.pick([5, None, [], {"format": 5}, {"format": "tf"}, {"x": "y" * 10**6}, {"lora_adapter_metadata": "[["}, {"format": {}}])
    case.put({**header, "__metadata__": value}, data)
    return str(value)[:30]


@mutation(*TENSORS)
def name_twice(case: Case) -> None:
    header, data = case.header()
    text = json.dumps(header)
    name = case.pick(key for key in header if key != "__metadata__")
    case.put(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), data)


@mutation(*TENSORS, weight=2)
def dropped(case: Case) -> None:
    tensors = case.tensors()
    for name in case.rng.permutation(list(tensors))[: case.pick([1, 1, 5, 1000])]:
        del tensors[str(name)]
    case.store(tensors)


@mutation(*TENSORS, weight=3)
def renamed(case: Case) -> str:
    tensors = case.tensors()
    name = case.pick(tensors)
    other = case.pick([*ODD[:3], *ODD[4:], name.upper(), f"{name}.weight", f"module.{name}", name.replace(".", "_"), name[:-1], f"{name} "])
    tensors[other] = tensors.pop(name)
    case.store(tensors)
    return f"{name} to {other[:20]!r}"


@mutation(*TENSORS, weight=2)
def added(case: Case) -> str:
    tensors = case.tensors()
    other = case.pick(
        [*ODD[:3], *ODD[4:], "input_blocks.1.1", "output_blocks.3", "output_blocks.x.in_layers.0.weight", "ema_model.x", "a.lora_A.weight"]
    )
    for i in range(case.pick([1, 3, 40])):
        tensors[f"{other}{i or ''}"] = np.ones(case.pick([(), (0,), (2,), (1, 1), (3, 4)]), np.float32)
    case.store(tensors)
    return repr(other[:20])


@mutation("model", "pipeline")
def under_an_old_name_too(case: Case) -> None:
    tensors = case.tensors()
    for new, old in OLD.items():
        found = [name for name in tensors if f".{new}." in name]
        for name in found[:2]:
            tensors[name.replace(f".{new}.", f".{old}.")] = tensors[name] + 1
    tensors |= {} if any(".query." in name for name in tensors) else {"query": np.zeros(2, np.float32)}
    case.store(tensors)


@mutation("model")
def under_old_names(case: Case) -> None:
    tensors = case.tensors()
    for new, old in OLD.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    case.store(tensors)


@mutation(*TENSORS)
def prefixed(case: Case) -> str:
    prefix = case.pick(["model.", "module.", "text_model.", "ema_model.", "unet.", "state_dict."])
    case.store({prefix + name: tensor for name, tensor in case.tensors().items()})
    return prefix


@mutation(*TENSORS, weight=3)
def reshaped(case: Case) -> str:
    tensors = case.tensors()
    name = case.pick(tensors)
    x = tensors[name]
    ways = {
        "flat": x.reshape(-1),
        "transposed": x.T,
        "longer": x[None],
        "scalar": x.reshape(-1)[0].reshape(()),
        "empty": x[:0],
        "half": x[: len(x) // 2],
    }
    how = case.pick(ways)
    tensors[name] = ways[how]
    case.store(tensors)
    return f"{name} {how}"


@mutation("convert", "lora", weight=3)
def reshaped_what_tells_the_architecture(case: Case) -> str:
    tensors = case.tensors()
    telling = ("label_emb", "time_embed", ".0.0.weight", "out.2.", "to_k", "proj_in", "emb_layers", "lora_A", "out_layers.3")
    name = case.pick(name for name in tensors if any(each in name for each in telling))
    x = tensors[name]
    tensors[name] = case.pick([x.reshape(-1), x.reshape(-1)[0].reshape(()), x[:0], np.zeros((*x.shape, 0), np.float32)])
    case.store(tensors)
    return f"{name} {x.shape}"


@mutation(*TENSORS, weight=2)
def swapped(case: Case) -> str:
    tensors = case.tensors()
    one, other = case.pick(tensors), case.pick(tensors)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    case.store(tensors)
    return f"{one} and {other}"


@mutation(*TENSORS, weight=2)
def not_finite(case: Case) -> str:
    tensors = case.tensors()
    name = case.pick(tensors)
    value = case.pick([np.nan, np.inf, -np.inf])
    flat = tensors[name].reshape(-1)
    flat[int(case.rng.integers(flat.size))] = value
    case.store(tensors)
    return f"{value} in {name}"


@mutation(*TENSORS)
def value_changed(case: Case) -> None:
    tensors = case.tensors()
    tensors[case.pick(tensors)].reshape(-1)[0] += 1
    case.store(tensors)


KINDS = (np.int32, np.int64, np.int8, np.uint8, np.bool_, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@mutation(*TENSORS, weight=3)
def dtype(case: Case) -> str:
    tensors, kind = case.tensors(), case.pick(KINDS)
    names = list(tensors) if case.pick([True, False]) else [case.pick(tensors)]
    for name in names:
        tensors[name] = tensors[name].astype(kind)
    case.store(tensors)
    return f"{np.dtype(kind).name} in {len(names)}"


@mutation("model", "lora")
def overflows_float32(case: Case) -> None:
    tensors = case.tensors()
    name = case.pick(tensors)
    tensors[name] = tensors[name].astype(np.float64)
    tensors[name].reshape(-1)[0] = 1e300
    case.store(tensors)


@mutation("lora", weight=4)
def peft_metadata(case: Case) -> str:
    options = [
        {"r": 2}, {"lora_alpha": -1}, {"lora_alpha": "4"}, {"unet.lora_alpha": float("nan")}, {"lora_alpha": 10**400}, {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": []}, {"alpha_pattern": {"(a+)+$": 1.0}}, {"alpha_pattern": {"x": None}},
        {"alpha_pattern": {"(.*)*(.*)*(.*)*x": 1}}, {"alpha_pattern": {".*" * 20 + "x": 1}}, {"alpha_pattern": {"to_q": 4}},
        {"use_dora": True}, {"use_rslora": "no"}, {"bias": "all"},
        {"modules_to_save": ["x"]}, {"peft_type": "LOHA"}, {"init_lora_weights": "pissa"}, {"peft_type": {"a": 1}}, {"bias": ["x" * 9000]},
        {"alpha_pattern": {"((((((a*)*)*)*)*)*)*b": 1}}, {"lora_alpha": True}, {"unet": {"lora_alpha": 3}},
        {"init_lora_weights": "pissa" + "x" * 9000},
    ]  # fmt: skip
    value = case.pick(options)
    text = case.pick([json.dumps(value), json.dumps(value), json.dumps([value]), json.dumps(value)[:-1], '{"lora_alpha": 1, "lora_alpha": 2}'])
    write(case.weights, case.tensors(), {"format": "pt", "lora_adapter_metadata": text})
    return text[:60]


@mutation("lora", weight=3)
def other_adapter(case: Case) -> str:
    tensors = case.tensors()
    name = case.pick(name for name in tensors if "lora_A" in name)
    stem = name.removesuffix(".lora_A.weight")
    extra = {
        f"{stem}.{key}": np.ones(1, np.float32)
        for key in (
            "lora_magnitude_vector",
            "hada_w1_a",
            "lokr_w1",
            "diff_b",
            "alpha",
            "lora_mid.weight",
            "lora_B.bias",
            "lora.down.weight",
            "alphas",
        )
    }
    key = case.pick(extra)
    value = case.pick(
        [extra[key], np.float32(np.nan) * extra[key], np.zeros((0,), np.float32), np.ones((2, 2), np.float32), np.zeros((), np.float32)]
    )
    case.store(tensors | {key: value})
    return key.removeprefix(stem)
