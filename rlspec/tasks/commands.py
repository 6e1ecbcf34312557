"""Commands of the user's that score a checkpoint and print what they found as JSON."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError

# What torchrun tells its processes. A command that one of them runs is a program of its own, and would wait for others.
_LAUNCH = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


def check_command(command: str, marker: str, name: str) -> None:
    """Refuse a command that does not say where the checkpoint's path goes, or whose quotes do not match.

    Args:
        marker: what stands for the path, ``{model}`` for instance.
        name: of the argument that gave the command.

    Raises:
        OptionError: so it is.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise OptionError(f"{name}={command!r}: {error}") from None
    if not any(marker in word for word in words):
        raise OptionError(
            f"{name}={command!r} has no {marker}, which stands for the path of the checkpoint to score"
        )


def words_for(command: str, marker: str, checkpoint: Path) -> list[str]:
    """The words of a command for one checkpoint; no shell reads them."""
    return [word.replace(marker, str(checkpoint)) for word in shlex.split(command)]


def run(words: Sequence[str], told: str, *, quiet: bool) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints, whatever bytes that is. It is told nothing of torchrun.

    Args:
        told: what messages call it.
        quiet: keep what it says of errors, too; otherwise the user sees it at once.

    Raises:
        OptionError: it cannot be run.
    """
    errors = subprocess.PIPE if quiet else None
    own = dict(os.environ)
    if {"RANK", "WORLD_SIZE"} <= own.keys():
        own = {name: value for name, value in own.items() if not _LAUNCH.fullmatch(name)}
    try:
        return subprocess.run(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", check=False, env=own
        )
    except OSError as error:
        raise OptionError(f"{told}: cannot be run: {error.strerror or error}") from None


def last_json(text: str) -> dict[str, Any]:
    """The last JSON object that is a line of a text, or lines as ``json.dumps(..., indent=2)`` makes them.

    Raises:
        LookupError: there is none.
    """
    lines = text.splitlines(keepends=True)
    # What is indented belongs to an object that began before; only where nothing else is found it may be one.
    for indented in (False, True):
        for at in reversed(range(len(lines))):
            if lines[at][:1].isspace() is indented and (found := _object_at(lines, at)) is not None:
                return found
    raise LookupError("no such line")


def _object_at(lines: Sequence[str], at: int) -> dict[str, Any] | None:
    """The object that begins on a line and ends one."""
    line = lines[at].strip()
    if not line.startswith("{"):
        return None
    try:
        if line != "{":
            found, rest = json.loads(line), ""
        else:
            text = "".join(lines[at:]).lstrip()
            found, end = json.JSONDecoder().raw_decode(text)
            rest = text[end:].partition("\n")[0].strip()
    except (ValueError, RecursionError):
        return None
    return None if rest else found
