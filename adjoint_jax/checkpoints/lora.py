"""Low-rank corrections of a network's weights, apart from the weights themselves:

    W' = W + s (alpha / r) up down,    down of rank r                                                              (1)

A LoRA is a pytree, so that gradients in it are taken as in anything else. Its arrays have Flax's layout: for a kernel `[..., I, O]`, dense or a
convolution, `down` is `[..., I, r]` and `up` is `[r, O]`, and (1) reads `kernel + s scale (down @ up)`. `merge` computes it, a pure
function: once, before the sampler ("merged on load"), or inside the differentiated function ("kept"). Reference: Hu et al., LoRA (2021), section 4.1.
"""

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from .._types import Args, Network, State
from ..networks._wrapping import as_pytree
from . import _files, _lora_files, _lora_names, _tensors

__all__ = ["Factors", "LoRA", "init_lora", "load_lora", "merge", "save_lora", "with_lora"]


class Factors(NamedTuple):
    """The correction of one kernel: `down` `[..., I, r]`, `up` `[r, O]`, `scale` = alpha / r. All three are leaves."""

    down: Float[Array, "*window i r"]
    up: Float[Array, "r o"]
    scale: Float[Array, ""]


LoRA = dict[str, Factors]
"""Factors by the path of their kernel among the parameters, `"mid_block/attentions_0/to_q/kernel"`."""


def merge(params: Mapping[str, Any], lora: Mapping[str, Factors], scale: Any = 1.0) -> dict[str, Any]:
    """Parameters with the correction in them: (1), computed in float32 at least, each kernel in its own dtype.

    Args:
        params: of one network.
        lora: its correction; one network may have several, merged one after the other.
        scale: s, a scalar; differentiable, as are `params` and `lora`.

    Raises ValueError for a kernel that is not there, or factors that do not fit it.

        loss = lambda lora: f(aj.sample(term, x_T, {"params": merge(params, lora), "cond": cond}, grid=ts))
        g = jax.grad(loss)(lora)
    """
    flat = cast(dict[tuple[str, ...], Any], flatten_dict(params))
    for name, factors in lora.items():
        kernel = flat.get(tuple(name.split("/")))
        if kernel is None:
            raise ValueError(f"The LoRA corrects {name}, which the parameters do not have: give the parameters of the network it was loaded for.")
        wanted = (*kernel.shape[:-1], factors.up.shape[0]), (factors.down.shape[-1], kernel.shape[-1])
        if (factors.down.shape, factors.up.shape) != wanted:
            raise ValueError(
                f"The factors of {name} {kernel.shape} are {factors.down.shape} and {factors.up.shape}: expected [..., I, r] and [r, O]."
            )
        dtype = jnp.float64 if jnp.float64 in (kernel.dtype, factors.down.dtype) else jnp.float32
        down, up, weight, s = (jnp.asarray(value).astype(dtype) for value in (*factors, scale))
        correction = s * weight * jnp.tensordot(down, up, 1)  # (1)
        flat[tuple(name.split("/"))] = (kernel.astype(dtype) + correction).astype(kernel.dtype)
    return unflatten_dict(flat)


class _Corrected(eqx.Module):
    network: Network

    def __call__(self, x: State, t: Any, args: Args) -> State:
        if not isinstance(args, dict) or not {"params", "lora"} <= args.keys():
            raise ValueError("with_lora reads args['params'] and args['lora'] (and args['lora_scale']): give both in args.")
        rest = {name: value for name, value in args.items() if name not in ("lora", "lora_scale")}
        return self.network(x, t, {**rest, "params": merge(args["params"], args["lora"], args.get("lora_scale", 1.0))})


def with_lora(network: Network) -> Network:
    """A network that reads `args["lora"]` beside `args["params"]`, and `args["lora_scale"]` where it is given: the correction kept apart.

    (1) is computed at every evaluation, and the gradient of a sampler sums over steps what is of the LoRA's size; `merge` before the sampler computes
    (1) once and sums what is of the parameters' size. Values and gradients are the same.

        term = aj.DiffusionTerm(with_lora(aj.linen(module)), process)
        x_0 = aj.sample(term, x_T, {"params": params, "lora": lora}, grid=ts)
    """
    return _Corrected(as_pytree(network))


