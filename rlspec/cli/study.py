"""`rlspec study`: many settings tried on the same data."""

from __future__ import annotations

from typing import Any

import click

from rlspec.cli.flags import as_flags
from rlspec.cli.study_rank import rank_any
from rlspec.errors import RlspecError


class _Group(click.Group):
    """Puts the options of its own commands into rlspec's errors, which the group above does not know."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RlspecError as error:
            invoked = self.get_command(ctx, ctx.invoked_subcommand or "")
            error.args = (as_flags(str(error), invoked or self),)
            raise


@click.group("study", cls=_Group, short_help="Try many settings on the same data and compare them.")
def command() -> None:
    """Try many settings on the same data and compare them."""


command.add_command(rank_any, "rank")
