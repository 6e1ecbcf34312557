"""A task as a :class:`gymnasium.Env`: one action is one whole answer, one step is one verification turn."""

from __future__ import annotations

import random
import string
from typing import Any

from rlspec.errors import MissingPackageError
from rlspec.tasks.base import IN_DISTRIBUTION, Task, check_shift
from rlspec.tasks.general_points import GeneralPoints

try:
    import gymnasium
    from gymnasium import spaces
except ModuleNotFoundError as error:
    if error.name != "gymnasium":  # it is there, and lacks something itself
        raise
    raise MissingPackageError("rlspec.tasks.TaskEnv", "gymnasium") from None

_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n×÷−"


class TaskEnv(gymnasium.Env[str, str]):
    """Play any :class:`rlspec.tasks.Task` turn by turn.

    The observation is the newest user turn (the question, later the verifier's message); ``info`` holds the
    whole conversation as ``messages``, the ``problem``, and after a step the verdict's ``kind``. An episode
    is terminated by a right answer and truncated after ``task.max_turns`` turns. ``reset(seed=...)`` makes
    the sequence of problems reproducible.

    Args:
        task: the task; default :class:`GeneralPoints` in chat style.
        shift: the distribution that problems are drawn from.

    Raises:
        OptionError: the task has no such shift.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, task: Task | None = None, *, shift: str = IN_DISTRIBUTION) -> None:
        self.task: Task = GeneralPoints() if task is None else task
        self.shift = check_shift(self.task, shift)
        self.observation_space = spaces.Text(max_length=20_000, charset=_CHARACTERS)
        self.action_space = spaces.Text(max_length=20_000, charset=_CHARACTERS)
        self._rng: random.Random | None = None
        self._problem: Any = None
        self._turn = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None or self._rng is None:
            self._rng = random.Random(int(self.np_random.integers(2**63)))
        self._problem = self.task.sample(self._rng, self.shift)
        self._messages = self.task.prompt(self._problem)
        self._turn = 0
        return self._messages[-1]["content"], self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Judge one answer.

        Raises:
            gymnasium.error.ResetNeeded: the episode has not begun or is over.
        """
        if self._problem is None:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is under way")
        self._turn += 1
        verdict = self.task.verify(self._problem, action)
        truncated = not verdict.solved and self._turn >= self.task.max_turns
        reward = verdict.reward + (self.task.turn_limit_reward if truncated else 0.0)
        self._messages.append({"role": "assistant", "content": action})
        if not verdict.solved:
            self._messages.append({"role": "user", "content": verdict.message})
        info = self._info() | {"kind": verdict.kind}
        if verdict.solved or truncated:
            self._problem = None
        return verdict.message, reward, verdict.solved, truncated, info

    def _info(self) -> dict[str, Any]:
        return {"messages": [dict(m) for m in self._messages], "problem": self._problem, "turn": self._turn}
