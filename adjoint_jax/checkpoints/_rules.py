"""The bijection between torch's names and layouts and Flax's. One table serves reading and writing.

torch                          Flax
`NAME.weight`  [O, I, h, w]    `NAME/kernel`     [h, w, I, O]    convolution
`NAME.weight`  [O, I]          `NAME/kernel`     [I, O]          dense
`NAME.weight`  [C]             `NAME/scale`      [C]             norm
`NAME.weight`  [N, C]          `NAME/embedding`  [N, C]          embedding
`NAME.bias`    [C]             `NAME/bias`       [C]
`NAME.weight`  [O, I, w]       `NAME/kernel`     [w, I, O]       convolution along one axis
`LIST.3.`                      `LIST_3/`                         for the `lists` of a family; any other number is part of a name (`linear_1`)
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from . import _files, _tensors
from ._family import Family, Named

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
TO_TORCH = {("kernel", 4): (3, 2, 0, 1), ("kernel", 3): (2, 1, 0), ("kernel", 2): (1, 0)}
SHOWN = 20


class Rule(NamedTuple):
    """Where a tensor of a checkpoint goes: its path in Flax, its shape in torch, and the axes that turn torch's layout into Flax's."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def torch_name(path: tuple[str, ...], lists: Sequence[str]) -> str:
    """`("resnets_1", "conv1", "kernel")` is `resnets.1.conv1.weight` where `resnets` is a list."""
    pattern = re.compile(rf"^({'|'.join(lists)})_(\d+)$")
    return ".".join([*(pattern.sub(r"\1.\2", part) for part in path[:-1]), LEAVES.get(path[-1], path[-1])])


def _to_torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    return TO_TORCH.get((path[-1], ndim), tuple(range(ndim)))


def _flat(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return cast(dict[tuple[str, ...], Any], flatten_dict(tree))


def rules(shapes: Mapping[str, Any], lists: Sequence[str]) -> dict[str, Rule]:
    """The rule of each tensor that a network wants, from the tree of its parameters' shapes."""
    table, flat = {}, _flat(shapes)
    for path, leaf in flat.items():
        axes = _to_torch_axes(path, len(leaf.shape))
        table[torch_name(path, lists)] = Rule(path, tuple(leaf.shape[i] for i in axes), tuple(int(i) for i in np.argsort(axes)))
    if len(table) != len(flat):
        raise ValueError("Two parameters of this network have one name in torch: extend the rule table in adjoint_jax/checkpoints/_rules.py.")
    return table


def _listed(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} {what} ({_files.listed(names, SHOWN)})" if names else ""


def check(table: dict[str, Rule], named: Named, source: str) -> None:
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


def to_flax(family: Family, shapes: Mapping[str, Any], named: Named, source: str, dtype: Any) -> dict[str, Any]:
    """Parameters in Flax's names and layouts, of the given dtype, from (name, tensor) pairs in torch's."""
    table, named = rules(shapes, family.lists), _tensors.floats(family.tensors(named), source)
    check(table, named, source)
    return unflatten_dict({table[name].path: jnp.asarray(_tensors.cast(name, tensor, dtype).transpose(table[name].axes)) for name, tensor in named})


def to_torch(family: Family, shapes: Mapping[str, Any], params: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Tensors in torch's names and layouts from parameters in Flax's; bfloat16, which numpy cannot name, becomes float32."""
    named = []
    for path, leaf in _flat(params).items():
        array = np.asarray(leaf)
        array = array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
        named.append((torch_name(path, family.lists), np.asarray(array.transpose(_to_torch_axes(path, array.ndim)), order="C")))
    check(rules(shapes, family.lists), named, source)
    return dict(named)
