"""Settings that a dataclass declares once: name, type, default, and what the command line says of each."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, told: str, *, default_told: str | None = None) -> Any:
    """A field of a dataclass of settings, which a command offers as an option (`rlspec.cli.settings`).

    Args:
        told: one sentence for --help.
        default_told: what the default means, where its value does not say it.
    """
    return field(default=default, metadata={"told": told, "default_told": default_told})
