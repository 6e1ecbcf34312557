"""Values of settings as YAML and the command line write them, with the types that the settings have."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Any

from rlspec.errors import OptionError


def split_names(value: str | Iterable[Any]) -> tuple[str, ...]:
    """``"q, k,v"`` or ``["q", "k", "v"]`` as ``("q", "k", "v")``."""
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    return tuple(part.strip() for part in parts if part.strip())


def converted(name: str, value: Any, hint: Any, source: str) -> Any:
    """``value`` as the type ``hint`` of the setting ``name``; YAML has 1e-6 as a string and a rank as a number.

    Raises:
        OptionError: It is of another kind; the message begins with ``source``.
    """
    if value is None:
        if type(None) in typing.get_args(hint):
            return None
        raise OptionError(f"{source}: {name} must have a value")
    kinds = (hint, *typing.get_args(hint))
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise OptionError(f"{source}: {name} must be true or false, not {value!r}")
    if (names := tuple[str, ...]) in kinds or tuple[int, ...] in kinds:
        parts = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(parts, (str, list, tuple)):
            wanted = "names" if names in kinds else "whole numbers"
            raise OptionError(f"{source}: {name} must be a list of {wanted}, not {value!r}")
        texts = split_names(parts)
        return texts if names in kinds else tuple(_number(name, text, int, source) for text in texts)
    wanted_kind = next((kind for kind in (int, float) if kind in kinds), str)
    return _number(name, value, wanted_kind, source)


def _number(name: str, value: Any, wanted: type, source: str) -> Any:
    """``value`` as a number of type ``wanted``, or as a word where that is str."""
    fraction = wanted is int and isinstance(value, float) and not value.is_integer()
    if not isinstance(value, (bool, list, dict)) and not fraction:
        try:
            return wanted(value)
        except ValueError:
            pass
    kind_name = {int: "a whole number", float: "a number", str: "a word"}[wanted]
    raise OptionError(f"{source}: {name} must be {kind_name}, not {value!r}")
