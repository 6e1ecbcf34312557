"""Scores of the model beside its spectra, and the alarm that watches one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlspec.errors import OptionError
from rlspec.io.jsonl import Row
from rlspec.tasks.alarm import Alarm, Fall
from rlspec.tasks.scores import Score, read_scores
from rlspec.train.texts import read_texts, text_losses

Evaluate = Callable[[Any], Mapping[str, Any]]
TEXT_LOSS = "text_loss"


class Scoring:
    """What is scored at each event.

    Args:
        evaluate: from the model to named scores, see ``rlspec.tasks.scores.read_scores``.
        texts: a JSONL file with a ``text`` on each line; its mean token loss is the score ``text_loss``.
        alarm: the score to be kept, see ``rlspec.tasks.alarm.Alarm``.

    Raises:
        OptionError: ``evaluate`` cannot be called, ``texts`` is no such file, or nothing gives the score of ``alarm``.
    """

    def __init__(self, evaluate: Evaluate | None, texts: str | Path | None, alarm: str | None) -> None:
        if evaluate is not None and not callable(evaluate):
            raise OptionError(f"evaluate={evaluate!r} is not a function of the model")
        self._evaluate = evaluate
        self._texts: Sequence[str] | None = None if texts is None else read_texts(texts)
        if alarm is not None and evaluate is None and (texts is None or alarm != TEXT_LOSS):
            raise OptionError(f"alarm={alarm!r}: no such score; evaluate= or texts= gives scores")
        self._kept = alarm
        self._alarm = None if alarm is None else Alarm(alarm)

    def __bool__(self) -> bool:
        return self._evaluate is not None or self._texts is not None

    def begin(self, rows: Sequence[Row] = ()) -> Fall | None:
        """Start a training: the alarm has seen the rows given and no more.

        Returns:
            The last fall that the rows show.
        """
        self._alarm = None if self._kept is None else Alarm(self._kept)
        found = None
        for row in rows:
            if row["score"] == self._kept:
                results = None if row["results"] is None else tuple(row["results"])
                found = self._observe(row["step"], Score(row["value"], row["n"], results)) or found
        return found

    def score(self, model: nn.Module, tokenizer: Any, step: int) -> tuple[list[Row], Fall | None]:
        """Score the model as it is; call it inside ``undisturbed``.

        Returns:
            A row for each score, and the fall that the alarm finds.

        Raises:
            OptionError: what the evaluation gave are no scores, the score to be kept is not among them, or there is no
                tokenizer for the texts.
        """
        scores: dict[str, Score] = {}
        if self._evaluate is not None:
            model.eval()
            with torch.no_grad():
                scores = read_scores(self._evaluate(model), "evaluate")
        if self._texts is not None:
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if tokenizer is None:
                raise OptionError("texts= needs the trainer's processing_class, a tokenizer; it has none")
            scores |= read_scores({TEXT_LOSS: text_losses(model, tokenizer, self._texts)}, "texts")
        if self._kept is not None and self._kept not in scores:
            raise OptionError(f"alarm={self._kept!r}: no such score; there are {', '.join(scores)}")
        rows = [
            {"step": step, "score": name, "value": score.value, "n": score.n, "results": score.results}
            for name, score in scores.items()
        ]
        return rows, None if self._kept is None else self._observe(step, scores[self._kept])

    def _observe(self, step: int, score: Score) -> Fall | None:
        return None if self._alarm is None else self._alarm.observe(step, score)
