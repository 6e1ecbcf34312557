"""What PPO learns from: the turns of an update, with rewards, values and advantages per action.

An action is a whole answer (level "turn") or one token (level "token"). Both are rows of (N, A) tensors with
a mask: A = 1 for turns, A = the longest answer for tokens. N counts turns, in the order they were played.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlspec.tasks.base import training_problem
from rlspec.train.batch import answer_forward, autocast, collate
from rlspec.train.config import PPOConfig
from rlspec.train.encode import pad_id
from rlspec.train.gae import gae
from rlspec.train.modes import evaluation_mode
from rlspec.train.padding import forward_passes
from rlspec.train.rollout import Episode, play
from rlspec.train.sampling import token_logprobs
from rlspec.train.schedule import derived_seed
from rlspec.train.value_head import ValueHead

if TYPE_CHECKING:
    from rlspec.tasks.base import Task

Pair = tuple[list[int], list[int]]  # prompt ids, answer ids


@dataclass(frozen=True)
class Experience:
    """The turns of one update. Tensors are float32 (N, A) on the model's device."""

    pairs: list[Pair]
    mask: Tensor  # bool, True on actions
    logprobs: Tensor  # as sampled
    values: Tensor
    advantages: Tensor  # normalised over the update
    returns: Tensor


def collect(
    model: Any, tokenizer: Any, task: Task, config: PPOConfig, step: int, exclude: frozenset[Any]
) -> list[Episode]:
    """Whole episodes on in-distribution problems until there are ``config.turns_per_update`` turns.

    Depends on (seed, step) and the model alone.
    """
    rng = random.Random(f"{config.seed}/ppo/{step}")
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "ppo", "rollout", step))
    episodes: list[Episode] = []
    turns = 0
    # As many episodes as the missing turns need if they are as long as those before (at first: the longest).
    turns_each = float(task.max_turns)
    while turns < config.turns_per_update:
        count = math.ceil((config.turns_per_update - turns) / turns_each)
        episodes += play(
            model,
            tokenizer,
            task,
            [training_problem(task, rng, exclude) for _ in range(count)],
            turns=task.max_turns,
            temperature=config.temperature,
            top_p=config.top_p,
            generator=generator,
            batch_size=config.rollout_batch_size,
            dtype=config.dtype,
        )
        turns = sum(len(episode.turns) for episode in episodes)
        turns_each = turns / len(episodes)
    return episodes


def turn_rewards(episodes: Sequence[Episode], turn_limit_reward: float) -> list[float]:
    """The verifier's reward of every turn; the last turn of an unsolved episode also gets the limit's."""
    rewards: list[float] = []
    for episode in episodes:
        rewards += [turn.verdict.reward for turn in episode.turns]
        if not episode.solved:
            rewards[-1] += turn_limit_reward
    return rewards


def score_actions(
    model: Any, head: ValueHead | None, pairs: Sequence[Pair], pad: int, config: PPOConfig
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probabilities, values (None without a head), mask and tokens per action, (B, A), of some turns.

    The value of an action is read where the action begins: at the prompt's last token for a turn.
    """
    device = next(model.parameters()).device
    batch = collate(pairs, pad, device)
    with autocast(device, config.dtype):
        logits, hidden = answer_forward(model, batch, hidden=head is not None)
    logprobs = token_logprobs(logits, batch.answers, config.temperature, config.top_p)
    logprobs = logprobs.masked_fill(~batch.answer_mask, 0.0)
    values = head(hidden) if head is not None and hidden is not None else None
    if config.level == "token":
        return logprobs, values, batch.answer_mask, batch.answer_mask.float()
    tokens = batch.answer_mask.sum(1, keepdim=True).float()
    values = None if values is None else values[:, :1]
    return logprobs.sum(1, keepdim=True), values, torch.ones_like(tokens, dtype=torch.bool), tokens


def prepare(
    model: Any,
    head: ValueHead,
    reference: Any | None,
    tokenizer: Any,
    episodes: Sequence[Episode],
    turn_limit_reward: float,
    config: PPOConfig,
    *,
    first: bool,
) -> Experience:
    """Rewards, values and advantages of played episodes.

    ``first`` starts the value head at the mean return, so that the model isn't bent to learn a constant.
    """
    turns = [turn for episode in episodes for turn in episode.turns]
    pairs = [(turn.prompt_ids, turn.answer_ids) for turn in turns]
    pad = pad_id(model, tokenizer)
    _, values, mask = _score_all(model, head, pairs, pad, config)
    logprobs = _per_action([turn.logprobs for turn in turns], config).to(values)
    rewards, discounts = _rewards_and_discounts(episodes, turn_limit_reward, mask, config)
    if reference is not None:
        rewards -= config.kl_coef * (logprobs - _score_all(reference, None, pairs, pad, config)[0])

    # Row by row, the mask lists the actions in the order they were taken.
    if first:
        nothing = torch.zeros_like(rewards[mask])
        mean_return = gae(rewards[mask], nothing, discounts[mask], lam=1.0).mean().item()
        head.start_at(mean_return)
        values = torch.full_like(values, mean_return)
    flat = gae(rewards[mask], values[mask], discounts[mask], config.lam).to(values)
    returns, advantages = torch.zeros_like(values), torch.zeros_like(values)
    returns[mask] = flat + values[mask]
    advantages[mask] = (flat - flat.mean()) / (flat.std(correction=0) + 1e-8)
    return Experience(pairs, mask, logprobs, values, advantages, returns)


@torch.no_grad()
def _score_all(
    model: Any, head: ValueHead | None, pairs: Sequence[Pair], pad: int, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`score_actions` for any number of turns: log-probabilities, values (0 without a head) and mask,
    all (N, A).
    """
    passes = forward_passes(model, pairs, config.micro_batch_size, pad)
    with evaluation_mode(model):
        parts = [score_actions(model, head, [pairs[row] for row in rows], pad, config) for rows in passes]
    width = max(part[0].shape[1] for part in parts)
    order = torch.tensor([row for rows in passes for row in rows]).argsort()

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])[order]

    return (
        join([logprobs for logprobs, *_ in parts]),
        join([torch.zeros_like(logprobs) if values is None else values for logprobs, values, *_ in parts]),
        join([mask for _, _, mask, _ in parts]),
    )


def _per_action(logprobs: Sequence[Sequence[float]], config: PPOConfig) -> Tensor:
    """Log-probabilities of the sampled tokens as those of actions, (N, A)."""
    if config.level == "turn":
        return torch.tensor([[math.fsum(row)] for row in logprobs])
    width = max(map(len, logprobs))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in logprobs])


def _rewards_and_discounts(
    episodes: Sequence[Episode], turn_limit_reward: float, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """(N, A) each. A turn's reward falls on its last action. Time passes from turn to turn: gamma acts there
    and tokens inside a turn are not discounted; nothing follows an episode's last action.
    """
    last_action = mask.cumsum(1).eq(mask.sum(1, keepdim=True)) & mask
    last_turn = torch.zeros_like(mask[:, :1])
    last_turn[torch.tensor([len(episode.turns) for episode in episodes]).cumsum(0) - 1] = True
    rewards = torch.zeros(mask.shape, device=mask.device)
    rewards[last_action] = torch.tensor(turn_rewards(episodes, turn_limit_reward), device=mask.device)
    discounts = torch.ones_like(rewards)
    discounts[last_action] = config.gamma
    discounts[last_action & last_turn] = 0.0
    return rewards, discounts
