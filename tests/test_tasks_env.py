"""The gymnasium environment: the official checker, turns, rewards and seeds."""

from __future__ import annotations

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from rlspec.tasks import GeneralPoints, Task, TaskEnv


def test_official_checker() -> None:
    check_env(TaskEnv(), skip_render_check=True)


def test_right_answer_ends_the_episode() -> None:
    env = TaskEnv()
    question, info = env.reset(seed=0)
    assert question == info["messages"][-1]["content"]
    _, reward, terminated, truncated, info = env.step(env.task.answer(info["problem"]))
    assert (reward, terminated, truncated, info["kind"]) == (5.0, True, False, "correct")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("again")


def test_turn_limit_truncates_and_costs_one_more() -> None:
    env = TaskEnv(GeneralPoints(turns=3))
    env.reset(seed=0)
    rewards = []
    for turn in range(3):
        message, reward, terminated, truncated, info = env.step("no idea")
        rewards.append(reward)
        assert message == info["messages"][-1]["content"]
        assert (terminated, truncated) == (False, turn == 2)
    assert rewards == [-3.0, -3.0, -4.0]
    assert [m["role"] for m in info["messages"]] == ["user", "assistant"] * 3 + ["user"]


def test_seed_fixes_the_sequence() -> None:
    def hands(seed: int) -> list[str]:
        env = TaskEnv(shift="both")
        env.reset(seed=seed)
        return [env.reset()[0] for _ in range(5)]

    assert hands(1) == hands(1)
    assert hands(1) != hands(2)


def test_general_points_is_a_task() -> None:
    assert isinstance(GeneralPoints(), Task)
