"""How a deal is put into words: English for chat models, a compact token form for the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlspec.tasks.cards import Deal


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """One style of the task's texts.

    Attributes:
        question: the first user turn.
        answer: an answer that carries the given formula.
        verdicts: the verifier's message per verdict, with ``{target}``.
        max_answer_tokens: an answer's tokens at most.
    """

    question: Callable[[Deal], str]
    answer: Callable[[Deal, str], str]
    verdicts: Mapping[str, str]
    max_answer_tokens: int


def _chat_question(problem: Deal) -> str:
    rule = problem.rule
    cards = ", ".join(f"'{card}'" for card in problem.cards)
    if rule.jack == rule.queen == rule.king:
        faces = f"'J', 'Q' and 'K' each count as {rule.jack}"
    else:
        faces = f"'J' counts as {rule.jack}, 'Q' as {rule.queen} and 'K' as {rule.king}"
    return (
        "You are playing a card game. You are dealt four cards. Write an equation that uses the number of "
        f"each card exactly once and equals {problem.target}. You may use +, -, *, / and parentheses.\n"
        f"'A' counts as 1, number cards count as their number, and {faces}.\n"
        f"Cards: [{cards}]\n"
        "Answer in JSON with exactly these fields:\n"
        '{"cards": [the four cards], "number": [the four numbers under the rule], '
        f'"formula": "an equation that equals {problem.target}"}}'
    )


def _chat_answer(problem: Deal, formula: str) -> str:
    return json.dumps(
        {
            "cards": list(problem.cards),
            "number": list(problem.numbers),
            "formula": f"{formula}={problem.target}",
        }
    )


def spaced(formula: str) -> str:
    """The formula with one space between symbols: one token each for the embedded model's tokenizer."""
    return " ".join(re.findall(r"\d+|\S", formula))


def _compact_question(problem: Deal) -> str:
    rule = problem.rule
    stated = f"rule J {rule.jack} Q {rule.queen} K {rule.king}"
    return f"{stated} target {problem.target} cards {' '.join(problem.cards)}"


def _compact_answer(problem: Deal, formula: str) -> str:
    cards, numbers = " ".join(problem.cards), " ".join(map(str, problem.numbers))
    return f"cards {cards} number {numbers} formula {spaced(formula)} = {problem.target}"


STYLES: dict[str, Prompts] = {
    "chat": Prompts(
        question=_chat_question,
        answer=_chat_answer,
        verdicts={
            "partial": "Not all numbers are used yet. Write the whole equation.",
            "wrong_value": "Right numbers, but your formula does not equal {target}. Try again.",
            "wrong_numbers": "Use the number of each card exactly once, as the rule says. Try again.",
            "illegal_formula": "No legal formula was found. Answer in the JSON format asked for.",
        },
        max_answer_tokens=192,
    ),
    "compact": Prompts(
        question=_compact_question,
        answer=_compact_answer,
        verdicts={
            "partial": "unfinished",
            "wrong_value": "wrong value",
            "wrong_numbers": "wrong numbers",
            "illegal_formula": "illegal formula",
        },
        max_answer_tokens=32,
    ),
}
