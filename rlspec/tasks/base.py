"""What a task is: problems to sample, a prompt, a verifier that gives rewards, and a reference answer.

A task of your own is one small class with the members of :class:`Task`; nothing has to be inherited or
registered to be passed to :func:`rlspec.train.train_sft`, :func:`rlspec.train.train_ppo` or
:func:`rlspec.train.evaluate`.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rlspec.errors import OptionError

#: One turn of a conversation: {"role": "user" | "assistant", "content": text}.
Message = dict[str, str]

IN_DISTRIBUTION = "none"


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of one answer.

    Attributes:
        reward: the turn's reward.
        solved: whether the answer is right; the episode then ends.
        kind: the verdict in one word, e.g. ``"wrong_value"``.
        message: the verifier's next user turn (empty when solved).
    """

    reward: float
    solved: bool
    kind: str
    message: str = ""


@runtime_checkable
class Task(Protocol):
    """The members a task must have.

    Attributes:
        name: how the command line and the run folder call it.
        shifts: the distributions it can sample; the first is ``"none"``, in distribution.
        max_turns: verification turns of an episode at most.
        turn_limit_reward: added to the last turn's reward when an episode ends unsolved.
        max_answer_tokens: tokens to sample for one answer at most.
    """

    name: str
    shifts: tuple[str, ...]
    max_turns: int
    turn_limit_reward: float
    max_answer_tokens: int

    def sample(self, rng: random.Random, shift: str = IN_DISTRIBUTION) -> Any:
        """Draw a problem; it has a hashable ``key``, equal for problems that are the same to a learner."""

    def prompt(self, problem: Any) -> list[Message]:
        """The conversation that the first answer follows."""

    def answer(self, problem: Any) -> str:
        """A correct answer."""

    def verify(self, problem: Any, answer: str) -> Verdict:
        """Judge an answer; never raises on model output, never executes it."""

    def sft_example(self, problem: Any, rng: random.Random) -> tuple[list[Message], str]:
        """A conversation and the answer that supervised fine-tuning teaches for it."""


def check_shift(task: Task, shift: str) -> str:
    """``shift`` itself, if the task knows it.

    Raises:
        OptionError: the task has no such shift; the message lists those it has.
    """
    if shift not in task.shifts:
        raise OptionError(f"unknown shift {shift!r} for task {task.name}; valid: {', '.join(task.shifts)}")
    return shift


def evaluation_problems(task: Task, n: int, *, shift: str = IN_DISTRIBUTION, seed: int = 0) -> list[Any]:
    """``n`` problems with distinct keys, the same for the same (task, shift, seed) in every process. A longer list
    begins with a shorter one.

    Raises:
        OptionError: unknown shift, ``n`` is not positive, or the task has fewer distinct problems than ``n``.
    """
    check_shift(task, shift)
    if n <= 0:
        raise OptionError(f"{n} evaluation problems asked for, wanted at least 1")
    rng = random.Random(f"evaluation/{task.name}/{shift}/{seed}")
    problems: list[Any] = []
    seen: set[Hashable] = set()
    misses = 0
    while len(problems) < n:
        problem = task.sample(rng, shift)
        if problem.key in seen:
            misses += 1
            # Coupon collecting: this many repeats in a row happen only when (nearly) all problems are drawn.
            if misses > 10_000:
                raise OptionError(
                    f"task {task.name} has only about {len(problems)} distinct problems under shift "
                    f"{shift!r}; {n} were asked for"
                )
            continue
        misses = 0
        seen.add(problem.key)
        problems.append(problem)
    return problems


def training_problem(task: Task, rng: random.Random, exclude: frozenset[Hashable] = frozenset()) -> Any:
    """An in-distribution problem whose key is not in ``exclude`` (the evaluation problems' keys).

    Raises:
        OptionError: those leave none, or next to none.
    """
    for _ in range(10_000):
        problem = task.sample(rng, IN_DISTRIBUTION)
        if problem.key not in exclude:
            return problem
    raise OptionError(f"task {task.name}: the {len(exclude)} evaluation problems leave none to train on")
