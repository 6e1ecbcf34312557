"""Scores of the model beside its spectra, and the alarm that watches one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlspec.errors import OptionError
from rlspec.integrations.borrowed import in_pieces_again
from rlspec.io.jsonl import Row
from rlspec.spectra.processes import Processes, dealt
from rlspec.spectra.spread import is_spread
from rlspec.tasks.alarm import Alarm, Fall
from rlspec.tasks.scores import Score, read_scores
from rlspec.train.texts import read_texts, scaled_losses, text_tokens, token_loss_sums

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

    def score(
        self, model: nn.Module, tokenizer: Any, step: int, processes: Processes | None = None
    ) -> tuple[list[Row], Fall | None]:
        """Score the model as it is; call it inside ``undisturbed``.

        Args:
            processes: that hold the model together and all call this; see ``Processes.apart``.

        Returns:
            A row for each score, and the fall that the alarm finds: what the first process has found, in all.

        Raises:
            ProcessError: in one process, then in all of them: the evaluation failed or what it gave are no scores, the
                score to be kept is not among them, there is no tokenizer for the texts, or the model fails on those.
            GatherError: a process is gone.
        """
        processes = processes or Processes()
        in_step = is_spread(model)  # all must join each forward pass then, in the same order
        scores: dict[str, Score] = {}
        # Other shapes than the training's would be compiled too, and its next graph be one of shapes that vary.
        with in_pieces_again(model), torch.compiler.set_stance("force_eager"):
            if self._evaluate is not None:
                scores = processes.first(processes.together(lambda: self._evaluated(model, processes.number)))
            if self._texts is not None:
                losses = self._text_losses(model, tokenizer, processes, in_step)
                scores |= processes.together(lambda: read_scores({TEXT_LOSS: losses}, "texts"))
        return processes.first(processes.together(lambda: self._judged(scores, step)))

    def _evaluated(self, model: nn.Module, number: int) -> dict[str, Score]:
        assert self._evaluate is not None
        model.eval()
        with torch.no_grad():
            given = self._evaluate(model)
        return read_scores(given, "evaluate") if number == 0 else {}

    def _text_losses(
        self, model: nn.Module, tokenizer: Any, processes: Processes, in_step: bool
    ) -> list[float]:
        """As one process has them: each text goes through the model by itself, wherever that is done."""
        # What a wrapper such as DistributedDataParallel is put around: it has the positions, and no collectives.
        bare = next((part for part in model.modules() if hasattr(part, "config")), model)
        ids = processes.first(processes.together(lambda: self._tokens(bare, tokenizer, processes.number)))
        owners = dealt([len(one) for one in ids], processes.count)
        mine = [i for i, owner in enumerate(owners) if in_step or owner == processes.number]
        sums = processes.together(lambda: token_loss_sums(bare, (ids[i] for i in mine)))
        parts = processes.gathered(dict(zip(mine, sums, strict=True)))
        found = {i: total for part in reversed(parts) for i, total in part.items()}
        return scaled_losses(ids, [found[i] for i in range(len(ids))])

    def _tokens(self, model: nn.Module, tokenizer: Any, number: int) -> list[list[int]]:
        if number > 0:  # the first one's count: in step, all must go through the same
            return []
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None:
            raise OptionError("texts= needs the trainer's processing_class, a tokenizer; it has none")
        assert self._texts is not None
        return text_tokens(model, tokenizer, self._texts)

    def _judged(self, scores: dict[str, Score], step: int) -> tuple[list[Row], Fall | None]:
        if self._kept is not None and self._kept not in scores:
            raise OptionError(f"alarm={self._kept!r}: no such score; there are {', '.join(scores)}")
        rows = [
            {"step": step, "score": name, "value": score.value, "n": score.n, "results": score.results}
            for name, score in scores.items()
        ]
        return rows, None if self._kept is None else self._observe(step, scores[self._kept])

    def _observe(self, step: int, score: Score) -> Fall | None:
        return None if self._alarm is None else self._alarm.observe(step, score)
