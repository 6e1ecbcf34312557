"""Scores by the models themselves: token loss on texts, and KL to the base on prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from rlspec.errors import CheckpointError, OptionError
from rlspec.jobs.loading import load_tokenizer
from rlspec.jobs.series.models import Models, check_loadable
from rlspec.tasks.scores import Score, read_scores
from rlspec.train.answers import answered
from rlspec.train.divergence import trace_divergences
from rlspec.train.encode import pad_id
from rlspec.train.texts import read_texts, text_losses
from rlspec.train.trace_file import read_prompts
from rlspec.train.traces import Trace

TEXT_LOSS, FORGETTING, KL_BASE = "text_loss", "forgetting", "kl_base"


class TextLoss:
    """``text_loss``, the mean token loss on texts in nats, of the base too; and ``forgetting``, what it is above the
    base's (as PEFT's method comparison has it). Tokens are those of the base's tokenizer, the same for all.

    Args:
        texts: a JSONL file with a ``text`` on each line.

    Raises:
        OptionError: there is no such file, a line is no such object, or no text has two tokens.
        CheckpointError: the base has no tokenizer.
    """

    base_too = lasting = True
    names = (TEXT_LOSS, FORGETTING)

    def __init__(self, models: Models, texts: str | Path) -> None:
        self._models = models
        self._texts = read_texts(texts)
        self._path = texts
        self.by = _named("texts", texts)
        self._tokenizer = load_tokenizer(models.base)
        tokens = [self._tokenizer(text)["input_ids"] for text in self._texts]
        self._vocabulary = 1 + max((token for ids in tokens for token in ids), default=0)
        if all(len(ids) < 2 for ids in tokens):
            raise OptionError(f"{texts}: no text has two tokens, so none has a loss")

    def check(self, place: Path) -> None:
        _check(place, f"texts={str(self._path)!r}")

    def scores(self, place: Path, of_base: Mapping[str, Score]) -> dict[str, Score]:
        """Both of a checkpoint, the first alone of the base.

        Raises:
            CheckpointError: it cannot be loaded.
            OptionError: it lacks tokens of the base's vocabulary.
        """
        model = self._models.load(place)
        if self._vocabulary > (there := model.get_input_embeddings().weight.shape[0]):
            raise OptionError(
                f"{place}: {TEXT_LOSS}: the base's tokenizer makes token {self._vocabulary - 1} of {self._path}, the "
                f"model has {there}; wanted a model of the base's vocabulary"
            )
        losses = text_losses(model, self._tokenizer, self._texts)
        found = read_scores({TEXT_LOSS: losses}, str(place))
        start = of_base.get(TEXT_LOSS)
        if start is not None and start.results is not None:
            beyond = tuple(after - before for after, before in zip(losses, start.results, strict=True))
            found[FORGETTING] = Score(math.fsum(beyond) / len(beyond), len(beyond), beyond)
        return found


class BaseDivergence:
    """``kl_base``: KL(base || checkpoint) on prompts in nats per token of their answers, exact over the vocabulary.

    Answers that lack are sampled from the base. Tokens are those of the base's tokenizer. Base and checkpoint are in
    memory together.

    Args:
        prompts: a JSONL file, see ``rlspec.train.trace_file.read_prompts``.
        answers: file in which sampled answers are kept; None keeps them in memory.

    Raises:
        OptionError: there is no such file, or a line is none of these.
        CheckpointError: the base has no tokenizer.
    """

    base_too, lasting = False, True
    names = (KL_BASE,)

    def __init__(self, models: Models, prompts: str | Path, answers: Path | None) -> None:
        self._models = models
        self._path = prompts
        self._answers = answers
        self._tokenizer = load_tokenizer(models.base)
        self._prompts = read_prompts(Path(prompts), self._tokenizer)
        self.by = _named("prompts", prompts)
        self._traces: list[Trace] = []

    def check(self, place: Path) -> None:
        _check(place, f"prompts={str(self._path)!r}")

    def scores(self, place: Path, of_base: Mapping[str, Score]) -> dict[str, Score]:
        """That of a checkpoint.

        Raises:
            CheckpointError: it or the base cannot be loaded, or the answers cannot be written.
            OptionError: it lacks tokens of the base's vocabulary.
        """
        base = self._models.load_base()
        if not self._traces:
            self._traces = answered(self._prompts, base, self._tokenizer, self._answers, self.by)
        pad = pad_id(base, self._tokenizer)
        model = self._models.load(place)
        try:
            values = trace_divergences(base, model, self._traces, pad)
        except OptionError as error:
            raise OptionError(f"{place}: {error}") from None
        return read_scores({KL_BASE: values}, str(place))


def _check(place: Path, asked: str) -> None:
    try:
        check_loadable(place)
    except CheckpointError as error:
        raise OptionError(f"{asked} wants checkpoints that transformers loads: {error}") from None


def _named(kind: str, path: str | Path) -> str:
    """What rows call a file and what stands in it: an edited one scores anew."""
    digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    return f"{kind} {Path(path).resolve()} {digest}"
