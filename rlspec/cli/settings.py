"""Options of a command from the dataclass that declares its settings."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from rlspec.cli.flags import flag
from rlspec.settings import Setting, settings_of

Command = TypeVar("Command", bound=Callable[..., Any])


def options_of(settings: type) -> Callable[[Command], Command]:
    """Give a command an option for every field of a dataclass, in the order of its fields.

    Each has the field's name, default and ``told`` (:func:`rlspec.settings.setting`); the type is the field's where that
    is a number or a bool, which becomes a flag, and a text for everything else.
    """
    return options_for(settings_of(settings))


def options_for(settings: Iterable[Setting], *, only_given: bool = False) -> Callable[[Command], Command]:
    """Give a command an option for each of some settings.

    Args:
        only_given: the command gets None for what was not given; --help tells the default all the same.
    """

    def decorate(command: Command) -> Command:
        for each in reversed(list(settings)):
            command = _option(each, only_given)(command)
        return command

    return decorate


def _option(setting: Setting, only_given: bool) -> Callable[[Command], Command]:
    shared: dict[str, Any] = {"cls": HeadedOption, "heading": setting.heading, "fine": setting.fine}
    if setting.hint is bool:
        default = None if only_given else setting.default
        return click.option(flag(setting.name), is_flag=True, default=default, help=setting.told, **shared)
    kind: type = next((kind for kind in (int, float) if setting.hint in (kind, kind | None)), str)
    choices = typing.get_args(setting.hint) if typing.get_origin(setting.hint) is typing.Literal else ()
    default = setting.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    default = None if default is None else kind(default)
    default_told = default if setting.default_told is None and only_given else setting.default_told
    help_text = setting.told if default_told is None else f"{setting.told}  [default: {default_told}]"
    return click.option(
        flag(setting.name),
        setting.name,
        type=kind,
        metavar="|".join(choices) if choices else None,
        default=None if only_given else default,
        show_default=default_told is None and default is not None,
        help=help_text,
        **shared,
    )


class HeadedOption(click.Option):
    """An option that :class:`HeadedCommand` lists under a heading."""

    def __init__(self, *args: Any, heading: str = "Options", fine: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading
        self.fine = fine


class HeadedCommand(click.Command):
    """A command of many options: --help lists them under headings and leaves the fine ones to --help-all."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        everything = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_help_all,
            help="Show the finer settings too and exit.",
        )
        *own, last = super().get_params(ctx)  # the last is --help
        return [*own, everything, last]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            fine, heading = (
                (param.fine, param.heading) if isinstance(param, HeadedOption) else (False, "Options")
            )
            if record is not None and (ctx.meta.get(_ALL) or not fine):
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


_ALL = "rlspec.help_all"


def _help_all(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
