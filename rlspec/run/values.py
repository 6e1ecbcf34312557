"""Values of settings as YAML and the command line write them, with the types that the settings have."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlspec.errors import OptionError


def read_config_file(path: Path | str) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        OptionError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise OptionError(f"{path}: must be a mapping of settings to values")
    return settings


def checked(settings: Mapping[str, Any], hints: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``settings``, whose names may have - for _, as the types that ``hints`` have for their names.

    Whether the values go together is not looked at: further settings may come from elsewhere.

    Raises:
        OptionError: An unknown key (the closest valid one is named), one given twice, a value of the wrong type; the
            message begins with ``source``.
    """
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise OptionError(f"{source}: unknown setting {key!r}; the closest is {closest(name, hints)!r}")
        if name in values:
            raise OptionError(f"{source}: {name} is given twice, with - and with _")
        values[name] = converted(name, value, hints[name], source)
    return values


def closest(name: str, known: Iterable[str]) -> str:
    """The name among those known that ``name`` is most like."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


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
