"""Write docs/cli.md, the reference of the command line, from the commands themselves.

`python tools/cli_reference.py`, after an option or its help has changed; tests/test_docs.py fails until it has run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from rlspec.cli.main import main
from rlspec.cli.settings import HeadedOption
from rlspec.cli.study_rank import rank_any

PAGE = Path(__file__).parent.parent / "docs/cli.md"
_HEAD = """\
# Command line

Every command with every option, as `--help` tells them. Options marked with † are those that `--help` leaves to
`--help-all`. How the commands are used is told by the quick starts.

What a command refuses is one line on stderr and exit code 2, and nothing is half-written. Ctrl-C ends a command with 130,
SIGTERM with 143. `rlspec --version` prints the version.
"""
_HELP = {"--help", "--help-all"}
_YOURS = ("study rank --base B --tuned T", rank_any)  # what the group calls in place of its plan


def reference() -> str:
    """The page."""
    return "\n".join([_HEAD, *_pages("rlspec", main)])


def _pages(path: str, command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """A group's commands, and theirs, in the order of --help."""
    ctx = click.Context(command, info_name=path.split()[-1], parent=parent)
    if isinstance(command, click.Group):
        if parent is not None:
            yield from _section(path, command, ctx)
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            assert found is not None
            yield from _pages(f"{path} {name}", found, ctx)
            if f"{path} {name}" == "rlspec study rank":
                title, other = _YOURS
                yield from _section(
                    f"rlspec {title}", other, click.Context(other, info_name=name, parent=ctx)
                )
    else:
        yield from _section(path, command, ctx)


def _section(title: str, command: click.Command, ctx: click.Context) -> Iterator[str]:
    yield f"## {title}\n"
    usage = " ".join(command.collect_usage_pieces(ctx))
    yield f"```text\n{title.partition(' --')[0]} {usage}\n```\n"
    yield from _paragraphs(command.help or "")
    lists: dict[str, list[str]] = {"Options": []}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None and isinstance(param, click.Option) and not _HELP & {*param.opts}:
            heading, fine = (
                (param.heading, param.fine) if isinstance(param, HeadedOption) else ("Options", False)
            )
            option, told = record
            lists.setdefault(heading, []).append(f"* `{option}`{' †' if fine else ''}: {_line(told)}")
    for heading, items in lists.items():
        if items:
            yield "\n".join([f"**{heading}**\n", *items]) + "\n"
    yield from _paragraphs(command.epilog or "")


def _paragraphs(text: str) -> Iterator[str]:
    """A help text's, those whose lines click keeps as blocks."""
    for paragraph in filter(None, (part.strip("\n") for part in text.split("\n\n"))):
        if paragraph.startswith("\b"):
            yield "```text\n" + paragraph.removeprefix("\b").strip("\n") + "\n```\n"
        else:
            yield _line(paragraph) + "\n"


def _line(text: str) -> str:
    """One line in which Markdown sees no links, tags or emphasis; code stays code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(reference())
