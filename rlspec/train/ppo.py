"""Proximal policy optimisation on verified answers, at the level of turns (the paper) or of tokens.

Where this departs from the textbook: the value head starts at the first rollouts' mean return; the model
stays in eval mode throughout, for dropout would make the first ratio differ from 1; mini-batches are drawn by
whole conversations, whose turns share their forward pass, not by turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlspec.errors import OptionError
from rlspec.train.batch import counted_tokens
from rlspec.train.callbacks import Callback
from rlspec.train.config import PPOConfig
from rlspec.train.encode import pad_id
from rlspec.train.experience import Experience, collect, prepare, score_actions, turn_rewards, turn_rows
from rlspec.train.forward import forward_passes
from rlspec.train.loop import TrainResult, run_steps
from rlspec.train.losses import kl_estimates, policy_losses, value_losses
from rlspec.train.on_policy import check_on_policy
from rlspec.train.optimizer import clipped_step, make_adamw, set_share
from rlspec.train.schedule import derived_seed, learning_rate_at
from rlspec.train.traces import Trace
from rlspec.train.value_head import ValueHead

if TYPE_CHECKING:
    from rlspec.tasks.base import Task


def train_ppo(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: PPOConfig,
    *,
    reference: Any | None = None,
    exclude: frozenset[Any] = frozenset(),
    callbacks: Sequence[Callback] = (),
    resume_dir: Path | None = None,
) -> TrainResult:
    """Train every parameter of a model in place, on in-distribution problems. One step is one update.

    Args:
        model: a Hugging Face causal LM, on the device where it is to train. It stays in eval mode: dropout would make the
            policy another one than the sampler.
        tokenizer: the model's. Where it has a chat template, conversations are written with it.
        task: what gives problems and rewards; see :class:`rlspec.tasks.Task`.
        config: updates, rollouts, advantages, rates.
        callbacks: told before the first update and after each one; they change no result. Their logs hold
            ``mean_reward``, ``success_rate``, ``approx_kl`` (nats per action) and the other columns of ``metrics.jsonl``.
        reference: model that ``kl_coef`` pulls towards; needed when that is not 0.
        exclude: keys of the problems never to train on (those of the evaluation).
        resume_dir: folder of the resume state; one that holds a state is continued, the model's weights
            included.

    Returns:
        The losses, one an update (policy loss and weighted value loss), and the seconds spent.

    Raises:
        OptionError: ``kl_coef`` without a reference.
        OnPolicyError: the sampler and the loss disagree about the sampled answers' probabilities.
        TensorError: the loss or the norm of the gradients is not finite, or what answers are sampled from is NaN.
        RunFolderError: ``resume_dir`` holds a state of other settings.
    """
    if config.kl_coef > 0 and reference is None:
        raise OptionError(f"kl_coef is {config.kl_coef}, and there is no reference model to measure it by")
    head = ValueHead.for_model(model) if config.advantage == "gae" else None
    groups: list[tuple[torch.nn.Module, float]] = [(model, config.learning_rate)]
    if head is not None:
        groups.append((head, config.value_learning_rate))
    optimizer = make_adamw(groups, config.weight_decay)
    anchor = reference if config.kl_coef > 0 else None

    def take_step(step: int) -> dict[str, float]:
        model.eval()
        share = learning_rate_at(step, config.updates, peak=1.0, floor=config.final_learning_rate_ratio)
        set_share(optimizer, share)
        began = time.perf_counter()
        episodes = collect(model, tokenizer, task, config, step, exclude)
        seconds_sampling = time.perf_counter() - began
        experience = prepare(
            model, head, anchor, tokenizer, episodes, task.turn_limit_reward, config, first=step == 1
        )
        logs = improve(model, head, optimizer, experience, pad_id(model, tokenizer), config, step)
        rewards = turn_rewards(episodes, task.turn_limit_reward)
        logs.update(
            learning_rate=share * config.learning_rate,
            mean_reward=sum(rewards) / len(rewards),
            mean_return=sum(rewards) / len(episodes),
            success_rate=sum(episode.solved for episode in episodes) / len(episodes),
            turns=float(len(rewards)),
            answer_tokens=sum(trace.answer_tokens for trace in experience.traces) / len(rewards),
            seconds_sampling=seconds_sampling,
        )
        return logs

    return run_steps(
        "ppo",
        config.updates,
        take_step,
        config=config,
        model=model,
        tokenizer=tokenizer,
        parts={"optimizer": optimizer} if head is None else {"value_head": head, "optimizer": optimizer},
        callbacks=callbacks,
        resume_dir=resume_dir,
    )


def improve(
    model: Any,
    head: ValueHead | None,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    pad: int,
    config: PPOConfig,
    step: int,
) -> dict[str, float]:
    """Several epochs of clipped updates on one update's experience; logs are means over its steps."""
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "ppo", "shuffle", step))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums: dict[str, float] = {}
    deviation = math.nan
    steps = forwarded = 0
    # Measured beforehand, so that the passes that measure are not counted.
    forward_passes(model, experience.traces, config.micro_batch_size, pad)
    for epoch in range(config.epochs):
        for index, chosen in enumerate(mini_batches(experience.traces, config.mini_batch_size, generator)):
            fresh = epoch == 0 and index == 0
            with counted_tokens(model) as counts:
                logs, log_ratio, tokens = _accumulate(model, head, experience, chosen, pad, config)
            forwarded += sum(counts)
            if fresh:
                deviation = check_on_policy(log_ratio, tokens, config)
            logs["grad_norm"] = clipped_step(optimizer, parameters, config.max_grad_norm, f"ppo step {step}")
            steps += 1
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + value
    means = {name: value / steps for name, value in sums.items()}
    # Of the tokens of the conversations, each counted once an epoch: padding adds, common prefixes take away.
    distinct = config.epochs * sum(len(trace.ids) for trace in experience.traces)
    return {**means, "ratio_first_epoch_max_dev": deviation, "tokens_forwarded_ratio": forwarded / distinct}


