"""What PPO learns from: the turns of an update, with rewards, values and advantages per action.

An action is a whole answer (level "turn") or one token (level "token"). Both are rows of (N, A) tensors with
a mask: A = 1 for turns, A = the longest answer for tokens. N counts turns, in the order they were played:
those of an episode follow each other, and with them those of a trace (:mod:`rlspec.train.traces`).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.tasks.base import training_problem
from rlspec.train.batch import autocast
from rlspec.train.config import PPOConfig
from rlspec.train.encode import pad_id
from rlspec.train.forward import answer_logits, answer_tokens, forward_passes
from rlspec.train.gae import gae
from rlspec.train.modes import evaluation_mode
from rlspec.train.rollout import Episode, Turn, play
from rlspec.train.sampling import token_logprobs
from rlspec.train.schedule import derived_seed
from rlspec.train.traces import Trace, conversation
from rlspec.train.value_head import ValueHead

if TYPE_CHECKING:
    from rlspec.tasks.base import Task


@dataclass(frozen=True)
class Experience:
    """The turns of one update. Tensors are float32 (N, A) on the model's device."""

    traces: list[Trace]  # one answer a row of the tensors
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
            states=task.max_answer_tokens if config.level == "token" else 1,
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
    model: Any, head: ValueHead | None, traces: Sequence[Trace], pad: int, config: PPOConfig
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probabilities, values (None without a head), mask and tokens per action, (B, A), of the B turns of
    some traces.

    The value of an action is read where the action begins: at the prompt's last token for a turn.
    """
    lengths = [end - first for trace in traces for first, end in trace.answers]
    device = next(model.parameters()).device
    with autocast(device, config.dtype):
        logits, hidden = answer_logits(model, traces, pad, hidden=head is not None)
    flat = token_logprobs(logits, answer_tokens(traces, device), config.temperature, config.top_p)
    values = head(hidden) if head is not None and hidden is not None else None
    mask = _mask(lengths, device)
    logprobs = _scatter(flat, mask)
    if config.level == "token":
        return logprobs, None if values is None else _scatter(values, mask), mask, mask.float()
    tokens = mask.sum(1, keepdim=True).float()
    values = None if values is None else _scatter(values, mask)[:, :1]
    return logprobs.sum(1, keepdim=True), values, torch.ones_like(tokens, dtype=torch.bool), tokens


def _mask(lengths: Sequence[int], device: Any) -> Tensor:
    """bool (len(lengths), longest), True on the first columns of each row."""
    ends = torch.tensor(lengths, device=device)[:, None]
    return torch.arange(max(lengths), device=device) < ends


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """One number for each True of the mask, row by row, as a tensor of its shape; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


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
    traces = [
        trace
        for episode in episodes
        for trace in conversation((turn.prompt_ids, turn.answer_ids) for turn in episode.turns)
    ]
    device = next(model.parameters()).device
    logprobs, mask = _sampled(turns, config, device)
    values = _values(head, turns, mask)
    rewards, discounts = _rewards_and_discounts(episodes, turn_limit_reward, mask, config)
    if reference is not None:
        scored = _score_all(reference, traces, pad_id(model, tokenizer), config)
        rewards -= config.kl_coef * (logprobs - scored)

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
    return Experience(traces, mask, logprobs, values, advantages, returns)


@torch.no_grad()
def _values(head: ValueHead, turns: Sequence[Turn], mask: Tensor) -> Tensor:
    """Values, (N, A), of the hidden states that the answers were sampled from."""
    return _scatter(head(torch.cat([turn.states for turn in turns]).to(mask.device)), mask)


def _sampled(turns: Sequence[Turn], config: PPOConfig, device: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions as they were sampled, and their mask, (N, A)."""
    if config.level == "turn":
        logprobs = torch.tensor([[math.fsum(turn.logprobs)] for turn in turns], device=device)
        return logprobs, torch.ones_like(logprobs, dtype=torch.bool)
    mask = _mask([len(turn.logprobs) for turn in turns], device)
    flat = [logprob for turn in turns for logprob in turn.logprobs]
    return _scatter(torch.tensor(flat, device=device), mask), mask


@torch.no_grad()
def _score_all(model: Any, traces: Sequence[Trace], pad: int, config: PPOConfig) -> Tensor:
    """Log-probabilities, (N, A), of the actions of any number of traces."""
    rows = turn_rows(traces)
    parts: dict[int, Tensor] = {}
    with evaluation_mode(model):
        for split in forward_passes(model, traces, config.micro_batch_size, pad):
            logprobs, *_ = score_actions(model, None, [traces[i] for i in split], pad, config)
            parts.update(zip((row for i in split for row in rows[i]), logprobs))
    ordered = [parts[row] for row in range(len(parts))]
    return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True)


def turn_rows(traces: Sequence[Trace]) -> list[range]:
    """The rows of each trace's turns in the tensors of an experience."""
    ends = list(itertools.accumulate(len(trace.answers) for trace in traces))
    return [range(end - len(trace.answers), end) for end, trace in zip(ends, traces)]


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
