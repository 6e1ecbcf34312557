"""Named scores of a model, as an evaluation of the user's hands them over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlspec.errors import OptionError


@dataclass(frozen=True)
class Score:
    """One score at one step.

    Attributes:
        value: the score; the mean of ``results`` where those are there.
        n: how many problems or texts it is over; None where that is not known.
        results: one number per problem or text, always in the same order; 0 and 1 are failures and successes.
    """

    value: float
    n: int | None = None
    results: tuple[float, ...] | None = None

    @property
    def counts(self) -> bool:
        """Whether every result is a failure or a success."""
        return self.results is not None and all(result in (0.0, 1.0) for result in self.results)


def lower_is_better(name: str) -> bool:
    """Whether a score is one to keep low: its name ends in ``loss``, ``perplexity``, ``nll`` or ``forgetting``, or begins
    with ``kl_``."""
    lower = name.lower()
    return lower.endswith(("loss", "perplexity", "nll", "forgetting")) or lower.startswith("kl_")


def read_scores(given: object, where: str) -> dict[str, Score]:
    """Scores from what an evaluation returned.

    Args:
        given: name -> a number; or a list of numbers, one per problem (True and False for solved or not) or text, an
            array or a tensor too; or ``{"value": 0.5, "n": 234}``.
        where: what messages call the evaluation.

    Raises:
        OptionError: it is something else, is empty, or holds NaN or infinity.
    """
    if not isinstance(given, Mapping) or not given:
        raise OptionError(f"{where}: gave {type(given).__name__}, wanted named scores such as {{'ood': 0.5}}")
    return {str(name): _score(value, f"{where}: score {name!r}") for name, value in given.items()}


def _score(given: Any, what: str) -> Score:
    if isinstance(given, Mapping):
        n = given.get("n")
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise OptionError(f"{what} has n={n!r}, wanted a whole number, at least 1")
        return Score(_number(given.get("value"), what), n)
    if getattr(given, "ndim", None) == 1:  # of numpy or torch
        given = given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        results = tuple(_number(value, what) for value in given)
        if not results:
            raise OptionError(f"{what} is an empty list")
        return Score(math.fsum(results) / len(results), len(results), results)
    return Score(_number(given, what))


def _number(given: Any, what: str) -> float:
    try:
        value = float("nan") if isinstance(given, str) else float(given)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not math.isfinite(value):
        raise OptionError(f"{what} is {given!r}, wanted a finite number")
    return value
