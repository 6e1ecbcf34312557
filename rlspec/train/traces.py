"""Token ids with the answers in them: what the losses read, one trace a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Pair = tuple[list[int], list[int]]  # prompt ids, answer ids


@dataclass(frozen=True)
class Trace:
    """One sequence of token ids and where its answers stand, as (first, end) positions in order.

    Something stands before the first answer, and no answer is empty.
    """

    ids: list[int]
    answers: list[tuple[int, int]]

    @property
    def answer_tokens(self) -> int:
        return sum(end - first for first, end in self.answers)

    @property
    def pair(self) -> Pair:
        """The ids before the first answer, and the rest."""
        first = self.answers[0][0]
        return self.ids[:first], self.ids[first:]


def single(prompt: Sequence[int], answer: Sequence[int]) -> Trace:
    """The trace of one answer."""
    return Trace([*prompt, *answer], [(len(prompt), len(prompt) + len(answer))])


def conversation(turns: Iterable[Pair]) -> list[Trace]:
    """The turns of a conversation as few traces: a turn goes on with the last trace where its prompt starts
    with that trace's ids.

    A causal model gives every token of a shared prefix the same state in each turn, so one forward pass of the
    trace scores all its answers. Prompts come from the tokenizer, ids are never put in their place: where a
    sampled answer is not written back as it was sampled, the turn begins a trace of its own.
    """
    traces: list[Trace] = []
    for prompt, answer in turns:
        goes_on = bool(traces) and prompt[: len(traces[-1].ids)] == traces[-1].ids
        before = traces.pop().answers if goes_on else []
        traces.append(Trace([*prompt, *answer], [*before, (len(prompt), len(prompt) + len(answer))]))
    return traces
