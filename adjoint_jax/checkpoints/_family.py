"""What the files of one class of networks say beyond the fields of its Flax module."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

Named = list[tuple[str, np.ndarray]]


class Family(NamedTuple):
    """One class of networks: a module, the class that its configuration names, and how its files differ from the module's fields and names.

    Fields:
        module: the Flax class. Its fields carry the names of the configuration's entries; its `dummy_inputs` are abstract arguments of a call.
        class_name: `_class_name` of diffusers' `config.json`, or the architecture that transformers writes.
        fixed: entries without a field, and the values that mean what the module computes; any other value is refused.
        ignored: entries that change no number.
        lists: names of Flax submodules `NAME_3` that torch writes `NAME.3`.
        to_fields: the entries of a configuration of any year in the words of the module's fields.
        tensors: the tensors of a file of any year, in any order, under the names, and in the shapes, that today's files have.
        implied: fields that the class's name alone decides, and no entry; a module belongs to the first family whose values it has.
        written: entries that name the class to the original, where `_class_name` is not its word.
        tensors_of: for a module, what `tensors` is, where it depends on the configuration.
        adapt: the module as `network(x, t, args)`, where `aj.linen` would not do.
        process: for a module and the contents of `scheduler_config.json` ({} without that file), the process and the prediction,
            where diffusers' schedulers do not tell them.
        parts: fields that are networks, and their families; the configuration of each is the entry `FIELD_config`.
    """

    module: type[nn.Module]
    class_name: str
    fixed: Mapping[str, tuple[Any, ...]] = {}
    ignored: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    to_fields: Callable[[dict[str, Any]], dict[str, Any]] = dict
    tensors: Callable[[Named], Named] = list
    implied: Mapping[str, Any] = {}
    written: Mapping[str, Any] = {}
    tensors_of: Callable[[Any], Callable[[Named], Named]] | None = None
    adapt: Callable[[Any], Any] | None = None
    process: Callable[[Any, dict[str, Any]], tuple[Any, str]] | None = None
    parts: Mapping[str, Any] = {}