def init_lora(params: Mapping[str, Any], targets: str, rank: int, key: Any, *, alpha: float | None = None, dtype: Any = jnp.float32) -> LoRA:
    """A LoRA to be trained, of which `merge` makes no difference yet: `down` uniform in +-1/sqrt(fan in), `up` zero.

    Args:
        params: of the network, or the tree of their shapes.
        targets: a regular expression searched for in the kernels' paths, as `r"attn\\d/to_(q|k|v|out_0)/"`.
        rank: r.
        key: a kernel's draw depends on the key and on its path alone.
        alpha: r where it is None, so that the scale is 1.

    Raises ValueError where no kernel is a target, the targets are no regular expression, or the rank is not positive.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"targets={targets!r} is no regular expression ({error}): give one, as to_q, or to_[qkv]/.") from error
    kernels = {name: leaf for name, leaf in _lora_files.kernels(params).items() if pattern.search(name)}
    if rank < 1 or not kernels:
        raise ValueError(
            f"init_lora found {len(kernels)} kernels for targets={targets!r}, rank={rank}: paths are like {[*_lora_files.kernels(params)][:3]}."
        )

    def factors(name: str, shape: tuple[int, ...]) -> Factors:
        bound = float(1 / np.sqrt(np.prod(shape[:-1])))
        down = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), (*shape[:-1], rank), dtype, -bound, bound)
        return Factors(down, jnp.zeros((rank, shape[-1]), dtype), jnp.asarray((rank if alpha is None else alpha) / rank, dtype))

    return {name: factors(name, tuple(leaf.shape)) for name, leaf in kernels.items()}


def load_lora(
    path: str | os.PathLike[str], modules: Mapping[str, nn.Module], *, drop: Sequence[str] = (), dtype: Any = jnp.float32
) -> dict[str, LoRA]:
    """The LoRAs of a file, one for each part of a pipeline; empty where the file has none for that part.

    Args:
        path: a safetensors file, or a folder with one, in the naming of diffusers (any year), peft (with its `adapter_config.json`) or
            kohya (`lora_unet_`, `lora_te1_`; of SDXL also with the published names of its blocks).
        modules: the networks by the names of a pipeline's folders, `{"unet": unet, "text_encoder": text_encoder}`; a key without a part belongs
            to `unet` or `transformer`, or to the only one given.
        drop: parts whose tensors are passed over, though the file has some.
        dtype: of the arrays.

    alpha is the file's, layer by layer; the rank where it says nothing, which makes the scale 1.
    Raises FileNotFoundError without a file; one ValueError for all of: a layer that the network does not have, a shape that does not fit it,
        half of a pair, a number that is not finite, an adapter that is no LoRA (DoRA, LoHa, LoKr, ...), an option of peft that changes (1).

        lora = load_lora("style.safetensors", {"unet": unet})["unet"]
        params = merge(params, lora, 0.8)
    """
    file = _lora_files.find(Path(path))
    config = _lora_files.config(file)
    tables = {part: _lora_files.layers(module) for part, module in modules.items()}
    found, problems = _lora_files.gather(_tensors.read(file), tables, drop)
    result: dict[str, LoRA] = {part: {} for part in modules}
    for (part, layer), halves in found.items():
        place, kernel = tables[part].kernels[layer]
        own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.") or "." not in key}
        factors = _lora_files.factors(f"{part}.{layer}", halves, kernel.shape, _lora_names.setting(own, layer), problems)
        if factors is not None:
            result[part][place] = Factors(*(jnp.array(_tensors.cast(place, array, dtype)) for array in factors))
    problems += _lora_files.foreign(config)
    if problems:
        raise ValueError(f"The LoRA {file} does not fit: {_lora_files.listed(problems)}; check that it was made for these networks.")
    return result


def save_lora(path: str | os.PathLike[str], loras: Mapping[str, Mapping[str, Factors]], modules: Mapping[str, nn.Module]) -> None:
    """Writes LoRAs in diffusers' naming, which `load_lora`, diffusers' `load_lora_weights` and `load_lora_adapter` read back.

    The scale goes into `up`, so that a reader which knows no alpha reads the same correction; `load_lora` then gives scale 1.

    Args:
        path: of the file, `*.safetensors`, or an existing folder, where it is called `pytorch_lora_weights.safetensors`.
        loras, modules: by part, as `load_lora` gives and takes them. bfloat16 is written as float32.

    Raises FileExistsError for a file in use; ValueError where a LoRA corrects what its network does not have, or has no network.
    """
    file = Path(path) / _lora_files.FILES[0] if Path(path).is_dir() else Path(path)
    if file.exists() or file.suffix != ".safetensors":
        raise FileExistsError(f"{file} exists or is not called *.safetensors: give the path of a new file.")
    if absent := sorted(set(loras) - set(modules)):
        raise ValueError(f"There is a LoRA of {', '.join(absent)}, and modules has {', '.join(sorted(modules)) or 'none'}: give its network there.")
    tensors: dict[str, np.ndarray] = {}
    for part, lora in loras.items():
        names = {place: (name, kernel.shape) for name, (place, kernel) in _lora_files.layers(modules[part]).kernels.items()}
        if unknown := sorted(set(lora) - set(names)):
            raise ValueError(f"The LoRA of {part} corrects {', '.join(unknown[:5])}, which the network does not have: give the network it is for.")
        for place, factors in lora.items():
            name, shape = names[place]
            down, up, scale = (np.asarray(array, np.float32 if array.dtype == jnp.bfloat16 else array.dtype) for array in factors)
            window = (1,) * len(shape[:-2])
            tensors[f"{part}.{name}.lora_A.weight"] = np.ascontiguousarray(np.moveaxis(down, (-1, -2), (0, 1)))
            tensors[f"{part}.{name}.lora_B.weight"] = np.ascontiguousarray((scale * up).T.reshape(*up.T.shape, *window))
    _files.write_whole(file, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
