"""Scores of the checkpoints of a series.

They lie beside the spectra, in ``scores.jsonl``: one row per checkpoint and score. What is there is not taken again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rlspec.errors import CheckpointError, OptionError, RunFolderError
from rlspec.io.files import read_json_object, write_error
from rlspec.io.jsonl import Row, read_rows, write_rows
from rlspec.jobs.series.checkpoints import find_checkpoints
from rlspec.jobs.series.evaluation import Evaluate, Evaluation
from rlspec.jobs.series.falls import check_alarm
from rlspec.jobs.series.losses import BaseDivergence, TextLoss
from rlspec.jobs.series.models import Models
from rlspec.jobs.series.result import BASE_LABEL, Series
from rlspec.tasks.scores import Score

_LOG = logging.getLogger(__name__)
_Place = tuple[str, int | None, Path]  # label, step, where it lies


class _Kind(Protocol):
    """One way to score a checkpoint."""

    @property
    def by(self) -> str:
        """What rows call it."""

    @property
    def base_too(self) -> bool: ...

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of its scores, where they are known beforehand."""

    def check(self, place: Path) -> None: ...
    def scores(self, place: Path, of_base: Mapping[str, Score]) -> dict[str, Score]: ...


class Scorer:
    """What the checkpoints of a series are scored by.

    Args:
        base: the reference.
        out: the folder of the series; None keeps scores in memory.
        evaluate: see :class:`rlspec.jobs.series.evaluation.Evaluation`.
        texts: see :class:`rlspec.jobs.series.losses.TextLoss`.
        prompts: see :class:`rlspec.jobs.series.losses.BaseDivergence`.
        alarm: the score that :func:`rlspec.jobs.series.falls.find_fall` will be asked for.
        device: where models are put.

    Raises:
        OptionError: what these refuse, or nothing gives the alarm's score.
        CheckpointError: texts or prompts want the base's tokenizer, and it has none.
    """

    def __init__(
        self,
        base: str | Path,
        out: str | Path | None,
        *,
        evaluate: Evaluate | None = None,
        texts: str | Path | None = None,
        prompts: str | Path | None = None,
        alarm: str | None = None,
        device: torch.device | str = "auto",
    ) -> None:
        self._base = Path(base)
        self._out = None if out is None else Path(out)
        self._alarm = alarm
        # What may want the device for itself comes before there are models on it.
        self._kinds: list[_Kind] = [] if evaluate is None else [Evaluation(evaluate)]
        self._models = Models(self._base, device)
        if texts is not None:
            self._kinds.append(TextLoss(self._models, texts))
        if prompts is not None:
            answers = None if self._out is None else self._out / "answers.jsonl"
            self._kinds.append(BaseDivergence(self._models, prompts, answers))
        self._scores = _Scores(None if self._out is None else self._out / "scores.jsonl")
        self._given_up: set[tuple[str, str]] = set()
        self._names = [name for kind in self._kinds for name in kind.names or ()]
        if alarm is not None and evaluate is None and alarm not in self._names:
            told = (
                f"there are {', '.join(self._names)}"
                if self._names
                else "evaluate=, texts= or prompts= gives scores"
            )
            raise OptionError(f"alarm={alarm!r}: no such score; {told}")

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def check(self, checkpoints: Iterable[str | Path]) -> None:
        """Refuse, before they are measured, checkpoints that could not be scored and have no such scores yet.

        Raises:
            OptionError: transformers does not load the base or a checkpoint, for texts or prompts: it lies in a single
                file, has no config.json, or is of torch.distributed.checkpoint.
            CheckpointError: no checkpoint at a path.
        """
        if not self._kinds:
            return
        known = {} if self._out is None else _known(self._out)
        labels = {entry["path"]: label for label, entry in known.items()}
        places = [(labels.get(str(c.path.resolve()), ""), c.path) for c in find_checkpoints(checkpoints)]
        for kind in self._kinds:
            for label, place in [(BASE_LABEL, self._base), *places]:
                if not self._scores.has(label, kind.by):
                    kind.check(place)

    def score(
        self,
        series: Series,
        *,
        warn: Callable[[str], None] | None = None,
        on_score: Callable[[int, int, str], None] | None = None,
    ) -> Series:
        """The series with its scores. One that was deleted since it was measured keeps those that it has, and is told of
        where it has none.

        Args:
            warn: gets one line, once, for a checkpoint that cannot be scored, which is then passed over.
            on_score: called with (scores taken, scores to take, checkpoint) before each.

        Returns:
            Scores that other texts, prompts or evaluations gave are not among its own: two kinds under one name would be
            no series.

        Raises:
            OptionError: an evaluation fails or gives no scores, or not the one that the alarm is for.
            CheckpointError: transformers cannot load a checkpoint, or the rows cannot be written.
        """
        self._scores.read()
        places: list[_Place] = [(one.checkpoint, one.step, one.path) for one in series]
        gone: dict[str, None] = {}
        try:
            to_do = self._to_do(places)
            for done, (kind, label, step, place) in enumerate(to_do):
                if label != BASE_LABEL and not place.exists():  # trainers delete old ones
                    gone[label] = None
                    self._given_up.add((label, kind.by))
                    continue
                if on_score is not None:
                    on_score(done, len(to_do), label)
                try:
                    scores = self._scored(kind, place)
                except (CheckpointError, OptionError) as error:
                    if warn is None:
                        raise
                    self._given_up.add((label, kind.by))
                    warn(str(error))
                    continue
                self._scores.put(label, step, kind.by, scores)
                if kind.names is None and self._alarm is not None and self._alarm not in self._names:
                    check_alarm(self._alarm, self._scores.rows_of(label, kind.by))
        finally:
            self._models.drop()
        if gone:
            _LOG.warning("no longer on the disk, so without new scores: %s", ", ".join(gone))
        labels, asked = [BASE_LABEL, *(label for label, *_ in places)], {kind.by for kind in self._kinds}
        rows = self._scores.put_last(asked)
        return Series(list(series), [row for label in labels for row in rows if row["checkpoint"] == label])

    def _to_do(self, places: Sequence[_Place]) -> list[tuple[_Kind, str, int | None, Path]]:
        """What lacks. Evaluations, which may want the device for themselves, come before there are models on it; then the
        checkpoints in order, each loaded once."""
        found = []
        for models in (False, True):
            kinds = [kind for kind in self._kinds if (kind.names is not None) is models]
            for label, step, place in [(BASE_LABEL, None, self._base), *places]:
                for kind in kinds:
                    has = self._scores.has(label, kind.by) or (label, kind.by) in self._given_up
                    if not has and (kind.base_too or label != BASE_LABEL):
                        found.append((kind, label, step, place))
        return found

    def _scored(self, kind: _Kind, place: Path) -> dict[str, Score]:
        scores = kind.scores(place, self._scores.of(BASE_LABEL, kind.by))
        if kind.names is None and (twice := sorted(set(scores) & set(self._names))):
            raise OptionError(
                f"evaluate: gave a score {twice[0]!r}, which texts= and prompts= give; call it something else"
            )
        return scores


