"""Commands of the user's that score a checkpoint and print what they found as JSON."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError


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
    """Run a command and keep what it prints, whatever bytes that is.

    Args:
        told: what messages call it.
        quiet: keep what it says of errors, too; otherwise the user sees it at once.

    Raises:
        OptionError: it cannot be run.
    """
    errors = subprocess.PIPE if quiet else None
    try:
        return subprocess.run(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise OptionError(f"{told}: cannot be run: {error.strerror or error}") from None


def last_json(text: str, kind: type = object) -> Any:
    """The value of the last line that is JSON of a kind.

    Raises:
        LookupError: there is none.
    """
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, kind):
            return found
    raise LookupError("no such line")
