"""The `rlspec` command: a group whose commands import torch only when they run, so that --help is instant."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from rlspec.cli.exits import stopped
from rlspec.cli.flags import as_flags
from rlspec.cli.threads import share_the_machine
from rlspec.errors import RlspecError
from rlspec.io.share import Share
from rlspec.signals import sigterm_raises

# Command -> module; a command's module is imported when that command is asked for (or listed by --help).
COMMANDS = ("track", "measure", "restore", "study", "eval", "report", "cache", "env")
# Those whose work several processes share.
_SHARED = ("measure", "restore")


class _Commands(click.Group):
    """Finds each command in `rlspec.cli.<name>.command` and prints rlspec's own errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f"rlspec.cli.{cmd_name}").command

    def invoke(self, ctx: click.Context) -> Any:
        share_the_machine()  # before any command's module is imported, and torch with it
        try:
            with sigterm_raises():
                return super().invoke(ctx)
        except click.UsageError as error:
            # Several processes are started with one command line: the first one tells what is wrong with it.
            if ctx.invoked_subcommand in _SHARED and Share.of_launch().number > 0:
                ctx.exit(error.exit_code)
            raise
        except RlspecError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            click.echo(f"Error: {as_flags(str(error), command or self)}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as stop:
            click.echo("Stopped", err=True)
            ctx.exit(stopped(stop))


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"rlspec {installed_version()}")
        ctx.exit()


def installed_version() -> str:
    """The version in the installed package's metadata."""
    try:
        return version("rlspec")
    except PackageNotFoundError:
        return "(not installed)"


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def main() -> None:
    """Watch the singular values and directions of a language model's weights while it is fine-tuned, and put them back.

    To see it at work, run `rlspec track`: it trains a small model that comes with rlspec, some minutes on a CPU.
    `rlspec COMMAND --help` tells what each command takes."""
