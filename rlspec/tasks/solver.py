"""Exact solver of the four-numbers game.

Values are rationals held as (numerator, denominator) pairs of ints, which is several times faster than
:class:`fractions.Fraction` and just as exact. Every way to combine the numbers with + - * / is tried: two
values are taken out, their combination is put back, until one value is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from math import gcd

_SUM, _PRODUCT, _ATOM = 1, 2, 3
#: (numerator, denominator, text, precedence of the outermost operation)
_Term = tuple[int, int, str, int]


def _wrap(term: _Term, least: int) -> str:
    return term[2] if term[3] >= least else f"({term[2]})"


def _combinations(a: _Term, b: _Term) -> Iterator[_Term]:
    """All values of ``a ∘ b`` and, for - and /, ``b ∘ a``; texts with no needless parentheses."""
    (p, q, _, _), (r, s, _, _) = a, b
    yield p * s + r * q, q * s, f"{a[2]}+{b[2]}", _SUM
    yield p * r, q * s, f"{_wrap(a, _PRODUCT)}*{_wrap(b, _PRODUCT)}", _PRODUCT
    yield p * s - r * q, q * s, f"{a[2]}-{_wrap(b, _PRODUCT)}", _SUM
    yield r * q - p * s, q * s, f"{b[2]}-{_wrap(a, _PRODUCT)}", _SUM
    if r:
        yield p * s, q * r, f"{_wrap(a, _PRODUCT)}/{_wrap(b, _ATOM)}", _PRODUCT
    if p:
        yield r * q, p * s, f"{_wrap(b, _PRODUCT)}/{_wrap(a, _ATOM)}", _PRODUCT


def _reduced(term: _Term) -> _Term:
    p, q, text, precedence = term
    if q < 0:
        p, q = -p, -q
    d = gcd(p, q)
    return p // d, q // d, text, precedence


def _search(terms: tuple[_Term, ...], target: Fraction, dead: set[tuple[tuple[int, int], ...]]) -> str | None:
    if len(terms) == 1:
        p, q, text, _ = terms[0]
        return text if p == target.numerator * q and target.denominator == 1 else None
    key = tuple(sorted(t[:2] for t in terms))
    if key in dead:
        return None
    for i in range(len(terms)):
        for j in range(i + 1, len(terms)):
            rest = terms[:i] + terms[i + 1 : j] + terms[j + 1 :]
            for made in _combinations(terms[i], terms[j]):
                found = _search((*rest, _reduced(made)), target, dead)
                if found is not None:
                    return found
    dead.add(key)
    return None


@cache
def _solve_sorted(numbers: tuple[int, ...], target: int) -> str | None:
    # Largest first: the formulas found then start from the large cards, as people write them.
    terms: tuple[_Term, ...] = tuple((n, 1, str(n), _ATOM) for n in sorted(numbers, reverse=True))
    return _search(terms, Fraction(target), set())


def solve(numbers: Sequence[int], target: int = 24) -> str | None:
    """A formula that uses each of ``numbers`` once and equals ``target``, or None if there is none.

    The answer depends on the multiset of numbers alone, not on their order, and is the same in every process.
    """
    return _solve_sorted(tuple(sorted(numbers)), target)


def can_finish(value: Fraction, rest: Sequence[int], target: int = 24) -> bool:
    """Whether ``value`` and the unused numbers ``rest`` can still be combined to ``target``."""
    terms: tuple[_Term, ...] = ((value.numerator, value.denominator, "v", _ATOM),) + tuple(
        (n, 1, str(n), _ATOM) for n in rest
    )
    return _search(terms, Fraction(target), set()) is not None
