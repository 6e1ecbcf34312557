"""Scores by an evaluation of the user's: a command, or a function."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError, RlspecError
from rlspec.tasks.commands import check_command, last_json, run, words_for
from rlspec.tasks.scores import Score, read_scores

MARKER = "{checkpoint}"

#: a function from a checkpoint's path to named scores, or a command in which ``{checkpoint}`` stands for that path
Evaluate = str | Callable[[Path], Mapping[str, Any]]


class Evaluation:
    """An evaluation of checkpoints on disk. The base is not given to it.

    Args:
        evaluate: run without a shell where it is a command; the last JSON object of its standard output holds the scores.

    Raises:
        OptionError: a command without ``{checkpoint}``, or something else than a command or a function.
    """

    base_too = False
    names = None  #: which scores it gives is known once it has

    def __init__(self, evaluate: Evaluate) -> None:
        if isinstance(evaluate, str):
            check_command(evaluate, MARKER, "evaluate")
            self.by, self.lasting = evaluate, True
        elif callable(evaluate):
            named = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
            self.by = f"{named.__module__}.{named.__qualname__}"
            # Others of that name may be about: lambdas, partial functions, methods of several objects.
            self.lasting = inspect.isfunction(evaluate) and evaluate.__name__ != "<lambda>"
        else:
            raise OptionError(
                f"evaluate={evaluate!r}: neither a command nor a function of a checkpoint's path"
            )
        self._evaluate = evaluate

    def check(self, place: Path) -> None:
        """It may read what nothing else does."""

    def scores(self, place: Path, of_base: Mapping[str, Score]) -> dict[str, Score]:
        """The scores of a checkpoint.

        Raises:
            OptionError: it cannot be run, fails, or gives no scores; the message names it.
        """
        if isinstance(self._evaluate, str):
            return run_command(self._evaluate, place)
        told = f"evaluate: {self.by}({str(place)!r})"
        try:
            given = self._evaluate(place)
        except RlspecError:
            raise
        except Exception as error:
            raise OptionError(f"{told}: raised {type(error).__name__}: {error}") from error
        return read_scores(given, told)


def run_command(command: str, checkpoint: Path) -> dict[str, Score]:
    """The scores that a command prints for a checkpoint.

    Raises:
        OptionError: it cannot be run, fails, or prints no scores; the message names it.
    """
    words = words_for(command, MARKER, checkpoint)
    told = f"evaluate: {shlex.join(words)}"
    done = run(words, told, quiet=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise OptionError(f"{told}: ended with code {done.returncode}: {last}")
    try:
        given = last_json(done.stdout)
    except LookupError:
        raise OptionError(
            f'{told}: printed no line of JSON that is an object, wanted one such as {{"ood": 0.5}}'
        ) from None
    return read_scores(given, told)
