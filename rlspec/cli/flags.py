"""Options as the command line writes them. The library's errors speak of arguments; users here gave flags."""

from __future__ import annotations

import re

import click


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def as_flags(message: str, command: click.Command) -> str:
    """A message with the command's options in place of arguments: ``rank=2`` becomes ``--rank 2``, ``resume=True``
    becomes ``--resume``, ``resume=False`` ``no --resume``, and ``out=`` without a value ``--out``."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    for option in (param for each in (command, *below) for param in each.params):
        if isinstance(option, click.Option) and option.name is not None:
            spelled = max(option.opts, key=len)
            name = option.name.removesuffix("_")  # eval_, say, where Python has a name of its own
            here = rf"(?<![\w.=/-]){name}="
            if option.is_flag:
                message = re.sub(here + r"True\b", spelled, message)
                off = option.secondary_opts[0] if option.secondary_opts else f"no {spelled}"
                message = re.sub(here + r"False\b", off, message)
            message = re.sub(here + r"(?=[\w'\"./~-])", f"{spelled} ", message)
            message = re.sub(here, spelled, message)
    return message