def _known(out: Path) -> dict[str, dict[str, Any]]:
    """The checkpoints of the series in a folder: label -> what was measured."""
    about = out / "measure.json"
    found: dict[str, dict[str, Any]] = (
        read_json_object(about, RunFolderError).get("checkpoints", {}) if about.exists() else {}
    )
    return found


class _Scores:
    """Rows by checkpoint and what scored it, on disk as they are taken."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[Row] = []
        self.read()

    def read(self) -> None:
        """Take in what is on disk."""
        if self._path is not None:
            self.rows = read_rows(self._path)

    def has(self, label: str, by: str) -> bool:
        return bool(self.rows_of(label, by))

    def rows_of(self, label: str, by: str) -> list[Row]:
        return [row for row in self.rows if row["checkpoint"] == label and row["by"] == by]

    def of(self, label: str, by: str) -> dict[str, Score]:
        """The scores of a checkpoint by their names."""
        return {
            row["score"]: Score(
                row["value"], row["n"], None if row["results"] is None else tuple(row["results"])
            )
            for row in self.rows_of(label, by)
        }

    def put_last(self, asked: Container[str]) -> list[Row]:
        """The rows of these, which then end the file: of one score taken in several ways a report shows the last."""
        rest = [row for row in self.rows if row["by"] not in asked]
        found = [row for row in self.rows if row["by"] in asked]
        if self.rows != [*rest, *found]:
            self.rows = [*rest, *found]
            self._write()
        return found

    def put(self, label: str, step: int | None, by: str, scores: Mapping[str, Score]) -> None:
        new: list[Row] = [
            {
                "checkpoint": label, "step": step, "score": name, "value": score.value, "n": score.n,
                "results": None if score.results is None else list(score.results), "by": by,
            }
            for name, score in scores.items()
        ]  # fmt: skip
        self.rows += new
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            try:
                write_rows(self._path, self.rows)  # at once: never some scores of a checkpoint alone
            except OSError as error:
                raise write_error(self._path, error) from None
