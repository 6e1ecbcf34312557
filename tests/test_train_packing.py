"""Traces, packed rows and kept conversations against one plain forward pass of each sequence alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from train_toys import ToyTask, family_model, toy_model, toy_prompts, toy_tokenizer

from rlspec.tasks.base import evaluation_problems
from rlspec.train import Callback, PPOConfig, StepState, packing, train_ppo
from rlspec.train import generate as generate_module
from rlspec.train.batch import counted_tokens, left_pad
from rlspec.train.cache import Reader
from rlspec.train.forward import answer_logits, answer_tokens, forward_passes
from rlspec.train.memory import Memory
from rlspec.train.packing import can_pack, common_prefix, pack
from rlspec.train.padding import goes_on
from rlspec.train.ppo import mini_batches
from rlspec.train.rollout import play
from rlspec.train.traces import Trace, conversation, single

TOKENIZER = toy_tokenizer()


def conversations(count: int, seed: int = 0, start: int = 3) -> list[Trace]:
    """Traces of 1 to 4 answers whose first tokens are the same."""
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(4, 18) for _ in range(rng.randint(least, most))]

    traces = []
    for _ in range(count):
        trace = single([*range(4, 4 + start), *ids(1, 4)], ids(1, 6))
        for _ in range(rng.randint(0, 3)):
            (trace,) = conversation([trace.pair, (trace.ids + ids(1, 3), ids(1, 6))])[-1:]
        traces.append(trace)
    return traces


def alone(model: Any, traces: list[Trace]) -> torch.Tensor:
    """float32 (S, V): each trace by itself, in one plain forward pass."""
    with torch.no_grad():
        full = [model(torch.tensor([trace.ids]), use_cache=False).logits[0] for trace in traces]
    return torch.cat([logits[a - 1 : b - 1] for logits, trace in zip(full, traces) for a, b in trace.answers])


def test_a_conversation_is_one_trace_as_long_as_prompts_go_on() -> None:
    turns = [([1, 2], [3]), ([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4, 5, 7], [8])]
    assert conversation(turns) == [
        Trace([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)]),
        Trace([1, 2, 3, 4, 5, 7, 8], [(6, 7)]),
    ]
    assert conversation(turns[:1]) == [single([1, 2], [3])]
    assert single([1, 2], [3]).pair == ([1, 2], [3])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_and_states_are_those_of_each_trace_alone(attention: str) -> None:
    model = toy_model(attn_implementation=attention)
    traces = conversations(24)
    # A group of answers to one question, one of them twice.
    traces += [single(traces[0].pair[0], answer) for answer in ([7], [7, 8], [9, 8], [9, 8])]
    assert can_pack(model, 0, max(len(trace.ids) for trace in traces))
    with torch.no_grad(), counted_tokens(model) as counts:
        logits, states = answer_logits(model, traces, 0, hidden=True)
        assert states is not None
        torch.testing.assert_close(logits, alone(model, traces), atol=2e-5, rtol=0)
        torch.testing.assert_close(model.get_output_embeddings()(states), logits, atol=2e-5, rtol=0)
    assert counts[0] < sum(len(trace.ids) for trace in traces)
    targets = [token for trace in traces for a, b in trace.answers for token in trace.ids[a:b]]
    assert answer_tokens(traces, "cpu").tolist() == targets


def test_gradients_of_packed_rows_are_those_of_each_trace_alone() -> None:
    traces, grads = conversations(9), []
    for packed in (True, False):
        model = toy_model()
        parts = [traces] if packed else [[trace] for trace in traces]
        for part in parts:
            logits, _ = answer_logits(model, part, 0)
            logits.log_softmax(-1).gather(1, answer_tokens(part, "cpu")[:, None]).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen3_5_text", "bloom", "opt", "gpt2", "gemma2"])
def test_other_families_get_the_same_logits_packed_or_not(name: str) -> None:
    changes: dict[str, Any] = {"mistral": {"sliding_window": 4}, "gemma2": {"sliding_window": 4}}.get(
        name, {}
    )
    model, traces = family_model(name, **changes), conversations(10)
    with torch.no_grad():
        logits, states = answer_logits(model, traces, 0, hidden=True)
    torch.testing.assert_close(logits, alone(model, traces), atol=5e-5, rtol=1e-4)
    assert states is not None and states.shape == (len(logits), 32)


def test_windows_and_layers_that_see_their_neighbours_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 12
    assert can_pack(toy_model(), 0, longest) and can_pack(family_model("gpt2"), 0, longest)
    assert can_pack(family_model("mistral", sliding_window=12), 0, longest)
    assert not can_pack(family_model("mistral", sliding_window=11), 0, longest)
    assert can_pack(family_model("qwen2", max_window_layers=2), 0, longest)  # layers, not tokens
    assert not can_pack(family_model("bloom"), 0, longest)  # distances between columns, not positions
    lfm = family_model("lfm2", layer_types=["conv", "full_attention"], block_ff_dim=48)
    assert not can_pack(lfm, 0, longest)
    # Packed all the same, its answers would be others.
    traces = conversations(8)
    monkeypatch.setattr(packing, "_measure", lambda model, pad: True)
    with torch.no_grad():
        logits, _ = packing.packed_forward(lfm, traces, 0)
    assert (logits - alone(lfm, traces)).abs().max() > 1e-2


def test_packing_holds_every_token_and_little_padding() -> None:
    for count in (1, 5, 16, 64):
        traces = conversations(count, seed=count, start=8)
        packed = pack(traces, pad=0)
        path = [
            packed.ids[row, : column + 1][packed.mask[row, 0, column, : column + 1]].tolist()
            for row, column in zip(packed.rows.tolist(), packed.columns.tolist())
        ]
        assert path == [trace.ids[:p] for trace in traces for a, b in trace.answers for p in range(a, b)]
        distinct = sum(len(trace.ids) for trace in traces)
        assert packed.ids.numel() <= (1.05 * distinct if count > 1 else distinct)


def test_common_prefix() -> None:
    assert [common_prefix(a, b) for a, b in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 3, 3]))] == [
        0,
        2,
        1,
    ]


def test_passes_cover_every_trace_once() -> None:
    traces = conversations(30)
    for model in (toy_model(), family_model("bloom")):
        passes = forward_passes(model, traces, 8, 0)
        assert sorted(i for part in passes for i in part) == list(range(30))
        assert max(map(len, passes)) <= 8


def test_mini_batches_hold_every_trace_once_and_about_as_many_turns() -> None:
    traces = conversations(60)
    turns = [len(trace.answers) for trace in traces]
    batches = mini_batches(traces, sum(turns) // 4, torch.Generator().manual_seed(1))
    assert len(batches) == 4 and sorted(i for batch in batches for i in batch) == list(range(60))
    sizes = [sum(turns[i] for i in batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 2 * max(turns)
    assert mini_batches(traces[:1], 1, torch.Generator()) == [[0]]


def test_recalled_columns_are_those_of_a_batch_read_whole() -> None:
    model, prompts = toy_model(), toy_prompts(5)
    grown = [prompt + [5, 6, 7][: 1 + n % 3] for n, prompt in enumerate(prompts)]
    grown[2][-2] = 9  # not what was read
    with torch.no_grad():
        memory = Memory()
        # Kept from two batches, with columns behind that belong to no one.
        for rows in ([0, 3], [1, 2, 4]):
            ids, mask = left_pad([prompts[n] + [5, 8] for n in rows], 0)
            reader = Reader(model, mask)
            reader.logits(ids)
            layers = reader.layers()
            assert layers is not None
            for row, n in enumerate(rows):
                first = ids.shape[1] - len(prompts[n]) - 2
                memory.keep(n, layers, row, first, prompts[n] + [5, 8])
        ids, mask = left_pad(grown, 0)
        cache = memory.recall(range(5), grown)
        assert cache is not None
        reader = Reader(model, mask, cache)
        assert 0 < reader.end < ids.shape[1]
        found = reader.logits(ids[:, reader.end :])
        wanted = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in grown])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert memory.recall(range(5), grown) is None  # forgotten


def test_play_reads_no_token_of_a_conversation_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = toy_model(), ToyTask()
    problems = evaluation_problems(task, 40, seed=3)
    assert goes_on(model, 0)
    found = []
    for remembers in (True, False):
        if not remembers:
            monkeypatch.setattr(generate_module, "goes_on", lambda model, pad: False)
        with counted_tokens(model) as counts:
            generator = torch.Generator().manual_seed(5)
            episodes = play(model, TOKENIZER, task, problems, turns=3, generator=generator, states=2)
        found.append((sum(counts), [turn for episode in episodes for turn in episode.turns]))
    (few, with_memory), (many, without) = found
    assert few < 0.7 * many
    assert [turn.answer_ids for turn in with_memory] == [turn.answer_ids for turn in without]
    for turn, other in zip(with_memory, without):
        assert turn.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        torch.testing.assert_close(turn.states, other.states, atol=5e-5, rtol=1e-4)
        where = slice(len(turn.prompt_ids) - 1, len(turn.prompt_ids) - 1 + len(turn.states))
        with torch.no_grad():
            ids = torch.tensor([turn.prompt_ids + turn.answer_ids])
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, where]
        torch.testing.assert_close(turn.states, hidden, atol=5e-5, rtol=1e-4)


def test_an_update_forwards_hardly_more_tokens_than_its_conversations_hold() -> None:
    logs: list[dict[str, float]] = []

    class Logs(Callback):
        def on_step(self, state: StepState) -> None:
            logs.append(state.logs)

    config = PPOConfig(updates=1, turns_per_update=200, mini_batch_size=50)
    train_ppo(toy_model(), TOKENIZER, ToyTask(), config, callbacks=[Logs()])
    assert 0 < logs[0]["tokens_forwarded_ratio"] <= 1.05
