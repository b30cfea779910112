"""From a `config.json` to a Flax module and back. An option that this package does not compute is refused, never dropped."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..models import ConvClassifier, UNet2D

MODULES: dict[str, type[nn.Module]] = {"UNet2DModel": UNet2D, "ConvClassifier": ConvClassifier}
# Options of `UNet2DModel` that have no field here, and the values that mean what UNet2D computes.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "time_embedding_type": ("positional",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "mid_block_type": ("UNetMidBlock2D",),
}
# `num_train_timesteps` sizes the learned time embedding alone, which FIXED refuses.
IGNORED = ("sample_size", "num_train_timesteps", "time_embedding_dim")


def _fields(module: type[nn.Module] | nn.Module) -> list[str]:
    return [field.name for field in dataclasses.fields(module) if field.init and field.name not in ("parent", "name")]


def _refused(config: Mapping[str, Any], module: nn.Module) -> list[str]:
    """Each option of a configuration that changes the arithmetic and is not implemented."""
    known, refused = {*_fields(module), "in_channels"}, []
    if isinstance(module, UNet2D):
        known |= {*FIXED, *IGNORED}
        allowed = FIXED | {"time_embedding_dim": (module.embedding_dim, None)}
        refused = [f"{key}={config[key]!r} (only {values[0]!r})" for key, values in allowed.items() if key in config and config[key] not in values]
    return refused + [f"{key}={value!r} (unknown)" for key, value in config.items() if key not in known and not key.startswith("_")]


def _build(config: Mapping[str, Any], source: str) -> nn.Module:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"{source} is of _class_name {name!r}, which has no Flax module here: known are {', '.join(MODULES)}.")
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in _fields(MODULES[name])}
    if name == "UNet2DModel":
        # The first releases called the blocks UNetResDownBlock2D and so on.
        own |= {key: tuple(kind.removeprefix("UNetRes") for kind in own[key]) for key in ("down_block_types", "up_block_types") if key in own}
    module = MODULES[name](**own)
    if refused := _refused(config, module):
        raise ValueError(f"{source} has options that {type(module).__name__} does not compute: {', '.join(refused)}; drop those that mean nothing.")
    return module


def read(config: Mapping[str, Any], source: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a configuration describes, and the tree of its parameters' shapes."""
    try:
        module = _build(config, source)
        return module, shapes(module, config, source)
    except (TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{source} has a value of the wrong kind ({error}): compare it with one that diffusers wrote.") from error


def describe(module: nn.Module, params: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a module: its fields, its class in diffusers' words, and the channels that its input has."""
    name = next((name for name, kind in MODULES.items() if type(module) is kind), None)
    if name is None:
        raise ValueError(f"A {type(module).__name__} cannot be saved: known are {', '.join(kind.__name__ for kind in MODULES.values())}.")
    config = {"_class_name": name, **{field: getattr(module, field) for field in _fields(module)}}
    if isinstance(module, ConvClassifier):
        kernel = params.get("conv_0", {}).get("kernel")
        config["in_channels"] = 1 if kernel is None else int(kernel.shape[-2])
    return config


def shapes(module: nn.Module, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The tree of the module's parameter shapes, found without computing anything."""
    if isinstance(module, UNet2D):
        side, channels = 2 ** (len(module.block_out_channels) - 1), module.in_channels
        labels = None if module.num_class_embeds is None else jnp.zeros(1, jnp.int32)
        labels = {"timestep": jnp.zeros(1), "identity": jnp.zeros((1, module.embedding_dim))}.get(str(module.class_embed_type), labels)
        arguments = (jnp.zeros((), jnp.int32), labels)
    elif isinstance(module, ConvClassifier) and isinstance(config.get("in_channels"), int):
        side, channels, arguments = 2 ** len(module.features), config["in_channels"], ()
    else:
        raise ValueError(f"{source} has no number in_channels, which a ConvClassifier needs: add the channels of its images.")
    with jax.numpy_dtype_promotion("standard"):  # under "strict" some of Flax's own layers do not trace
        return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, channels), jnp.float32), *arguments))["params"]
