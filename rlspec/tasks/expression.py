"""Arithmetic formulas, parsed and evaluated over exact fractions.

Grammar (white space is ignored between symbols)::

    formula := sum [ "=" integer ]
    sum     := product { ("+" | "-") product }
    product := atom { ("*" | "/") atom }
    atom    := integer | "(" sum ")"

There is no unary minus: the game offers four binary operations and the cards' numbers. Model output goes
through this parser and never through ``eval``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TOKEN = re.compile(r"\s*(?:(\d+)|([-+*/()=]))")
#: What people and models write for the four operations, brought to ASCII.
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
MAX_LENGTH = 512
MAX_DEPTH = 64


class ExpressionError(ValueError):
    """The text is not a formula; the message says what was found and where (0-based column)."""


@dataclass(frozen=True)
class Expression:
    """A parsed formula.

    Attributes:
        value: the exact value, or None where the formula divides by zero.
        numbers: every integer written left of ``=``, in reading order.
        claimed: the integer written right of ``=``, or None. It is never used for scoring.
    """

    value: Fraction | None
    numbers: tuple[int, ...]
    claimed: int | None


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, int]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                column = position + len(text[position:]) - len(text[position:].lstrip())
                raise ExpressionError(f"unexpected {text[column]!r} at column {column}")
            self.tokens.append((match.group(1) or match.group(2), match.end()))
            position = match.end()
        self.next = 0
        self.depth = 0
        self.numbers: list[int] = []

    def peek(self) -> str | None:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise ExpressionError("the formula ends too early")
        self.next += 1
        return token

    def fail(self, wanted: str) -> ExpressionError:
        token = self.peek()
        if token is None:
            return ExpressionError(f"the formula ends where {wanted} is wanted")
        return ExpressionError(
            f"{token!r} at column {self.tokens[self.next][1] - len(token)}, wanted {wanted}"
        )

    def sum(self) -> Fraction | None:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            right = self.product()
            if right is None:
                value = None
            elif value is not None:
                value = value + right if sign == "+" else value - right
        return value

    def product(self) -> Fraction | None:
        value = self.atom()
        while self.peek() in ("*", "/"):
            sign = self.take()
            right = self.atom()
            if value is None or right is None or (sign == "/" and right == 0):
                value = None
            else:
                value = value * right if sign == "*" else value / right
        return value

    def atom(self) -> Fraction | None:
        token = self.peek()
        if token == "(":
            self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ExpressionError(f"more than {MAX_DEPTH} nested parentheses")
            value = self.sum()
            if self.peek() != ")":
                raise self.fail("')'")
            self.take()
            self.depth -= 1
            return value
        if token is None or not token.isdigit():
            raise self.fail("a number or '('")
        self.take()
        self.numbers.append(int(token))
        return Fraction(int(token))


def parse_expression(text: str) -> Expression:
    """Parse ``text`` as a formula and evaluate it exactly.

    Raises:
        ExpressionError: the text is empty, longer than 512 characters, nested deeper than 64, or no formula.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters, at most {MAX_LENGTH} are read")
    parser = _Parser(text.translate(_SPELLINGS))
    if not parser.tokens:
        raise ExpressionError("the formula is empty")
    value = parser.sum()
    claimed = None
    if parser.peek() == "=":
        parser.take()
        token = parser.peek()
        if token is None or not token.isdigit():
            raise parser.fail("an integer after '='")
        claimed = int(parser.take())
    if parser.peek() is not None:
        raise parser.fail("an operator or the end")
    return Expression(value, tuple(parser.numbers), claimed)
