"""`rlspec cache`: the decompositions kept on disk, their sizes, and their removal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from rlspec.errors import CheckpointError

if TYPE_CHECKING:
    from rlspec.io.cache_folder import Entry


@click.command("cache", short_help="List, size and prune the kept decompositions.")
@click.option(
    "--prune",
    "keep_gib",
    type=click.FloatRange(min=0),
    metavar="GIB",
    help="Remove the least recently used ones until at most GIB are left; 0 for all.",
)
def command(keep_gib: float | None) -> None:
    """List the decompositions of reference matrices that are kept in $RLSPEC_CACHE (~/.cache/rlspec), the last used
    first. They only save time. When $RLSPEC_CACHE_GIB (50) is full, the least recently used ones make room for new
    ones; what a running process uses is never removed."""
    from rlspec.io.cache_folder import GIB, default_cache_dir, entries, limit_bytes, prune
    from rlspec.io.files import write_error

    folder = default_cache_dir()
    if keep_gib is not None:
        try:
            pruned = prune(folder, int(keep_gib * GIB))
        except OSError as error:
            raise CheckpointError(
                f"{write_error(error.filename or folder, error)}; not all was removed"
            ) from None
        click.echo(f"removed {_sum(pruned.removed)}")
        if pruned.in_use:
            click.echo(f"kept, because a running process uses them: {_sum(pruned.in_use)}")
    found = entries(folder)
    limit = limit_bytes()
    for entry in reversed(found):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        click.echo(f"{entry.size / 2**20:10.1f} MiB  last used {used}  {entry.path.name}")
    click.echo(f"{folder}: {_sum(found)}, limit {limit / GIB:g} GiB")


def _sum(entries: Iterable[Entry]) -> str:
    sizes = [entry.size for entry in entries]
    return f"{len(sizes)} decomposition{'' if len(sizes) == 1 else 's'}, {sum(sizes) / 2**30:.2f} GiB"
