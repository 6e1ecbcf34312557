"""Tasks with exact rewards: GeneralPoints, and the protocol for tasks of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlspec.tasks.base import Message, Task, Verdict, check_shift, evaluation_problems, training_problem
from rlspec.tasks.cards import Deal, Rule
from rlspec.tasks.expression import Expression, ExpressionError, parse_expression
from rlspec.tasks.general_points import REWARDS, GeneralPoints
from rlspec.tasks.registry import get_task
from rlspec.tasks.solver import solve
from rlspec.tasks.stats import McNemarResult, mcnemar, wilson_interval

if TYPE_CHECKING:
    from rlspec.tasks.env import TaskEnv as TaskEnv

# TaskEnv is public too, and imported on first use: it needs gymnasium, which `import *` must not.
__all__ = [
    "REWARDS",
    "Deal",
    "Expression",
    "ExpressionError",
    "GeneralPoints",
    "McNemarResult",
    "Message",
    "Rule",
    "Task",
    "Verdict",
    "check_shift",
    "evaluation_problems",
    "get_task",
    "mcnemar",
    "parse_expression",
    "solve",
    "training_problem",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    if name == "TaskEnv":
        from rlspec.tasks.env import TaskEnv

        return TaskEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "TaskEnv"])
