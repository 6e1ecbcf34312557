"""Exit codes of the commands that are no error of rlspec's own (those carry theirs, see rlspec.errors)."""

from __future__ import annotations

from rlspec.signals import signal_of

# 128 + the signal's number, as shells report it.
INTERRUPTED = 130
TERMINATED = 143


def stopped(stop: KeyboardInterrupt) -> int:
    """The exit code of a command that Ctrl-C or SIGTERM stopped."""
    return 128 + signal_of(stop)
