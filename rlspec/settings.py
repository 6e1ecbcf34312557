"""Settings that a dataclass declares once: name, type, default, and what the command line says of each."""

from __future__ import annotations

import typing
from dataclasses import Field, dataclass, field, fields
from typing import Any


def setting(
    default: Any, told: str, *, default_told: str | None = None, heading: str = "Options", fine: bool = False
) -> Any:
    """A field of a dataclass of settings, which a command offers as an option (`rlspec.cli.settings`).

    Args:
        told: one sentence for --help.
        default_told: what the default means, where its value does not say it.
        heading: what it stands under in --help.
        fine: whether --help leaves it to --help-all, where the command has one.
    """
    metadata = {"told": told, "default_told": default_told, "heading": heading, "fine": fine}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One setting as a command offers it."""

    name: str
    hint: Any  # its type
    default: Any
    told: str
    default_told: str | None
    heading: str
    fine: bool


def settings_of(declared: type) -> list[Setting]:
    """The settings of a dataclass, in the order of its fields, each made by :func:`setting`."""
    hints = typing.get_type_hints(declared)
    return [setting_of(each, hints[each.name]) for each in fields(declared)]


def setting_of(declared: Field[Any], hint: Any) -> Setting:
    """The setting that a field declares."""
    told = declared.metadata["told"]
    others = {name: declared.metadata[name] for name in ("default_told", "heading", "fine")}
    return Setting(declared.name, hint, declared.default, told, **others)
