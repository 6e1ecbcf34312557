"""Reading a model's answer: the fields ``cards``, ``number`` and ``formula`` out of free text.

Two spellings are read: the JSON-like one that chat models are asked for (surrounding prose, single quotes,
trailing commas and a missing last brace are forgiven: models are judged on the game, not on JSON), and the
compact one of the embedded model, ``cards A 5 J 3 number 1 5 10 3 formula ( 5 - 3 ) * ... = 24``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FIELD = r"""["']?\b{name}s?["']?\s*:\s*"""
_LIST = r"\[([^\[\]]*)\]"
_JSON_NUMBERS = re.compile(_FIELD.format(name="number") + _LIST, re.IGNORECASE)
_JSON_CARDS = re.compile(_FIELD.format(name="card") + _LIST, re.IGNORECASE)
_JSON_FORMULA = re.compile(
    _FIELD.format(name="formula") + r"""(?:"([^"\n]*)"?|'([^'\n]*)'?|([^,}\n]*))""", re.IGNORECASE
)
_COMPACT = re.compile(
    r"^(?:\s*cards\s+(?P<cards>[^:]*?))?\s*number\s+(?P<number>[\d\s]*?)\s*formula\s+(?P<formula>[^\n]*)$"
)
MAX_ANSWER_CHARACTERS = 20_000


@dataclass(frozen=True)
class Answer:
    """Fields found in an answer; None where a field is missing or unreadable."""

    cards: tuple[str, ...] | None
    numbers: tuple[int, ...] | None
    formula: str | None


def _items(text: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip().strip("\"'") for part in text.split(",")) if item)


def _integers(items: tuple[str, ...]) -> tuple[int, ...] | None:
    # isascii: "²".isdigit() holds, int("²") does not.
    if all(item.isascii() and item.isdigit() and len(item) <= 6 for item in items):
        return tuple(int(item) for item in items)
    return None


def read_answer(text: str) -> Answer:
    """Read the last answer in ``text``; fields that are not there come back as None, nothing is raised."""
    text = text[-MAX_ANSWER_CHARACTERS:]
    compact = _COMPACT.match(text.strip())
    if compact:
        cards = compact["cards"]
        return Answer(
            tuple(cards.split()) if cards else None,
            _integers(tuple(compact["number"].split())),
            compact["formula"],
        )
    # A model that thinks aloud may write drafts first: the last of each field counts.
    formulas = _JSON_FORMULA.findall(text)
    numbers = _JSON_NUMBERS.findall(text)
    cards_found = _JSON_CARDS.findall(text)
    return Answer(
        _items(cards_found[-1]) if cards_found else None,
        _integers(_items(numbers[-1])) if numbers else None,
        next((part for part in formulas[-1] if part), "") if formulas else None,
    )
