"""From a `config.json` to a Flax module and back. An option that this package does not compute is refused, never dropped."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from . import _files, _values
from ._families import FAMILIES
from ._family import Family

OURS = ("parent", "name", "remat")  # fields of a module that no configuration has
# What diffusers' running average of weights writes into the configuration of any network, as in SDXL's inpainting.
AVERAGING = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")


def _fields(family: Family) -> list[str]:
    return [field.name for field in dataclasses.fields(family.module) if field.init and field.name not in (*OURS, *family.implied, *family.parts)]


def family_of(module: nn.Module) -> Family:
    """The family of a module."""
    for family in FAMILIES:
        if type(module) is family.module and all(getattr(module, field) == value for field, value in family.implied.items()):
            return family._replace(tensors=family.tensors_of(module)) if family.tensors_of else family
    known = ", ".join(dict.fromkeys(family.module.__name__ for family in FAMILIES))
    raise ValueError(f"A {type(module).__name__} has no layout of files here: known are {known}; give one of these, not bound or wrapped.")


def class_name(config: Mapping[str, Any]) -> Any:
    """The class that a configuration names: diffusers' `_class_name`, or the first of transformers' `architectures`."""
    architectures = config.get("architectures")
    return config.get("_class_name", architectures[0] if isinstance(architectures, list) and architectures else None)


def names() -> list[str]:
    """The classes that have a Flax module."""
    return [family.class_name for family in FAMILIES]


def known(name: Any) -> bool:
    """Whether there is a Flax module for a class."""
    return name in names()


def _family_named(config: Mapping[str, Any], source: str) -> Family:
    name = class_name(config)
    for family in FAMILIES:
        if family.class_name == name:
            return family
    raise ValueError(f"{source} is of class {_files.shown(repr(name))}, which has no Flax module here: known are {', '.join(names())}.")


def _refused(config: Mapping[str, Any], family: Family) -> list[str]:
    """Each entry of a configuration that changes the arithmetic and is not implemented."""
    known = {*_fields(family), *family.fixed, *family.ignored, *AVERAGING}
    told = lambda key, why: f"{_files.shown(key)}={_files.shown(repr(config[key]))} ({why})"  # noqa: E731
    refused = [told(key, f"only {values[0]!r}") for key, values in family.fixed.items() if key in config and config[key] not in values]
    return refused + [told(key, "unknown") for key in config if key not in known and not key.startswith("_")]


def _frozen(value: Any) -> Any:
    """Lists as tuples, inside of each other too: a field of a module is to be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _build(config: Mapping[str, Any], source: str) -> nn.Module:
    return _made(_family_named(config, source), config, source)


def _made(family: Family, config: Mapping[str, Any], source: str) -> nn.Module:
    given = family.to_fields({key: value for key, value in config.items() if key != "architectures"})
    parts = {name: _made(part, given.pop(f"{name}_config"), f"the {name}_config of {source}") for name, part in family.parts.items()}
    if refused := _refused(given, family):
        name = family.module.__name__
        raise ValueError(f"{source} has options that {name} does not compute: {_files.listed(refused, 10, 300)}; drop those that mean nothing.")
    _values.check(family.module, given, source)
    own = set(_fields(family))
    return family.module(**{key: _frozen(value) for key, value in given.items() if key in own}, **parts, **family.implied)


def read(config: Mapping[str, Any], source: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a configuration describes, and the tree of its parameters' shapes."""
    module = _values.guarded(lambda: _build(config, source), source)
    return module, _values.guarded(lambda: shapes(module), source)


def describe(module: nn.Module) -> dict[str, Any]:
    """The configuration of a module: its fields, and its class in the words of its family."""
    family = family_of(module)
    return {**(family.written or {"_class_name": family.class_name}), **_entries(family, module)}


def _entries(family: Family, module: nn.Module) -> dict[str, Any]:
    parts = {f"{name}_config": _entries(part, getattr(module, name)) for name, part in family.parts.items()}
    return {**{field: getattr(module, field) for field in _fields(family)}, **parts}


def shapes(module: nn.Module) -> dict[str, Any]:
    """The tree of the module's parameter shapes, found without computing anything."""
    with jax.numpy_dtype_promotion("standard"):  # under "strict" some of Flax's own layers do not trace
        return jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs)["params"]
