"""The formula parser against Fraction arithmetic and against what people write."""

from __future__ import annotations

import ast
import random
from fractions import Fraction

import pytest

from rlspec.tasks import ExpressionError, parse_expression


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("8/(3-8/3)", Fraction(24), (8, 3, 8, 3)),
        ("8 / ( 3 - 8 / 3 ) = 24", Fraction(24), (8, 3, 8, 3)),
        ("  1+2*3 ", Fraction(7), (1, 2, 3)),
        ("10-4-3", Fraction(3), (10, 4, 3)),
        ("12/3/2", Fraction(2), (12, 3, 2)),
        ("((((7))))", Fraction(7), (7,)),
        ("2×(9−3)÷4", Fraction(3), (2, 9, 3, 4)),
        ("1/(5-5)", None, (1, 5, 5)),
        ("0*(1/0)", None, (0, 1, 0)),
    ],
)
def test_values_are_exact(text: str, value: Fraction | None, numbers: tuple[int, ...]) -> None:
    parsed = parse_expression(text)
    assert (parsed.value, parsed.numbers) == (value, numbers)


def test_claim_is_read_but_never_believed() -> None:
    parsed = parse_expression("1+1=24")
    assert parsed.claimed == 24
    assert parsed.value == 2


@pytest.mark.parametrize(
    "text",
    ["", "   ", "1+", "*3", "(1+2", "1+2)", "1 2", "-3+4", "2**3", "2//3", "1.5+2", "a+1", "1=2=3", "1+1=",
     "=24", "__import__('os')", "1" * 600, "(" * 100 + "1" + ")" * 100, "²+1", "1e3", "()"],
)  # fmt: skip
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_expression(text)


def test_error_says_where() -> None:
    with pytest.raises(ExpressionError, match=r"'x' at column 4"):
        parse_expression("1 + x")


def _evaluate(node: ast.expr) -> Fraction:
    """Python's own grammar as the peer: same precedence, same associativity, evaluated over fractions."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left / right


def _random_formula(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return str(rng.randint(0, 13))
    space = " " * rng.randint(0, 2)
    left, right = _random_formula(rng, depth - 1), _random_formula(rng, depth - 1)
    inner = f"{left}{space}{rng.choice('+-*/')}{space}{right}"
    return f"({inner})" if rng.random() < 0.5 else inner


def test_random_formulas_agree_with_the_python_grammar() -> None:
    rng = random.Random(0)
    divided_by_zero = 0
    for _ in range(3000):
        text = _random_formula(rng, 4)
        try:
            expected: Fraction | None = _evaluate(ast.parse(text.strip(), mode="eval").body)
        except ZeroDivisionError:
            expected = None
            divided_by_zero += 1
        assert parse_expression(text).value == expected, text
    assert divided_by_zero > 20  # the branch was exercised