def mini_batches(traces: Sequence[Trace], turns: int, generator: torch.Generator) -> list[list[int]]:
    """Numbers of the traces of each mini-batch of an epoch, in random order, about ``turns`` turns each.

    The turns are split evenly: a small rest would take a full step on a noisy gradient.
    """
    total = sum(len(trace.answers) for trace in traces)
    count = max(1, round(total / turns))
    batches: list[list[int]] = [[] for _ in range(count)]
    before = 0
    for i in torch.randperm(len(traces), generator=generator).tolist():
        # By the middle of the trace, so that long ones lie where most of them belongs.
        batches[(2 * before + len(traces[i].answers)) * count // (2 * total)].append(i)
        before += len(traces[i].answers)
    return [batch for batch in batches if batch]


def _accumulate(
    model: Any,
    head: ValueHead | None,
    experience: Experience,
    chosen: Sequence[int],
    pad: int,
    config: PPOConfig,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Gradients of one mini-batch, one forward pass at a time; its mean losses, and the log-ratio and the
    tokens of each action.
    """
    every = turn_rows(experience.traces)
    actions = experience.mask[[row for i in chosen for row in every[i]]].sum().item()
    totals = dict.fromkeys(("loss", "policy_loss", "value_loss", "approx_kl", "clip_fraction"), 0.0)
    log_ratios: list[Tensor] = []
    lengths: list[Tensor] = []
    traces = [experience.traces[i] for i in chosen]
    for split in forward_passes(model, traces, config.micro_batch_size, pad):
        part = [row for i in split for row in every[chosen[i]]]
        logprobs, values, mask, tokens = score_actions(model, head, [traces[i] for i in split], pad, config)
        # The columns past this part's longest answer are empty.
        old, old_values, advantages, returns = (
            tensor[part, : mask.shape[1]][mask]
            for tensor in (experience.logprobs, experience.values, experience.advantages, experience.returns)
        )
        log_ratio = logprobs[mask] - old
        policy = policy_losses(log_ratio, advantages, config.clip).sum() / actions
        if values is None:
            loss, value = policy, torch.zeros(())
        else:
            value = value_losses(values[mask], old_values, returns, config.value_clip).sum() / actions
            loss = policy + config.value_coef * value
        loss.backward()
        log_ratio = log_ratio.detach()
        log_ratios.append(log_ratio)
        lengths.append(tokens[mask])
        clipped = (log_ratio.exp() - 1).abs() > config.clip
        for name, amount in (
            ("loss", loss),
            ("policy_loss", policy),
            ("value_loss", value),
            ("approx_kl", kl_estimates(log_ratio).sum() / actions),
            ("clip_fraction", clipped.sum() / actions),
        ):
            totals[name] += amount.item()
    return totals, torch.cat(log_ratios), torch.cat(lengths)
