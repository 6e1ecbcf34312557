"""The scores of a series as `rlspec measure` takes and tells them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlspec.cli.measure_text import Bar, correlation_lines, score_lines

if TYPE_CHECKING:
    from rlspec.jobs.series import Series
    from rlspec.jobs.series.scores import Scorer


class Scoring:
    """Scores checkpoints that are measured, and says what they are.

    Args:
        alarm: the score to be kept.
        table: the file of the spectra's values; the scores get one beside it.
    """

    def __init__(self, scorer: Scorer, alarm: str | None, table: Path | None) -> None:
        self._scorer = scorer
        self._alarm = alarm
        self._table = None if table is None else table.with_name(f"{table.stem}-scores{table.suffix}")
        self._told: set[str] = set()  # checkpoints, and the fall

    def lines(self, series: Series, warn: Callable[[str], None]) -> list[str]:
        """Score what has no scores yet; every score, what goes with it, and what the alarm finds.

        Args:
            warn: gets one line for a checkpoint that cannot be scored.
        """
        scored = self._scored(series, warn)
        if not self._scorer:
            return []
        lines = ["", *score_lines(scored.scores), *correlation_lines(scored.correlations())]
        fall = self._told_fall(scored)
        if fall is not None:
            lines.append(fall or f"{self._alarm}: no fall from a peak that chance does not explain")
        return lines

    def news(self, series: Series, warn: Callable[[str], None]) -> list[str]:
        """The same of a series that grows: what was not told yet.

        Args:
            warn: as that of :meth:`lines`.
        """
        scored = self._scored(series, warn)
        lines = score_lines([row for row in scored.scores if row["checkpoint"] not in self._told])
        self._told |= {row["checkpoint"] for row in scored.scores}
        fall = self._told_fall(scored)
        if fall and fall not in self._told:
            lines.append(fall)
            self._told.add(fall)
        return lines

    @property
    def failures(self) -> int:
        """How many scores of checkpoints that were asked for could not be taken."""
        return self._scorer.failures

    def _told_fall(self, scored: Series) -> str | None:
        """What to say of the score's fall; "" where there is none, None where no checkpoint has that score."""
        from rlspec.jobs.series.falls import find_fall
        from rlspec.jobs.series.result import BASE_LABEL
        from rlspec.tasks.alarm import describe_fall

        of_checkpoints = (row for row in scored.scores if row["checkpoint"] != BASE_LABEL)
        if self._alarm is None or all(row["score"] != self._alarm for row in of_checkpoints):
            return None
        found = find_fall(scored.scores, self._alarm)
        return "" if found is None else describe_fall(found[0], checkpoint=found[1])

    def _scored(self, series: Series, warn: Callable[[str], None]) -> Series:
        bar = Bar(does="score", unit="score")

        def told(message: str) -> None:
            bar.close()
            warn(message)

        try:
            scored = self._scorer.score(series, warn=told, on_score=bar)
        finally:
            bar.close()
        if self._table is not None and self._scorer:
            scored.scores.to_csv(self._table)
        return scored
