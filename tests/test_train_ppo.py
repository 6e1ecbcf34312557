"""PPO's parts against closed forms, and the whole against a task it can learn in seconds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from train_toys import ToyTask, toy_model, toy_tokenizer

from rlspec.errors import OptionError
from rlspec.train import Callback, KLProbe, PPOConfig, StepState, train_ppo
from rlspec.train import experience as experience_module
from rlspec.train.answers import answered
from rlspec.train.divergence import trace_divergences
from rlspec.train.experience import collect, prepare, turn_rewards
from rlspec.train.gae import gae
from rlspec.train.groups import group_advantages
from rlspec.train.losses import kl_estimates, policy_losses, value_losses
from rlspec.train.on_policy import OnPolicyError
from rlspec.train.trace_file import read_prompts
from rlspec.train.value_head import ValueHead

TOKENIZER = toy_tokenizer()


def test_gae_is_the_discounted_sum_of_td_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    discounts = torch.tensor([0.9, 0.9, 0.0, 1.0, 0.9, 0.9, 1.0, 0.9, 0.0], dtype=torch.float64)
    lam = 0.95
    found = gae(rewards, values, discounts, lam)
    for t in range(9):
        expected, weight = 0.0, 1.0
        for s in range(t, 9):
            following = values[s + 1].item() if s < 8 else 0.0
            expected += weight * (rewards[s] + discounts[s] * following - values[s]).item()
            weight *= discounts[s].item() * lam
        assert found[t].item() == pytest.approx(expected, abs=1e-12)


def test_gae_with_lambda_1_is_return_minus_value_and_episodes_do_not_mix() -> None:
    rewards, values = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.5, -1.0, 3.0, 2.0])
    discounts = torch.tensor([0.5, 0.0, 0.5, 0.0])
    returns = torch.tensor([1 + 0.5 * 2, 2, 4 + 0.5 * 8, 8], dtype=torch.float64)
    torch.testing.assert_close(gae(rewards, values, discounts, 1.0), returns - values.double())


def test_losses_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])
    # Clipped where the step would be rewarded for going further, free where it has to come back.
    expected = torch.tensor([-2.0, -1.1 * 2, 1.5 * 2, -0.5 * 2, 0.9 * 2])
    torch.testing.assert_close(policy_losses(ratio.log(), advantages, 0.1), expected)
    # value 1.0, was 0.2, kept within 0.1: 0.3; target 2 -> errors 1 and 1.7; target 0 -> 1 and 0.3.
    values, old = torch.tensor([1.0, 1.0]), torch.tensor([0.2, 0.2])
    found = value_losses(values, old, torch.tensor([2.0, 0.0]), 0.1)
    torch.testing.assert_close(found, torch.tensor([0.5 * 1.7**2, 0.5]))
    expected = torch.tensor([0.0, math.e - 2, 1 / math.e])
    torch.testing.assert_close(kl_estimates(torch.tensor([0.0, 1.0, -1.0])), expected)


@pytest.mark.parametrize("level", ["turn", "token"])
def test_experience_of_played_episodes(level: str) -> None:
    model, task = toy_model(), ToyTask()
    config = PPOConfig(turns_per_update=40, level=level, micro_batch_size=7, seed=4)  # type: ignore[arg-type]
    episodes = collect(model, TOKENIZER, task, config, 1, frozenset())
    turns = [turn for episode in episodes for turn in episode.turns]
    assert len(turns) >= 40
    rewards = turn_rewards(episodes, task.turn_limit_reward)
    assert rewards.count(-1.5) == sum(not episode.solved for episode in episodes) > 0
    head = ValueHead.for_model(model)
    torch.nn.init.normal_(head.linear.weight)
    found = prepare(model, head, None, TOKENIZER, episodes, task.turn_limit_reward, config, first=False)
    # One turn at a time, straight from the model's own hidden states.
    row = 0
    for episode in episodes:
        values, gains, steps = [], [], []
        for number, turn in enumerate(episode.turns):
            ids = torch.tensor([turn.prompt_ids + turn.answer_ids])
            with torch.no_grad():
                hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
            start, count = len(turn.prompt_ids) - 1, len(turn.answer_ids) if level == "token" else 1
            values += head(hidden[start : start + count]).tolist()
            gains += [0.0] * (count - 1) + [rewards[row + number]]
            steps += [1.0] * (count - 1) + [0.9]
        steps[-1] = 0.0
        expected = gae(torch.tensor(gains), torch.tensor(values), torch.tensor(steps), 0.95)
        rows = slice(row, row + len(episode.turns))
        mask = found.mask[rows]
        torch.testing.assert_close(found.values[rows][mask], torch.tensor(values), atol=1e-4, rtol=1e-4)
        returns = expected.float() + torch.tensor(values)
        torch.testing.assert_close(found.returns[rows][mask], returns, atol=1e-4, rtol=1e-4)
        row += len(episode.turns)
    advantages = found.advantages[found.mask]
    assert advantages.mean().abs() < 1e-5 and (advantages.std(correction=0) - 1).abs() < 1e-4


def test_group_advantages_by_hand() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    # Mean 3, squares 4, 1, 0, 9: deviation sqrt(3.5). Means of the others: 11/3, 10/3, 3, 2.
    grpo = torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.float64) / 3.5**0.5
    rloo = torch.tensor([1 - 11 / 3, 2 - 10 / 3, 0.0, 4.0], dtype=torch.float64)
    for kind, expected in (("grpo", grpo), ("rloo", rloo)):
        found = group_advantages(returns, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-6)
        assert found[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("level", ["turn", "token"])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_an_episode_is_held_against_its_group(kind: str, level: str) -> None:
    model, task = toy_model(), ToyTask()
    config = PPOConfig(turns_per_update=40, level=level, advantage=kind, group_size=4, seed=4)  # type: ignore[arg-type]
    episodes = collect(model, TOKENIZER, task, config, 1, frozenset())
    found = prepare(model, None, None, TOKENIZER, episodes, task.turn_limit_reward, config, first=True)
    assert len(episodes) % 4 == 0
    row = 0
    for first in range(0, len(episodes), 4):
        group = episodes[first : first + 4]
        assert len({episode.problem.key for episode in group}) == 1
        totals = []
        for episode in group:
            rewards = turn_rewards([episode], task.turn_limit_reward)
            totals.append(sum(0.9**turn * reward for turn, reward in enumerate(rewards)))
        mean = sum(totals) / 4
        spread = (sum((total - mean) ** 2 for total in totals) / 4) ** 0.5 + 1e-8
        for n, episode in enumerate(group):
            others = [total for m, total in enumerate(totals) if m != n]
            wanted = (totals[n] - mean) / spread if kind == "grpo" else totals[n] - sum(others) / 3
            rows = slice(row, row + len(episode.turns))
            actions = found.advantages[rows][found.mask[rows]]
            torch.testing.assert_close(actions, torch.full_like(actions, wanted), atol=1e-5, rtol=1e-5)
            row += len(episode.turns)
    assert row == len(found.mask) and found.advantages.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_reward_improves_without_a_value_head(kind: str) -> None:
    config = PPOConfig(
        updates=8,
        turns_per_update=128,
        mini_batch_size=32,
        advantage=kind,  # type: ignore[arg-type]
        group_size=4,
        learning_rate=1e-2,
    )
    logs = Logs()
    train_ppo(toy_model(initializer_range=0.05), TOKENIZER, ToyTask(), config, callbacks=[logs])
    rewards = [row["mean_reward"] for row in logs.rows]
    assert rewards[0] < -0.8 and rewards[-1] > 0.6, rewards
    assert all(row["value_loss"] == 0 for row in logs.rows)


class Logs(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_step(self, state: StepState) -> None:
        self.rows.append(state.logs)


@pytest.mark.parametrize(("level", "top_p"), [("turn", 1.0), ("token", 1.0), ("turn", 0.9)])
def test_reward_improves(level: str, top_p: float) -> None:
    config = PPOConfig(
        updates=8,
        turns_per_update=128,
        mini_batch_size=32,
        level=level,  # type: ignore[arg-type]
        top_p=top_p,
        learning_rate=1e-2,
        value_learning_rate=1e-2,
    )
    logs = Logs()
    result = train_ppo(toy_model(initializer_range=0.05), TOKENIZER, ToyTask(), config, callbacks=[logs])
    assert result.steps == len(result.losses) == 8 and not result.stopped
    rewards = [row["mean_reward"] for row in logs.rows]
    assert rewards[0] < -0.8 and rewards[-1] > 0.6, rewards
    if top_p == 1.0:
        assert all(row["ratio_first_epoch_max_dev"] < 1e-3 for row in logs.rows)


def test_kl_penalty_keeps_the_policy_near_the_reference() -> None:
    moved = []
    for kl_coef in (0.0, 1.0):
        model = toy_model()
        probe = KLProbe(model, TOKENIZER, ToyTask(), prompts=8)
        config = PPOConfig(updates=4, turns_per_update=96, learning_rate=3e-3, kl_coef=kl_coef)
        train_ppo(model, TOKENIZER, ToyTask(), config, reference=toy_model())
        moved.append(probe.measure(model))
    assert 0 < moved[1] < moved[0]
    with pytest.raises(OptionError, match="reference"):
        train_ppo(toy_model(), TOKENIZER, ToyTask(), PPOConfig(kl_coef=0.1))


@pytest.mark.parametrize("level", ["turn", "token"])
def test_logprobs_of_another_temperature_are_refused(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PPOConfig(updates=1, turns_per_update=32, level=level, temperature=1.0)  # type: ignore[arg-type]
    train_ppo(toy_model(), TOKENIZER, ToyTask(), config)
    honest = experience_module.play

    def broken(*arguments: object, **options: object) -> object:
        return honest(*arguments, **{**options, "temperature": 0.95})  # type: ignore[arg-type]

    monkeypatch.setattr(experience_module, "play", broken)
    with pytest.raises(OnPolicyError, match="importance ratio"):
        train_ppo(toy_model(), TOKENIZER, ToyTask(), config)


def test_kl_probe_is_the_exact_divergence() -> None:
    task, base, other = ToyTask(), toy_model(0), toy_model(1)
    probe = KLProbe(base, TOKENIZER, task, seed=2, prompts=5)
    assert probe.measure(base) == 0.0
    total, tokens = 0.0, 0
    for pairs in probe._pairs:
        for prompt, answer in pairs:
            ids, where = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
            with torch.no_grad():
                log_p, log_q = (m(ids).logits[0, where].double().log_softmax(-1) for m in (base, other))
            total += (log_p.exp() * (log_p - log_q)).sum().item()
            tokens += len(answer)
    assert tokens == probe.tokens
    assert probe.measure(other) == pytest.approx(total / tokens, rel=1e-5)


def test_kl_probe_of_a_file_measures_its_prompts_and_has_the_base_answer_the_rest(tmp_path: Path) -> None:
    base, other, path = toy_model(0), toy_model(1), tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 2", "answer": "yes 1"}\n{"prompt": "3 4"}\n{"text": "1 2 3 4"}\n')
    probe = KLProbe(base, TOKENIZER, path)
    traces = answered(read_prompts(path, TOKENIZER), base, TOKENIZER)
    assert probe.prompts == 3 and probe.tokens == sum(trace.answer_tokens for trace in traces)
    expected = trace_divergences(base, other, traces, 0)
    assert probe.measure(other) == pytest.approx(sum(expected) / 3, rel=1e-5) and probe.measure(base) == 0.0
    assert KLProbe(base, TOKENIZER, path, prompts=1).measure(other) == pytest.approx(
        trace_divergences(base, other, traces[:1], 0)[0], rel=1e-5
    )


def test_kl_probe_respects_its_cache() -> None:
    row_bytes = 4 * toy_model().config.vocab_size
    probe = KLProbe(toy_model(), TOKENIZER, ToyTask(), prompts=20, cache_bytes=30 * row_bytes)
    assert probe.tokens <= 30 and 0 < probe.prompts < 20
    with pytest.raises(OptionError, match="bytes"):
        KLProbe(toy_model(), TOKENIZER, ToyTask(), cache_bytes=row_bytes)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.0},
        {"level": "word"},
        {"updates": 0},
        {"top_p": 1.5},
        {"gamma": -0.1},
        {"advantage": "reinforce"},
        {"group_size": 1},
    ],
)
def test_bad_settings_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(changes))):
        PPOConfig(**changes)  # type: ignore[arg-type]


def test_the_papers_settings() -> None:
    paper = PPOConfig.paper(updates=3)
    assert (paper.gamma, paper.lam, paper.clip, paper.epochs, paper.value_coef) == (0.9, 0.95, 0.1, 4, 0.5)
    assert (paper.learning_rate, paper.max_grad_norm, paper.updates, paper.level) == (1e-6, 0.01, 3, "turn")
