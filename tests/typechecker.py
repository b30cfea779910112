"""Shapes and types of every call are checked in tests: jaxtyping's import hook with beartype, for which an int is a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
