"""Falls of a score from its peak over the checkpoints of a series."""

from __future__ import annotations

from collections.abc import Sequence

from rlspec.errors import OptionError
from rlspec.io.jsonl import Row
from rlspec.jobs.series.result import BASE_LABEL
from rlspec.run.segments import training_of
from rlspec.tasks.alarm import Fall, standing_fall
from rlspec.tasks.scores import Score


def check_alarm(name: str, rows: Sequence[Row]) -> None:
    """Refuse a score that the rows of some checkpoint lack, or that no test tells from chance.

    Raises:
        OptionError: so it is.
    """
    found = [row for row in rows if row["score"] == name]
    if not found:
        names = dict.fromkeys(row["score"] for row in rows)
        raise OptionError(f"alarm={name!r}: no such score; there are {', '.join(names) or 'none'}")
    if all(row["n"] is None for row in found):
        raise OptionError(
            f"alarm={name!r}: a number for each checkpoint, which no test tells from chance; an alarm needs lists of one "
            "number per problem, or text_loss"
        )


def find_fall(rows: Sequence[Row], name: str) -> tuple[Fall, str] | None:
    """The first fall of a score from a peak not reached again, in the order of the rows, and that peak's checkpoint.

    Each training by itself: checkpoints whose labels differ by more than their step are of several. The base is of none.

    Raises:
        OptionError: no row has such a score, or its values are of a kind that no test tells from chance.
    """
    rows = [row for row in rows if row["checkpoint"] != BASE_LABEL]
    check_alarm(name, rows)
    rows = [row for row in rows if row["score"] == name]
    # Beside checkpoints with a step nobody knows when one without ("best") was; where none has one, the table's order is.
    numbered = [row for row in rows if row["step"] is not None]
    trainings: dict[str | None, list[Row]] = {}
    for row in numbered or rows:
        training = None if row["step"] is None else training_of(row["checkpoint"])
        trainings.setdefault(training, []).append(row)
    return next(filter(None, (_fall_of(rows, name) for rows in trainings.values())), None)


def _fall_of(events: Sequence[Row], name: str) -> tuple[Fall, str] | None:
    """The same of one training."""
    results = [None if row["results"] is None else tuple(row["results"]) for row in events]
    scores = [Score(row["value"], row["n"], found) for row, found in zip(events, results)]
    steps = [at if row["step"] is None else row["step"] for at, row in enumerate(events)]
    fall = standing_fall(name, zip(steps, scores, strict=True))
    return None if fall is None else (fall, events[steps.index(fall.peak_step)]["checkpoint"])
