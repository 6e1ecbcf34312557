"""The sampler against full forward passes, Hugging Face's own generate, and the distribution it claims."""

from __future__ import annotations

import pytest
import torch
from train_toys import ToyTask, toy_model, toy_prompts, toy_tokenizer

from rlspec.errors import TensorError
from rlspec.tasks.base import evaluation_problems
from rlspec.train import evaluate
from rlspec.train.batch import answer_forward, collate, split_by_length
from rlspec.train.encode import decode_answer, encode_answer, encode_example, encode_prompt
from rlspec.train.generate import generate
from rlspec.train.rollout import play
from rlspec.train.sampling import choose, sampling_logprobs

TOKENIZER = toy_tokenizer()


def test_greedy_equals_hugging_face() -> None:
    model, prompts = toy_model(), toy_prompts(40)
    model.generation_config.eos_token_id = [3, 5, 9, 10, 11]
    ours = generate(model, TOKENIZER, prompts, max_new_tokens=12, temperature=0)
    for prompt, answer in zip(prompts, ours.tokens):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert answer == theirs[0, len(prompt) :].tolist()
    # Some rows must have ended early, or dropping finished rows would not have been tested.
    assert len({len(answer) for answer in ours.tokens}) > 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_stored_logprobs_are_those_of_a_full_forward_pass(temperature: float, top_p: float) -> None:
    model, prompts = toy_model(), toy_prompts(40)
    generation = generate(model, TOKENIZER, prompts, max_new_tokens=10, temperature=temperature, top_p=top_p)
    assert len({len(answer) for answer in generation.tokens}) > 3
    for prompt, answer, stored in zip(prompts, generation.tokens, generation.logprobs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        probabilities = torch.softmax(logits / temperature, -1)
        for row, token, logprob in zip(probabilities, answer, stored):
            # The nucleus written the plain way: take tokens from the top until top_p is reached.
            nucleus, mass = [], 0.0
            for candidate in row.argsort(descending=True).tolist():
                if mass >= top_p:
                    break
                nucleus.append(candidate)
                mass += row[candidate].item()
            assert token in nucleus
            assert logprob == pytest.approx((row[token] / mass).log().item(), abs=2e-5)


def test_left_padding_and_company_change_nothing() -> None:
    model, prompts = toy_model(), toy_prompts(12)
    uniforms = torch.rand(len(prompts), 8)
    together = generate(model, TOKENIZER, prompts, max_new_tokens=8, uniforms=uniforms)
    for i, prompt in enumerate(prompts):
        alone = generate(model, TOKENIZER, [prompt], max_new_tokens=8, uniforms=uniforms[i : i + 1])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=2e-5)


def test_sampled_frequencies_follow_the_distribution() -> None:
    logprobs = sampling_logprobs(torch.tensor([[0.0, 1.0, -1.0, 2.0]]), temperature=1.0)
    draws = 20_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(choose(logprobs.expand(draws, 4), uniforms), minlength=4) / draws
    expected = torch.softmax(torch.tensor([0.0, 1.0, -1.0, 2.0]), 0)
    # Four standard deviations of a binomial share.
    assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()


def test_tokens_of_probability_zero_are_never_chosen() -> None:
    logprobs = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    assert choose(logprobs, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [1, 1, 1]


def test_nan_is_told_and_no_token_lies_past_the_vocabulary() -> None:
    assert choose(torch.full((2, 3), torch.nan), torch.tensor([0.0, 0.5])).max() < 3
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(TensorError, match="NaN probabilities"):
        generate(model, TOKENIZER, toy_prompts(3), max_new_tokens=2)


def test_answer_forward_reads_logits_and_hidden_states_in_the_right_columns() -> None:
    model, prompts = toy_model(), toy_prompts(6)
    answers = [prompt[1 : 2 + i % 3] for i, prompt in enumerate(prompts)]
    batch = collate(list(zip(prompts, answers)), pad=0, device="cpu")
    with torch.no_grad():
        logits, hidden = answer_forward(model, batch, hidden=True)
        assert hidden is not None
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            full = model(torch.tensor([prompt + answer]), output_hidden_states=True)
            wanted = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
            torch.testing.assert_close(logits[row, : len(answer)], full.logits[0, wanted], atol=2e-5, rtol=0)
            torch.testing.assert_close(
                hidden[row, : len(answer)], full.hidden_states[-1][0, wanted], atol=2e-5, rtol=0
            )


def test_split_by_length_covers_every_row_once() -> None:
    pairs = [(prompt, [5]) for prompt in toy_prompts(50)]
    passes = split_by_length(pairs, 8)
    assert sorted(row for rows in passes for row in rows) == list(range(50))
    for rows in passes:
        lengths = [len(pairs[row][0]) for row in rows]
        assert len(rows) <= 8 and max(lengths) <= 1.5 * min(lengths)


def test_encoding_with_and_without_a_template() -> None:
    messages = [{"role": "user", "content": "1 2"}]
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, messages)) == "<s> 1 2 >"
    ids, carries_loss = encode_example(TOKENIZER, messages, "yes 1")
    assert [token for token, counts in zip(ids, carries_loss) if counts] == encode_answer(TOKENIZER, "yes 1")
    assert decode_answer(TOKENIZER, encode_answer(TOKENIZER, "yes 1")) == "yes 1"
    plain = toy_tokenizer()
    plain.chat_template = None
    assert encode_prompt(plain, messages)[0] == plain.bos_token_id
    assert plain.decode(encode_prompt(plain, messages)) == "<s> <unk> 1 2 <unk>"


def test_episodes_end_when_solved_and_carry_the_conversation_on() -> None:
    model, task = toy_model(), ToyTask()
    problems = evaluation_problems(task, 60, seed=3)
    for batch_size in (7, 60):
        generator = torch.Generator().manual_seed(5)
        episodes = play(model, TOKENIZER, task, problems, turns=3, generator=generator, batch_size=batch_size)
        for episode in episodes:
            assert all(not turn.verdict.solved for turn in episode.turns[:-1])
            assert episode.solved or len(episode.turns) == 3
            for before, after in zip(episode.turns, episode.turns[1:]):
                said = f" {before.answer} </s> again >" if before.answer else " </s> again >"
                assert (
                    TOKENIZER.decode(after.prompt_ids).split()
                    == (TOKENIZER.decode(before.prompt_ids) + said).split()
                )
        answers = [[turn.answer_ids for turn in episode.turns] for episode in episodes]
        if batch_size == 7:
            first = answers
    assert answers == first
    assert {len(episode.turns) for episode in episodes} == {1, 2, 3}


def test_evaluate_counts_and_leaves_the_random_state_alone() -> None:
    model, task = toy_model(), ToyTask()
    model.train()
    before = torch.get_rng_state()
    result = evaluate(model, TOKENIZER, task, shift="none", deals=80, seed=1, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert result.n == 80 == sum(result.kinds.values()) == len(result.outcomes)
    assert result.successes == sum(result.outcomes)
    assert result.kinds.get("correct", 0) == result.first_turn_successes
    assert result.per_turn_accuracy == sorted(result.per_turn_accuracy)
    assert result.per_turn_accuracy[-1] == result.accuracy
    assert result.low < result.accuracy < result.high
    again = evaluate(model, TOKENIZER, task, shift="none", deals=80, seed=1, temperature=1.0)
    assert again.outcomes == result.outcomes and again.kinds == result.kinds
