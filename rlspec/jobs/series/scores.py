"""Scores of the checkpoints of a series: by a command of the user's, and as token loss on texts.

They lie beside the spectra, in ``scores.jsonl``: one row per checkpoint and score. What is there is not taken again.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlspec.backend import choose_device
from rlspec.errors import CheckpointError, OptionError, RunFolderError
from rlspec.io.adapter import is_adapter
from rlspec.io.files import read_json_object, write_error
from rlspec.io.jsonl import Row, read_rows, write_rows
from rlspec.jobs.loading import load_model, load_tokenizer, model_folder
from rlspec.jobs.series.checkpoints import BASE_LABEL, find_checkpoints
from rlspec.jobs.series.result import Series
from rlspec.run.segments import training_of
from rlspec.tasks.alarm import Fall, standing_fall
from rlspec.tasks.commands import check_command, last_json, run, words_for
from rlspec.tasks.scores import Score, read_scores
from rlspec.train.texts import read_texts, text_losses

_LOG = logging.getLogger(__name__)
MARKER = "{checkpoint}"
TEXT_LOSS, FORGETTING = "text_loss", "forgetting"

_Place = tuple[str, int | None, Path]  # label, step, where it lies


def check_scoring(evaluate: str | None, texts: str | Path | None) -> list[str] | None:
    """Refuse what :func:`score_series` would; the texts, None where none are asked for.

    Raises:
        OptionError: no texts, or a command without ``{checkpoint}``.
    """
    if evaluate is not None:
        check_command(evaluate, MARKER, "evaluate")
    return None if texts is None else read_texts(texts)


def check_loadable(
    base: str | Path, checkpoints: Iterable[str | Path], out: str | Path, texts: str | Path
) -> None:
    """Refuse, before they are measured, checkpoints whose texts :func:`score_series` could not score.

    Raises:
        OptionError: transformers does not load the base or a checkpoint that has no such scores yet: it lies in a single
            file, has no config.json, or is of torch.distributed.checkpoint.
        CheckpointError: no checkpoint at a path.
    """
    about = Path(out) / "measure.json"
    known = read_json_object(about, RunFolderError).get("checkpoints", {}) if about.exists() else {}
    labels = {entry["path"]: label for label, entry in known.items()}
    table = _Scores(Path(out) / "scores.jsonl")
    found = find_checkpoints(checkpoints)
    places = [(BASE_LABEL, Path(base)), *((labels.get(str(c.path.resolve()), ""), c.path) for c in found)]
    for label, place in places:
        if table.has(label, _by_texts(texts)) or is_adapter(place):
            continue
        try:
            if place.is_file():
                raise CheckpointError(f"{place}: a file; give the folder with its config.json")
            model_folder(str(place))
        except CheckpointError as error:
            raise OptionError(
                f"texts={str(texts)!r} wants checkpoints that transformers loads: {error}"
            ) from None


def _by_texts(texts: str | Path) -> str:
    """What rows call the texts that they are of."""
    return f"texts {Path(texts).resolve()}"


def score_series(
    series: Series,
    base: str | Path,
    out: str | Path,
    *,
    evaluate: str | None = None,
    texts: str | Path | None = None,
    device: torch.device | str = "auto",
    on_checkpoint: Callable[[str], None] | None = None,
) -> list[Row]:
    """Score the checkpoints of a series that ``measure(..., out=out)`` has left.

    One that was deleted since it was measured keeps the scores that it has, and is told of where it has none.

    Args:
        evaluate: a command in which ``{checkpoint}`` stands for the checkpoint's path; the last JSON object of its
            standard output holds the scores, see ``rlspec.tasks.scores.read_scores``. It is run without a shell.
        texts: a JSONL file with a ``text`` on each line. The base is scored, too: ``text_loss`` is the mean token loss in
            nats, ``forgetting`` what it is above the base's (as PEFT's method comparison has it).
        on_checkpoint: called with the label of each checkpoint before it is scored.

    Returns:
        Rows of ``checkpoint``, ``step``, ``score``, ``value``, ``n``, ``results`` and ``by`` (what scored it), in the
        order of the series; ``checkpoint`` is ``"base"`` for the base. What other texts or commands gave is not among
        them: scores of two kinds under one name would be no series.

    Raises:
        OptionError: no texts, a command without ``{checkpoint}``, or one that fails or prints no scores.
        CheckpointError: transformers cannot load a checkpoint, or the rows cannot be written.
    """
    found = check_scoring(evaluate, texts)
    known = read_json_object(Path(out) / "measure.json")["checkpoints"]
    table = _Scores(Path(out) / "scores.jsonl")
    places: list[_Place] = [
        (spectra.checkpoint, spectra.step, Path(known[spectra.checkpoint]["path"])) for spectra in series
    ]
    gone: dict[str, None] = {}

    def unscored(by: str, places: Iterable[_Place]) -> Iterator[_Place]:
        """Those without such scores; of those that were deleted, as trainers delete old ones, the label is noted."""
        for label, step, place in places:
            if table.has(label, by):
                continue
            if label != BASE_LABEL and not place.exists():
                gone[label] = None
                continue
            if on_checkpoint is not None:
                on_checkpoint(label)
            yield label, step, place

    by_texts = None if texts is None else _by_texts(texts)
    if found is not None and by_texts is not None:
        for label, step, place in unscored(by_texts, [(BASE_LABEL, None, Path(base)), *places]):
            given: dict[str, Any] = {TEXT_LOSS: _losses(place, Path(base), found, device)}
            scores = read_scores(given, str(place))
            start = table.value(BASE_LABEL, by_texts, TEXT_LOSS)
            if start is not None:
                scores[FORGETTING] = Score(scores[TEXT_LOSS].value - start)
            table.put(label, step, by_texts, scores)
    if evaluate is not None:
        for label, step, place in unscored(evaluate, places):
            table.put(label, step, evaluate, run_command(evaluate, place))
    if gone:
        _LOG.warning("no longer on the disk, so without new scores: %s", ", ".join(gone))
    labels = [BASE_LABEL, *(label for label, *_ in places)]
    asked = {evaluate, by_texts}
    return [
        row for label in labels for row in table.rows if row["checkpoint"] == label and row["by"] in asked
    ]


def find_fall(rows: Sequence[Row], name: str) -> tuple[Fall, str] | None:
    """The first fall of a score from a peak not reached again, in the order of the rows, and that peak's checkpoint.

    Each training by itself: checkpoints whose labels differ by more than their step are of several.

    Raises:
        OptionError: no row has such a score, or its values are of a kind that no test tells from chance.
    """
    events = [row for row in rows if row["score"] == name and row["checkpoint"] != BASE_LABEL]
    if not events:
        names = dict.fromkeys(row["score"] for row in rows)
        raise OptionError(f"alarm={name!r}: no such score; there are {', '.join(names) or 'none'}")
    if all(row["n"] is None for row in events):
        raise OptionError(
            f"alarm={name!r}: a number for each checkpoint, which no test tells from chance; an alarm needs lists of one "
            "number per problem, or text_loss"
        )
    trainings: dict[str | None, list[Row]] = {}
    for row in events:
        training = None if row["step"] is None else training_of(row["checkpoint"])
        trainings.setdefault(training, []).append(row)
    return next(filter(None, (_fall_of(rows, name) for rows in trainings.values())), None)


def _fall_of(events: Sequence[Row], name: str) -> tuple[Fall, str] | None:
    """The same of one training."""
    results = [None if row["results"] is None else tuple(row["results"]) for row in events]
    scores = [Score(row["value"], row["n"], found) for row, found in zip(events, results)]
    fall = standing_fall(name, enumerate(scores))
    if fall is None:
        return None
    steps = [at if row["step"] is None else row["step"] for at, row in enumerate(events)]
    told = replace(fall, peak_step=steps[fall.peak_step], step=steps[fall.step])
    return told, events[fall.peak_step]["checkpoint"]


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


def _losses(place: Path, base: Path, texts: Sequence[str], device: torch.device | str) -> list[float]:
    # Trainers often save weights alone: the tokenizer is then the base's.
    own = any((place / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = load_tokenizer(place if own else base)
    return text_losses(load_model(place, choose_device(device)).eval(), tokenizer, texts)


class _Scores:
    """Rows by checkpoint and what scored it, on disk as they are taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = read_rows(path)

    def has(self, label: str, by: str) -> bool:
        return any(row["checkpoint"] == label and row["by"] == by for row in self.rows)

    def value(self, label: str, by: str, score: str) -> float | None:
        key = (label, by, score)
        return next((r["value"] for r in self.rows if (r["checkpoint"], r["by"], r["score"]) == key), None)

    def put(self, label: str, step: int | None, by: str, scores: dict[str, Score]) -> None:
        new: list[Row] = [
            {
                "checkpoint": label, "step": step, "score": name, "value": score.value, "n": score.n,
                "results": None if score.results is None else list(score.results), "by": by,
            }
            for name, score in scores.items()
        ]  # fmt: skip
        try:
            write_rows(self._path, [*self.rows, *new])  # at once: never some scores of a checkpoint alone
        except OSError as error:
            raise write_error(self._path, error) from None
        self.rows += new
