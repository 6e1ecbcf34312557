"""Tasks by name, as the command line finds them."""

from __future__ import annotations

from typing import Any

from rlspec.errors import OptionError
from rlspec.tasks.base import Task
from rlspec.tasks.general_points import GeneralPoints, Style

TASKS: dict[str, type[GeneralPoints]] = {GeneralPoints.name: GeneralPoints}


def get_task(
    name: str = GeneralPoints.name, *, tokenizer: Any = None, style: str = "auto", turns: int = 5
) -> Task:
    """Build a task by name.

    Args:
        name: a key of ``TASKS`` (dashes and underscores are the same).
        tokenizer: the model's tokenizer; with ``style="auto"`` one that carries ``rlspec_style`` (the
            embedded model's does) chooses the prompt style, any other gets ``"chat"``.
        style: ``"auto"``, ``"chat"`` or ``"compact"``.
        turns: verification turns of an episode at most.

    Raises:
        OptionError: no such task, or no such style.
    """
    cls = TASKS.get(name.replace("-", "_"))
    if cls is None:
        raise OptionError(f"unknown task {name!r}; valid: {', '.join(TASKS)}")
    if style == "auto":
        style = getattr(tokenizer, "init_kwargs", {}).get("rlspec_style", "chat")
    chosen: Style = "compact" if style == "compact" else "chat"
    if style not in ("chat", "compact"):
        raise OptionError(f"unknown style {style!r}; valid: auto, chat, compact")
    return cls(style=chosen, turns=turns)
