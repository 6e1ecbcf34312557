"""Tasks with exact rewards: GeneralPoints, and the protocol for tasks of your own."""

from __future__ import annotations

from rlspec.tasks.base import Message, Task, Verdict, check_shift, evaluation_problems, training_problem
from rlspec.tasks.cards import Deal, Rule
from rlspec.tasks.env import TaskEnv
from rlspec.tasks.expression import Expression, ExpressionError, parse_expression
from rlspec.tasks.general_points import REWARDS, GeneralPoints
from rlspec.tasks.registry import get_task
from rlspec.tasks.solver import solve
from rlspec.tasks.stats import McNemarResult, mcnemar, wilson_interval

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
    "TaskEnv",
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
