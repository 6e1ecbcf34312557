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
    """Outcome of one evaluation. An episode succeeds if any of its turns does.

    Attributes:
        shift: under which it was made.
        n: episodes, one for each problem.
        successes: episodes that ended solved.
        first_turn_successes: those solved by the first answer.
        accuracy: successes / n, in [0, 1].
        low: lower end of its 95 % Wilson interval.
        high: upper end.
        per_turn_accuracy: share of episodes solved within the first 1, 2, … turns; as many as there may be turns.
        outcomes: whether each problem was solved, (n,) in the fixed order, for a paired test between two checkpoints.
        kinds: how the verifier classed the first answers: name to count.
        seconds: wall time.
    """

    shift: str
    n: int
    successes: int
    first_turn_successes: int
    accuracy: float
    low: float
    high: float
    per_turn_accuracy: list[float]
    outcomes: list[bool]
    kinds: dict[str, int]
    seconds: float

    @property
    def first_turn_accuracy(self) -> float:
        """Share of episodes solved by the first answer."""
        return self.first_turn_successes / self.n


def _side_by_side(model: Any) -> int:
    return 64 if sum(parameter.numel() for parameter in model.parameters()) >= 10**9 else 256


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
    batch_size: int | None = None,
    dtype: Any = "float32",
) -> EvalResult:
    """Let a model solve fixed problems of a shift.

    Problems and random numbers depend on (seed, shift) alone, so two checkpoints are judged on the same
    problems with the same luck. The model's mode and the global random state are left as they were.

    Args:
        model: a Hugging Face causal LM, on the device where it is to run.
        tokenizer: the model's.
        task: what gives problems and judges answers; see :class:`rlspec.tasks.Task`.
        shift: one of ``task.shifts``; ``"none"`` is in distribution.
        deals: problems, all different.
        turns: verification turns of each; None: the task's limit.
        seed: of problems and sampling.
        first: problems of the fixed order that are passed over, so that two sets of one seed share none.
        temperature: of sampling; 0 takes the likeliest token.
        batch_size: episodes played side by side, whose caches are in memory together; None is 256, or 64 for models of a
            billion parameters and more.
        dtype: of the passes: ``"float32"``, ``"bf16"``, or ``"auto"``, which is bf16 on CUDA.

    Raises:
        OptionError: the task has no such shift, fewer different problems, or no problem is asked for.
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
        batch_size=batch_size or _side_by_side(model),
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
