"""Options that do not fit, each refused in one sentence; nothing is ignored in silence."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def known(option: str, value: str, table: Sequence[str]) -> str:
    """`value`, if it stands in `table`."""
    if value not in table:
        raise ValueError(f"--{option} {value} is not known: use one of {', '.join(table)}.")
    return value


def at_least(options: Any, low: float, *names: str) -> None:
    """Raises ValueError for one of the options `names` that is given and below `low` or not finite."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not low <= value < np.inf:
            raise ValueError(f"{flag(name)} must be at least {low}; got {value}.")


def positive(options: Any, *names: str) -> None:
    """Raises ValueError for one of the options `names`, a number or several, that is given and not positive."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not all(0 < each < np.inf for each in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{flag(name)} must be {_numbers(value, 'positive')}; got {value}.")


def finite(options: Any, *names: str) -> None:
    """Raises ValueError for one of the options `names`, a number or several, that is not finite."""
    for name in names:
        value = getattr(options, name)
        if not np.isfinite(value).all():
            raise ValueError(f"{flag(name)} must be {_numbers(value, 'finite')}; got {value}.")


def _numbers(value: Any, kind: str) -> str:
    return f"{kind} numbers" if isinstance(value, tuple) else f"a {kind} number"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def taken(option: str, name: str, allowed: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are not None. Raises ValueError for one that `name` does not take."""
    values = {key: value for key, value in given.items() if value is not None}
    if refused := [flag(key) for key in values if key not in allowed]:
        raise ValueError(f"--{option} {name} takes no {', '.join(refused)}: leave {'them' if len(refused) > 1 else 'it'} out.")
    return values


def made(option: str, name: str, table: Mapping[str, tuple[Callable, tuple[str, ...]]], prefix: str, options: Any) -> Any:
    """table[name] called with the options `prefix + key` that were given, of all the keys of the table. Raises ValueError where one is missing."""
    make, allowed = table[known(option, name, list(table))]
    keys = dict.fromkeys(prefix + key for _, keys in table.values() for key in keys)
    values = taken(option, name, [prefix + key for key in allowed], {key: getattr(options, key) for key in keys})
    arguments = {key.removeprefix(prefix): value for key, value in values.items()}
    if missing := [flag(prefix + key) for key in needed(make) if key not in arguments]:
        raise ValueError(f"--{option} {name} needs {', '.join(missing)}.")
    return make(**arguments)


def needed(make: Callable) -> list[str]:
    """The arguments of a constructor that have no default."""
    return [each.name for each in inspect.signature(make).parameters.values() if each.default is each.empty]
