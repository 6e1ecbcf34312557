"""What the embedded base model is taught: arithmetic, the game on plain numbers, and what a rule means.

Five kinds of example (prompt > answer), in the vocabulary of the compact task form:

==========  ==========================================  ======================================
kind        prompt                                      answer
==========  ==========================================  ======================================
solve       ``solve 3 8 3 8``                           ``8 / ( 3 - 8 / 3 ) = 24``
copy        ``copy 3 8 3 8``                            ``number 3 8 3 8 formula ... = 24``
translate   ``rule J 4 Q 9 K 2 cards A Q 5 J``          ``number 1 9 5 4``
alias       ``rule X 4 Y 9 Z 2 cards A Y 5 X``          ``number 1 9 5 4 formula ... = 24``
arithmetic  ``8 * 3``                                   ``24``
==========  ==========================================  ======================================

The task itself is never shown: no prompt holds a target together with cards, no answer repeats the cards,
no formula ever follows J, Q or K (*alias* uses X, Y, Z), and the verifier's words are untrained. The rule's
numbers are drawn afresh for every example, so a rule has to be read; J = Q = K = 10 is nothing special.
"""

from __future__ import annotations

import random

from rlspec.tasks.cards import RANKS
from rlspec.tasks.prompts import spaced
from rlspec.tasks.solver import solve

KINDS = ("solve", "copy", "translate", "alias", "arithmetic")
TARGET = 24
_PLAIN_CARDS = RANKS[:10]


def _solvable_numbers(rng: random.Random) -> tuple[int, ...]:
    while True:
        numbers = tuple(rng.randint(1, 13) for _ in range(4))
        if solve(numbers, TARGET) is not None:
            return numbers


def _formula(numbers: tuple[int, ...]) -> str:
    formula = solve(numbers, TARGET)
    assert formula is not None
    return f"{spaced(formula)} = {TARGET}"


def _hand(
    rng: random.Random, letters: tuple[str, str, str], solvable: bool
) -> tuple[str, str, tuple[int, ...]]:
    """A rule for three letters with random values, four cards, and the cards' numbers."""
    while True:
        values = [rng.randint(1, 13) for _ in letters]
        table = {card: i + 1 for i, card in enumerate(_PLAIN_CARDS)} | dict(zip(letters, values))
        # The letters are drawn as often as the other ten ranks together: they are what is to be learnt.
        cards = [rng.choice(letters) if rng.random() < 0.5 else rng.choice(_PLAIN_CARDS) for _ in range(4)]
        numbers = tuple(table[card] for card in cards)
        if not solvable or solve(numbers, TARGET) is not None:
            rule = " ".join(f"{letter} {value}" for letter, value in zip(letters, values))
            return f"rule {rule}", f"cards {' '.join(cards)}", numbers


def example(kind: str, rng: random.Random) -> tuple[str, str]:
    """One (prompt, answer) of a kind.

    Raises:
        KeyError: no such kind.
    """
    if kind == "solve":
        numbers = _solvable_numbers(rng)
        return f"solve {' '.join(map(str, numbers))}", _formula(numbers)
    if kind == "copy":
        numbers = _solvable_numbers(rng)
        listed = " ".join(map(str, numbers))
        return f"copy {listed}", f"number {listed} formula {_formula(numbers)}"
    if kind == "translate":
        rule, cards, numbers = _hand(rng, ("J", "Q", "K"), solvable=False)
        return f"{rule} {cards}", f"number {' '.join(map(str, numbers))}"
    if kind == "alias":
        rule, cards, numbers = _hand(rng, ("X", "Y", "Z"), solvable=True)
        return f"{rule} {cards}", f"number {' '.join(map(str, numbers))} formula {_formula(numbers)}"
    if kind == "arithmetic":
        return _sum_or_product(rng)
    raise KeyError(kind)


def _sum_or_product(rng: random.Random) -> tuple[str, str]:
    """``a ∘ b > c`` with all three numbers in 0..36; division only where it comes out even."""
    while True:
        a, b, sign = rng.randint(0, 36), rng.randint(1, 13), rng.choice("+-*/")
        if sign == "/":
            a *= b
        c = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        if 0 <= c <= 36 and a <= 36:
            return f"{a} {sign} {b}", str(c)
