"""Options of a command from the dataclass that declares its settings."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from rlspec.cli.flags import flag

Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(settings: type) -> Callable[[Command], Command]:
    """Give a command an option for every field of a dataclass, in the order of its fields.

    Each has the field's name, default and ``told`` (:func:`rlspec.settings.setting`); the type is the field's where that
    is a number or a bool, which becomes a flag, and a text for everything else.
    """
    hints = typing.get_type_hints(settings)

    def decorate(command: Command) -> Command:
        for each in reversed(fields(settings)):
            command = _option(each, hints[each.name])(command)
        return command

    return decorate


def _option(field: Field[Any], hint: Any) -> Callable[[Command], Command]:
    told, default_told = field.metadata["told"], field.metadata["default_told"]
    if hint is bool:
        return click.option(flag(field.name), is_flag=True, default=field.default, help=told)
    kind = next((kind for kind in (int, float) if hint in (kind, kind | None)), str)
    default: Any = field.default
    default = None if default is None else kind(default)
    help_text = told if default_told is None else f"{told}  [default: {default_told}]"
    shown = default_told is None and default is not None
    return click.option(flag(field.name), type=kind, default=default, show_default=shown, help=help_text)
