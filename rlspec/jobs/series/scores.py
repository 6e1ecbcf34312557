"""Scores of the checkpoints of a series.

They lie beside the spectra, in ``scores.jsonl``: one row per checkpoint and score. What is there is not taken again, as
long as the checkpoint's files are those whose spectra were measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlspec.errors import CheckpointError, OptionError, RlspecError, RunFolderError, TensorError
from rlspec.io.files import read_json_object, write_error
from rlspec.io.jsonl import Row, read_rows, write_rows
from rlspec.jobs.series.checkpoints import Checkpoint, Files, difference, find_checkpoints
from rlspec.jobs.series.evaluation import Evaluate, Evaluation
from rlspec.jobs.series.falls import check_alarm
from rlspec.jobs.series.losses import BaseDivergence, TextLoss
from rlspec.jobs.series.models import Models
from rlspec.jobs.series.result import BASE_LABEL, Series
from rlspec.tasks.scores import Score

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """A checkpoint of the series, or its base."""

    label: str
    step: int | None
    path: Path
    files: Files  #: those whose spectra were measured

    @property
    def weights(self) -> str:
        return _digest(self.files)

    def check_same(self) -> None:
        """Refuse other weights than those whose spectra stand beside the scores.

        Raises:
            CheckpointError: it was written anew.
        """
        if told := difference(self.files, Checkpoint.at(self.path).files()):
            raise CheckpointError(f"{self.path}: written anew since its spectra were measured ({told})")


class _Kind(Protocol):
    """One way to score a checkpoint."""

    @property
    def by(self) -> str:
        """What rows call it."""

    @property
    def lasting(self) -> bool:
        """Whether that tells it from all others, so that what it found may be used again."""

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
        self._taken: set[tuple[str, str]] = set()
        self._asked_for: set[Path] = set()
        #: of the last :meth:`score`: how many scores of checkpoints that were asked for could not be taken
        self.failures = 0
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
        by_path = {entry["path"]: (label, _digest(entry["files"])) for label, entry in known.items()}
        paths = [checkpoint.path for checkpoint in find_checkpoints(checkpoints)]
        self._asked_for |= {path.resolve() for path in paths}
        for kind in self._kinds:
            if not self._scores.has(BASE_LABEL, kind.by):
                kind.check(self._base)
            for path in paths:
                label, weights = by_path.get(str(path.resolve()), ("", ""))
                if not self._scores.has(label, kind.by, weights):
                    kind.check(path)

    def score(
        self,
        series: Series,
        *,
        warn: Callable[[str], None] | None = None,
        on_score: Callable[[int, int, str], None] | None = None,
    ) -> Series:
        """The series with its scores. One that was deleted since it was measured keeps those that it has, and is told of
        where it has none.

        One that cannot be scored keeps no others from it.

        Args:
            warn: gets one line for a checkpoint that cannot be scored, which is then passed over.
            on_score: called with (scores taken, scores to take, checkpoint) before each.

        Returns:
            Scores that other texts, prompts or evaluations gave are not among its own: two kinds under one name would be
            no series.

        Raises:
            OptionError: an evaluation fails or gives no scores, or not the one that the alarm is for.
            CheckpointError: transformers cannot load the base or a checkpoint, a checkpoint was written anew since it was
                measured, or the rows cannot be written.
            TensorError: the weights of one are not finite.
        """
        self._scores.read()
        if not self._kinds and not self._scores.rows:
            return series
        base = _Place(BASE_LABEL, None, self._base, Checkpoint.at(self._base).files())
        places = [base, *(_Place(one.checkpoint, one.step, one.path, one.files) for one in series)]
        self._scores.keep({place.label: place.weights for place in places})
        gone: dict[str, None] = {}
        errors: list[RlspecError] = []
        self.failures = 0
        try:
            to_do = self._to_do(places)
            for done, (kind, place) in enumerate(to_do):
                if place is not base and not place.path.exists():  # trainers delete old ones
                    gone[place.label] = None
                    self._given_up.add((place.label, kind.by))
                    continue
                if on_score is not None:
                    on_score(done, len(to_do), place.label)
                try:
                    scores = self._scored(kind, place)
                except (CheckpointError, OptionError, TensorError) as error:
                    if place is base:  # what the others are held against
                        raise
                    if not isinstance(error, _NoRoomError):
                        self._given_up.add((place.label, kind.by))
                    asked_for = place.path.resolve() in self._asked_for
                    self.failures += asked_for
                    if warn is None and asked_for:
                        errors.append(error)
                    else:
                        (warn or _LOG.warning)(str(error))
                    continue
                self._scores.put(place, kind.by, scores)
                self._taken.add((place.label, kind.by))
                if kind.names is None and self._alarm is not None and self._alarm not in self._names:
                    check_alarm(self._alarm, self._scores.rows_of(place.label, kind.by))
        finally:
            self._models.drop()
        if gone:
            _LOG.warning("no longer on the disk, so without new scores: %s", ", ".join(gone))
        if errors:
            more = f" ({len(errors)} scores could not be taken; this is the first)" if len(errors) > 1 else ""
            raise type(errors[0])(f"{errors[0]}{more}")
        rows = self._scores.put_last({kind.by for kind in self._kinds})
        labels = [place.label for place in places]
        return Series(list(series), [row for label in labels for row in rows if row["checkpoint"] == label])

    def _to_do(self, places: Sequence[_Place]) -> list[tuple[_Kind, _Place]]:
        """What lacks. Evaluations, which may want the device for themselves, come before there are models on it; then the
        checkpoints in order, each loaded once."""
        found = []
        for models in (False, True):
            kinds = [kind for kind in self._kinds if (kind.names is not None) is models]
            for place in places:
                for kind in kinds:
                    key = place.label, kind.by
                    has = key in self._taken or (kind.lasting and self._scores.has(*key))
                    if not has and key not in self._given_up and (kind.base_too or place.label != BASE_LABEL):
                        found.append((kind, place))
        return found

    def _scored(self, kind: _Kind, place: _Place) -> dict[str, Score]:
        place.check_same()
        try:
            scores = kind.scores(place.path, self._scores.of(BASE_LABEL, kind.by))
        except TensorError as error:
            raise TensorError(f"{place.path}: {error}") from None
        except torch.OutOfMemoryError as error:
            self._models.drop()
            raise _NoRoomError(f"{place.path}: not scored: {str(error).partition('. ')[0]}") from None
        place.check_same()  # an evaluation takes its time
        if kind.names is None and (twice := sorted(set(scores) & set(self._names))):
            raise OptionError(
                f"evaluate: gave a score {twice[0]!r}, which texts= and prompts= give; call it something else"
            )
        if self._alarm in scores:
            self._check_problems(self._alarm, kind.by, scores[self._alarm].n, place)
        return scores

    def _check_problems(self, name: str, by: str, n: int | None, place: _Place) -> None:
        """Refuse a score that the alarm could not compare with the ones before."""
        others = (row for row in self._scores.rows if row["score"] == name and row["by"] == by)
        for row in others:
            if row["checkpoint"] not in (BASE_LABEL, place.label) and row["n"] != n:
                raise OptionError(
                    f"{place.path}: score {name!r} of n={n} problems, {row['n']} of {row['checkpoint']}; an alarm needs "
                    "the same problems each time"
                )


class _NoRoomError(CheckpointError):
    """There was no memory for it on the device then; there may be later."""


def _digest(files: Files) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=8).hexdigest()


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

    def has(self, label: str, by: str, weights: str | None = None) -> bool:
        """Whether there are some, of these weights where they are given."""
        rows = self.rows_of(label, by)
        return any(weights in (None, row.get("weights")) for row in rows)

    def keep(self, weights: Mapping[str, str]) -> None:
        """Drop the scores of other weights than these, by label."""
        kept = [
            row
            for row in self.rows
            if row["checkpoint"] not in weights or row.get("weights") == weights[row["checkpoint"]]
        ]
        if len(kept) < len(self.rows):
            self.rows = kept
            self._write()

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

    def put(self, place: _Place, by: str, scores: Mapping[str, Score]) -> None:
        new: list[Row] = [
            {
                "checkpoint": place.label, "step": place.step, "score": name, "value": score.value, "n": score.n,
                "results": None if score.results is None else list(score.results), "by": by,
                "weights": place.weights,
            }
            for name, score in scores.items()
        ]  # fmt: skip
        others = [row for row in self.rows if (row["checkpoint"], row["by"]) != (place.label, by)]
        self.rows = others + new
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            try:
                write_rows(self._path, self.rows)  # at once: never some scores of a checkpoint alone
            except OSError as error:
                raise write_error(self._path, error) from None
