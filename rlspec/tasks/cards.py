"""Cards, rules for the face cards, deals, and the four separable shifts of GeneralPoints."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlspec.tasks.solver import solve

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
FACES = ("J", "Q", "K")


@dataclass(frozen=True)
class Rule:
    """What J, Q and K count as; A counts as 1 and every other card as its number."""

    jack: int
    queen: int
    king: int

    def number(self, card: str) -> int:
        """The number of a card.

        Raises:
            KeyError: no such card.
        """
        return {**_PLAIN, "J": self.jack, "Q": self.queen, "K": self.king}[card]

    def numbers(self, cards: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.number(card) for card in cards)


_PLAIN = {rank: i + 1 for i, rank in enumerate(RANKS[:10])}
TEN_RULE = Rule(10, 10, 10)
ORDINAL_RULE = Rule(11, 12, 13)


@dataclass(frozen=True)
class Deal:
    """Four cards, the rule in force and the target."""

    cards: tuple[str, ...]
    rule: Rule
    target: int

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.rule.numbers(self.cards)

    @property
    def key(self) -> tuple[str, ...]:
        """The hand, order and rule aside: a hand kept for evaluation is never trained on, under any rule."""
        return tuple(sorted(self.cards, key=RANKS.index))


@dataclass(frozen=True)
class Shift:
    """One departure from the training distribution; the fields are independent of each other."""

    rule: Rule = TEN_RULE
    face_cards: bool = False
    other_target: bool = False


#: "both" is the paper's out-of-distribution set: it changes the rule and the distribution of cards at once.
SHIFTS: dict[str, Shift] = {
    "none": Shift(),
    "rule": Shift(rule=ORDINAL_RULE),
    "cards": Shift(face_cards=True),
    "both": Shift(rule=ORDINAL_RULE, face_cards=True),
    "target": Shift(other_target=True),
}


def deal(rng: random.Random, shift: Shift, target: int) -> Deal:
    """Four cards of ranks drawn uniformly, redrawn until the hand is in the shift's support and solvable."""
    while True:
        cards = tuple(rng.choice(RANKS) for _ in range(4))
        if shift.face_cards and not any(card in FACES for card in cards):
            continue
        if solve(shift.rule.numbers(cards), target) is not None:
            return Deal(cards, shift.rule, target)
