"""What SFT minimises beside the cross entropy: DFT's weights and the divergence from a reference, in closed form."""

from __future__ import annotations

import random

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from train_toys import ToyTask, toy_model, toy_tokenizer

from rlspec.errors import OptionError
from rlspec.tasks import GeneralPoints, Rule
from rlspec.tasks.base import training_problem
from rlspec.train import SFTConfig, train_sft
from rlspec.train.losses import divergences, token_losses
from rlspec.train.sft import sft_batch


def test_dft_weighs_the_gradient_of_each_token_by_its_probability() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 6, 2, 2])
    losses = token_losses(logits, tokens, "dft")
    p = logits.detach().softmax(-1)
    chosen = p[range(5), tokens]
    assert torch.allclose(losses.detach(), -chosen * chosen.log(), rtol=1e-14)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    onehot = torch.nn.functional.one_hot(tokens, 7)
    # Through the weight it would hold another term, -p (onehot - p) log p.
    assert torch.allclose(gradient, chosen[:, None] * (p - onehot), rtol=1e-12, atol=1e-15)


def test_the_divergence_is_torchs() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 4, 9, dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    assert torch.allclose(divergences(a, b), expected, rtol=1e-12)
    assert divergences(a, a).abs().max() == 0


def test_the_loss_is_cross_entropy_and_divergence_of_the_answers_alone() -> None:
    model, reference, tokenizer = toy_model(), toy_model(seed=1), toy_tokenizer()
    config = SFTConfig(steps=1, batch_size=6, micro_batch_size=4, kl_coef=0.7, dtype="float32")
    entropy = divergence = count = 0.0
    for prompt, answer in sft_batch(tokenizer, ToyTask(), config, 1, frozenset()):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            own, other = (m(ids).logits[0, len(prompt) - 1 : -1].double() for m in (model, reference))
        entropy -= own.log_softmax(-1)[range(len(answer)), answer].sum().item()
        divergence += kl_divergence(Categorical(logits=own), Categorical(logits=other)).sum().item()
        count += len(answer)
    result = train_sft(model, tokenizer, ToyTask(), config, reference=reference)
    assert result.losses[0] == pytest.approx((entropy + 0.7 * divergence) / count, rel=1e-5)
    assert all(p.grad is None for p in reference.parameters())


def test_a_pull_without_a_reference_is_refused() -> None:
    with pytest.raises(OptionError, match=r"kl_coef is 0\.5, and there is no reference"):
        train_sft(toy_model(), toy_tokenizer(), ToyTask(), SFTConfig(steps=1, kl_coef=0.5))
    with pytest.raises(OptionError, match="loss"):
        SFTConfig(loss="x")  # type: ignore[arg-type]


def test_many_rules_change_the_prompt_and_keep_the_hand() -> None:
    rules = (Rule(1, 2, 3), Rule(7, 8, 9))
    task = GeneralPoints(style="compact", history_share=0.0, training_rules=rules)
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        problem = training_problem(task, rng)
        ((message,), answer) = task.sft_example(problem, rng)
        words = message["content"].split()
        rule = Rule(*(int(words[i]) for i in (2, 4, 6)))
        seen.add(rule)
        assert words[words.index("cards") + 1 :] == list(problem.cards)
        other = type(problem)(problem.cards, rule, problem.target)
        assert task.verify(other, answer).solved
    assert set(rules) <= seen
    # Hands that neither rule can solve stay under the rule in distribution.
    assert seen <= {*rules, Rule(10, 10, 10)}
