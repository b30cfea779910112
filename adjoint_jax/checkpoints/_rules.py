"""The bijection between torch's names and layouts and Flax's. One table serves reading and writing.

torch                          Flax
`NAME.weight`  [O, I, h, w]    `NAME/kernel`     [h, w, I, O]    convolution
`NAME.weight`  [O, I]          `NAME/kernel`     [I, O]          dense
`NAME.weight`  [C]             `NAME/scale`      [C]             norm
`NAME.weight`  [N, C]          `NAME/embedding`  [N, C]          embedding
`NAME.bias`    [C]             `NAME/bias`       [C]
`LIST.3.`                      `LIST_3/`                         for the names in LISTS; any other number is part of a name (`linear_1`)
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

LISTS = ("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out", "conv", "norm")
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
TO_TORCH = {("kernel", 4): (3, 2, 0, 1), ("kernel", 2): (1, 0)}
# Attention in the files of 2022; `proj_attn` became the first entry of a list.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SHOWN = 20


class Rule(NamedTuple):
    """Where a tensor of a checkpoint goes: its path in Flax, its shape in torch, and the axes that turn torch's layout into Flax's."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def torch_name(path: tuple[str, ...]) -> str:
    """`("resnets_1", "conv1", "kernel")` is `resnets.1.conv1.weight`."""
    parts = (re.sub(rf"^({'|'.join(LISTS)})_(\d+)$", r"\1.\2", part) for part in path[:-1])
    return ".".join([*parts, LEAVES.get(path[-1], path[-1])])


def current_name(name: str) -> str:
    """The name that today's files give to a tensor of a file of any year."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda match: OLD_NAMES[match[1]], name)


def _to_torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    return TO_TORCH.get((path[-1], ndim), tuple(range(ndim)))


def _flat(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return cast(dict[tuple[str, ...], Any], flatten_dict(tree))


def rules(shapes: Mapping[str, Any]) -> dict[str, Rule]:
    """The rule of each tensor that a network wants, from the tree of its parameters' shapes."""
    table, flat = {}, _flat(shapes)
    for path, leaf in flat.items():
        axes = _to_torch_axes(path, len(leaf.shape))
        table[torch_name(path)] = Rule(path, tuple(leaf.shape[i] for i in axes), tuple(int(i) for i in np.argsort(axes)))
    if len(table) != len(flat):
        raise ValueError("Two parameters of this network have one name in torch: extend the rule table in adjoint_jax/checkpoints/_rules.py.")
    return table


def _listed(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})" if names else ""


def check(table: dict[str, Rule], named: list[tuple[str, np.ndarray]], source: str) -> None:
    """Raises one ValueError that lists every tensor missing, unexpected, given twice, misshapen or not finite."""
    counts, tensors = Counter(name for name, _ in named), dict(named)
    shared = [(name, tensors[name], rule.shape) for name, rule in table.items() if name in tensors]
    problems = [
        _listed("missing", (name for name in table if name not in tensors)),
        _listed("unexpected", (name for name in tensors if name not in table)),
        _listed("given twice", (name for name, count in counts.items() if count > 1)),
        _listed("misshapen", (f"{name} {x.shape} instead of {shape}" for name, x, shape in shared if x.shape != shape)),
        _listed("not finite", (name for name, x in tensors.items() if not np.isfinite(x).all())),
    ]
    if found := ", ".join(filter(None, problems)):
        raise ValueError(f"The tensors of {source} do not fit its configuration: {found}; check that the two belong together.")


def to_flax(shapes: Mapping[str, Any], named: list[tuple[str, np.ndarray]], source: str, dtype: Any) -> dict[str, Any]:
    """Parameters in Flax's names and layouts, of the given dtype, from (name, tensor) pairs in torch's."""
    table = rules(shapes)
    named = [(current_name(name), tensor) for name, tensor in named]
    check(table, named, source)
    return unflatten_dict({table[name].path: jnp.asarray(tensor.transpose(table[name].axes).astype(dtype)) for name, tensor in named})


def to_torch(shapes: Mapping[str, Any], params: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Tensors in torch's names and layouts from parameters in Flax's; bfloat16, which numpy cannot name, becomes float32."""
    named = []
    for path, leaf in _flat(params).items():
        array = np.asarray(leaf)
        array = array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
        named.append((torch_name(path), np.ascontiguousarray(array.transpose(_to_torch_axes(path, array.ndim)))))
    check(rules(shapes), named, source)
    return dict(named)
