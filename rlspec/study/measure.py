"""What is measured of a model: success on two sets of deals, distance from the base, and how sure it is of itself."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.nn import functional as F

from rlspec.run.rows import mean, rotation
from rlspec.study.context import Context
from rlspec.tasks import evaluation_problems, training_problem
from rlspec.train import evaluate
from rlspec.train.encode import encode_answer, encode_prompt, pad_id
from rlspec.train.forward import answer_logits, answer_tokens, forward_passes
from rlspec.train.modes import evaluation_mode
from rlspec.train.rollout import play
from rlspec.train.schedule import derived_seed
from rlspec.train.traces import single

Row = dict[str, Any]
NULL_DRAWS = 2
PROBLEMS, GROUP = 32, 8  # of the policy's probe: that many problems, and answers to each
HELD_OUT = 128  # answers of the validation loss


def accuracies(context: Context, model: Any) -> Row:
    """Success rates by shift on the deals reported, and as ``select_*`` on those that settings are chosen on, which
    are others; with Wilson intervals, and ``*_outcomes``, one character a deal."""
    shared = context.shared
    row: Row = {}
    sets = [("", 0, shared["deals"]), ("select_", shared["deals"], shared["selection"])]
    for shift in shared["shifts"]:
        name = {"none": "id", "both": "ood"}.get(shift, shift)
        for prefix, first, deals in sets:
            if deals == 0:
                continue
            found = evaluate(
                model,
                context.tokenizer,
                context.task(),
                shift=shift,
                deals=deals,
                first=first,
                seed=shared["seed"],
            )
            row[f"{prefix}{name}"] = found.accuracy
            if not prefix:
                row.update({f"{name}_low": found.low, f"{name}_high": found.high})
            row[f"{prefix}{name}_outcomes"] = "".join("01"[solved] for solved in found.outcomes)
    return row


def distances(context: Context, model: Any) -> Row:
    """How far the weights and the predictions are from the base's: rotation of the leading subspaces, that of random
    updates of the same norm, the norm of the update, all means over matrices; KL in nats per token."""
    rows: list[Any] = context.tracker.measure(model, step=0, null_draws=NULL_DRAWS).rows
    turned = mean(rotation(row) for row in rows) or 0.0
    null = mean(row["null_random_rad"] for row in rows) or 0.0
    return {
        "rotation_rad": turned,
        "rotation_random_rad": null,
        "rotation_beyond_random": turned / null if null > 0 else 0.0,
        "delta_relative": mean(row["delta_relative"] for row in rows),
        "kl_nats": context.probe.measure(model),
    }


@torch.no_grad()
def confidence(context: Context, model: Any) -> Row:
    """``validation_loss`` and ``entropy_nats``, nats per token of right answers to problems that training never sees;
    ``reward_spread``, the standard deviation of the reward among answers to one problem, sampled at temperature 1:
    what the advantages of policy gradients are made of."""
    task, tokenizer, shared = context.task(), context.tokenizer, context.shared
    held_out = evaluation_problems(task, min(HELD_OUT, shared["deals"]), seed=shared["seed"])
    traces = [
        single(encode_prompt(tokenizer, task.prompt(p)), encode_answer(tokenizer, task.answer(p)))
        for p in held_out
    ]
    loss = entropy = 0.0
    pad = pad_id(model, tokenizer)
    with evaluation_mode(model):
        for rows in forward_passes(model, traces, 64, pad):
            chosen = [traces[row] for row in rows]
            logits, _ = answer_logits(model, chosen, pad)
            loss += F.cross_entropy(logits, answer_tokens(chosen, logits.device), reduction="sum").item()
            logprobs = torch.log_softmax(logits, -1)
            entropy -= (logprobs.exp() * logprobs).sum().item()
    count = sum(trace.answer_tokens for trace in traces)
    rng = random.Random(f"{shared['seed']}/study/probe")
    problems = [training_problem(task, rng, context.exclude) for _ in range(PROBLEMS)]
    episodes = play(
        model,
        tokenizer,
        task,
        [problem for problem in problems for _ in range(GROUP)],
        turns=1,
        generator=torch.Generator().manual_seed(derived_seed(shared["seed"], "study", "probe")),
    )
    rewards = torch.tensor([e.turns[0].verdict.reward for e in episodes]).view(PROBLEMS, GROUP)
    return {
        "validation_loss": loss / count,
        "entropy_nats": entropy / count,
        "reward_spread": rewards.std(1, correction=0).mean().item(),
    }
