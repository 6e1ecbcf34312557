"""A study so small that it runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "quick": True,
    "deals": 4,
    "sft_steps": 4,
    "batch_size": 2,
    "ppo_updates": 1,
    "turns_per_update": 4,
    "turns": 1,
}


def tiny_study(model: Path) -> list[str]:
    """The command line of one, but for --out."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "quick"]
    return ["study", "duration", "--quick", "--threads=1", f"--model={model}", *flags]


def table(folder: Path) -> bytes:
    return (folder / "table.csv").read_bytes()
