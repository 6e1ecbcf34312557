"""Supervised fine-tuning on correct answers, the loss on answer tokens only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlspec.errors import OptionError
from rlspec.tasks.base import training_problem
from rlspec.train.batch import autocast
from rlspec.train.callbacks import Callback
from rlspec.train.config import SFTConfig
from rlspec.train.encode import encode_example, pad_id
from rlspec.train.forward import answer_logits, answer_tokens, forward_passes
from rlspec.train.loop import TrainResult, run_steps
from rlspec.train.losses import divergences, token_losses
from rlspec.train.modes import evaluation_mode
from rlspec.train.optimizer import clipped_step, make_adamw, set_share
from rlspec.train.schedule import learning_rate_at
from rlspec.train.traces import Pair, single

if TYPE_CHECKING:
    from rlspec.tasks.base import Task


def train_sft(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: SFTConfig,
    *,
    reference: Any | None = None,
    exclude: frozenset[Any] = frozenset(),
    callbacks: Sequence[Callback] = (),
    resume_dir: Path | None = None,
) -> TrainResult:
    """Train every parameter of a model in place, on in-distribution problems.

    Args:
        model: a Hugging Face causal LM, on the device where it is to train; its parameters are best kept in float32,
            ``config.dtype`` says what passes compute in.
        tokenizer: the model's. Where it has a chat template, conversations are written with it.
        task: what to learn; see :class:`rlspec.tasks.Task`.
        config: steps, batches, rates, loss.
        callbacks: told before the first step and after each one; they change no result.
        reference: model that ``kl_coef`` pulls towards; needed when that is not 0.
        exclude: keys of the problems never to train on (those of the evaluation).
        resume_dir: folder of the resume state; one that holds a state is continued, the model's weights
            included.

    Returns:
        The losses, one a step, in nats per answer token, and the seconds spent.

    Raises:
        OptionError: ``kl_coef`` without a reference.
        TensorError: the loss or the norm of the gradients is not finite.
        RunFolderError: ``resume_dir`` holds a state of other settings.
    """
    if config.kl_coef > 0 and reference is None:
        raise OptionError(f"kl_coef is {config.kl_coef}, and there is no reference model to measure it by")
    device = next(model.parameters()).device
    pad = pad_id(model, tokenizer)
    optimizer = make_adamw([(model, config.learning_rate)], config.weight_decay)

    def take_step(step: int) -> dict[str, float]:
        model.train()
        share = learning_rate_at(
            step, config.steps, peak=1.0, warmup_ratio=config.warmup_ratio, schedule=config.schedule
        )
        set_share(optimizer, share)
        pairs = sft_batch(tokenizer, task, config, step, exclude)
        traces = [single(*pair) for pair in pairs]
        count = sum(trace.answer_tokens for trace in traces)
        loss = 0.0
        for rows in forward_passes(model, traces, config.micro_batch_size, pad):
            chosen = [traces[row] for row in rows]
            with autocast(device, config.dtype):
                logits, _ = answer_logits(model, chosen, pad)
            total = token_losses(logits.float(), answer_tokens(chosen, device), config.loss).sum()
            if reference is not None and config.kl_coef > 0:
                with torch.no_grad(), evaluation_mode(reference), autocast(device, config.dtype):
                    towards, _ = answer_logits(reference, chosen, pad)
                total = total + config.kl_coef * divergences(logits.float(), towards.float()).sum()
            # Divided by the tokens of the whole batch, so that the split into micro-batches weighs nothing.
            part = total / count
            part.backward()
            loss += part.item()
        norm = clipped_step(optimizer, model.parameters(), config.max_grad_norm, f"sft step {step}")
        return {"loss": loss, "learning_rate": share * config.learning_rate, "grad_norm": norm}

    return run_steps(
        "sft",
        config.steps,
        take_step,
        config=config,
        model=model,
        tokenizer=tokenizer,
        parts={"optimizer": optimizer},
        callbacks=callbacks,
        resume_dir=resume_dir,
    )


def sft_batch(
    tokenizer: Any, task: Task, config: SFTConfig, step: int, exclude: frozenset[Any]
) -> list[Pair]:
    """Examples of one step: a function of (seed, step), so a resumed run needs no data state."""
    rng = random.Random(f"{config.seed}/sft/{step}")
    pairs: list[Pair] = []
    for _ in range(config.batch_size):
        messages, answer = task.sft_example(training_problem(task, rng, exclude), rng)
        ids, carries_loss = encode_example(tokenizer, messages, answer)
        start = carries_loss.index(True)
        pairs.append((ids[:start], ids[start:]))
    return pairs
