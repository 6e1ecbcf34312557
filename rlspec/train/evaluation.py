"""Accuracy of a model on a fixed set of problems, with its uncertainty."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlspec.tasks.base import check_shift, evaluation_problems
from rlspec.tasks.stats import wilson_interval
from rlspec.train.rollout import play
from rlspec.train.schedule import derived_seed

if TYPE_CHECKING:
    from rlspec.tasks.base import Task


@dataclass(frozen=True)
class EvalResult:
    """Outcome of one evaluation. An episode succeeds if any of its turns does."""

    shift: str
    n: int  # episodes
    successes: int
    first_turn_successes: int
    accuracy: float  # successes / n
    low: float  # 95 % Wilson interval of the accuracy
    high: float
    per_turn_accuracy: list[float]  # share of episodes solved within the first 1, 2, … turns
    outcomes: list[bool]  # per problem, in the fixed order, for a paired test between two checkpoints
    kinds: dict[str, int]  # how the verifier classed the first answers
    seconds: float

    @property
    def first_turn_accuracy(self) -> float:
        return self.first_turn_successes / self.n


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    shift: str = "none",
    deals: int = 234,
    turns: int | None = None,
    seed: int = 0,
    first: int = 0,
    temperature: float = 0.2,
    batch_size: int = 256,
    dtype: Any = "float32",
) -> EvalResult:
    """Play ``deals`` fixed problems of a shift, ``turns`` verification turns each (the task's limit if None).

    Problems and random numbers depend on (seed, shift) alone, so two checkpoints are judged on the same
    problems with the same luck. ``first`` problems of that fixed order are passed over, so that two sets of one seed
    share none. The model's mode and the global random state are left as they were.

    Raises:
        OptionError: the task has no such shift.
    """
    check_shift(task, shift)
    began = time.perf_counter()
    limit = task.max_turns if turns is None else turns
    problems = evaluation_problems(task, first + deals, shift=shift, seed=seed)[first:]
    episodes = play(
        model,
        tokenizer,
        task,
        problems,
        turns=limit,
        temperature=temperature,
        generator=torch.Generator().manual_seed(derived_seed(seed, "evaluate", shift)),
        batch_size=batch_size,
        dtype=dtype,
    )
    outcomes = [episode.solved for episode in episodes]
    solved_at = Counter(len(episode.turns) for episode in episodes if episode.solved)
    within = [sum(solved_at[turn] for turn in range(1, last + 1)) for last in range(1, limit + 1)]
    low, high = wilson_interval(sum(outcomes), len(episodes))
    return EvalResult(
        shift=shift,
        n=len(episodes),
        successes=sum(outcomes),
        first_turn_successes=within[0],
        accuracy=sum(outcomes) / len(episodes),
        low=low,
        high=high,
        per_turn_accuracy=[count / len(episodes) for count in within],
        outcomes=outcomes,
        kinds=dict(Counter(episode.turns[0].verdict.kind for episode in episodes)),
        seconds=time.perf_counter() - began,
    )
