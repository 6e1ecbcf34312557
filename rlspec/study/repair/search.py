"""The search: rounds of candidates, each closer to the best of the last, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlspec.errors import OptionError, ProjectionError
from rlspec.restore.checkpoint import fingerprint
from rlspec.restore.plan import plan_restore
from rlspec.study.repair.candidates import Candidate, around, closer, coarse, new
from rlspec.study.repair.choice import Trial, recommend
from rlspec.study.repair.ledger import Ledger
from rlspec.study.repair.scores import Costs, Scores


@dataclass(frozen=True)
class Found:
    """What a search has found. ``confirmed`` are the scores of base, tuned and recommended on unseen data.

    ``random`` is the score of a change as large as the recommended one in random directions, where scores are losses.
    ``passed_over`` tells of candidates that the checkpoints cannot have, and why.
    """

    base: Costs
    tuned: Costs
    trials: tuple[Trial, ...]
    recommended: Trial | None
    random: Costs | None
    confirmed: dict[str, Costs] | None
    passed_over: tuple[tuple[Candidate, str], ...]
    resumed: int
    tolerance: float
    sign: float = 1.0  #: times a cost it is the score that was given: -1 where more of that is better


def search(
    base: Path,
    tuned: Path,
    scores: Scores,
    out: Path,
    *,
    evaluations: int | None = 30,
    seconds: float | None = None,
    tolerance: float = 0.05,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Try restorations of ``tuned`` from ``base`` and recommend one.

    A control (straight line, copy) can be recommended as well as a restoration of singular directions.

    Args:
        scores: how a model is scored.
        out: folder of the ledger; a search that was interrupted goes on with it.
        evaluations: restorations to score at most, base, tuned and the confirmation aside.
        seconds: begin no other one after this time.
        tolerance: share of the task's gain that may be given up.

    Raises:
        OptionError: a budget or tolerance out of range, or a ledger of another search.
        CheckpointError: checkpoints that cannot be read or do not belong together.
        RunFolderError: another process searches in ``out``.
    """
    if evaluations is not None and evaluations < 1:
        raise OptionError(f"budget={evaluations}: wanted one evaluation at least")
    if seconds is not None and seconds <= 0:
        raise OptionError(f"budget={seconds}: wanted more than 0 seconds")
    if not 0 <= tolerance <= 1:
        raise OptionError(f"tolerance={tolerance} is not in [0, 1]")
    plan = plan_restore(base, tuned, coarse()[0].options)
    with closing(Ledger(out, f"{fingerprint(plan)} {scores.identity}")) as ledger:
        until = None if seconds is None else time.monotonic() + seconds
        of_base = ledger.score({"model": "base"}, scores.base)
        of_tuned = ledger.score({"model": "tuned"}, scores.tuned)
        trials: list[Trial] = []
        passed_over: list[tuple[Candidate, str]] = []
        for candidate in _rounds(
            trials, passed_over, lambda: recommend(trials, of_base, of_tuned, tolerance)
        ):
            of = {"model": "restored", **_plain(candidate)}
            spent = until is not None and time.monotonic() > until and not ledger.knows(of)
            if spent or (evaluations is not None and len(trials) >= evaluations):
                break
            try:
                options = candidate.options
                plan_restore(base, tuned, options)
            except (OptionError, ProjectionError) as error:
                passed_over.append((candidate, str(error)))
                continue
            score = ledger.score(of, partial(scores.restored, options))
            trials.append(Trial(candidate, score))
            on_trial(trials[-1])
        best = recommend(trials, of_base, of_tuned, tolerance)
        random, confirmed = None, None
        if best is not None and scores.can_randomise:
            of = {"model": "random", **_plain(best.candidate)}
            random = ledger.score(of, partial(scores.randomised, best.candidate.options))
        if best is not None and scores.can_confirm:
            parts: dict[str, tuple[dict[str, Any], Callable[[], Costs]]] = {
                "base": ({"confirm": "base"}, lambda: scores.base(confirm=True)),
                "tuned": ({"confirm": "tuned"}, lambda: scores.tuned(confirm=True)),
                "recommended": (
                    {"confirm": "restored", **_plain(best.candidate)},
                    lambda: scores.restored(best.candidate.options, confirm=True),
                ),
            }
            confirmed = {name: ledger.score(of, compute) for name, (of, compute) in parts.items()}
        return Found(
            of_base,
            of_tuned,
            tuple(trials),
            best,
            random,
            confirmed,
            tuple(passed_over),
            ledger.resumed,
            tolerance,
            scores.sign,
        )


def _rounds(
    trials: list[Trial], passed_over: list[tuple[Candidate, str]], best: Callable[[], Trial | None]
) -> Iterator[Candidate]:
    """Candidates until nothing is left to try. ``trials`` grows meanwhile; only it decides what comes."""

    def done() -> list[Candidate]:
        return [trial.candidate for trial in trials] + [candidate for candidate, _ in passed_over]

    yield from new(coarse(), done())
    while True:
        before = len(done())
        for round_ in (around, lambda c: closer(c, _ranks(trials))):
            middle = _middle(trials, best())
            if middle is not None:
                yield from new(round_(middle), done())
        if len(done()) == before:
            return


def _middle(trials: list[Trial], best: Trial | None) -> Candidate | None:
    """Where to look next: the recommended one. Where that is a control, or there is none, the restoration of least task
    cost: by general cost alone the search would go on towards the base, away from what the tolerance allows."""
    if best is not None and not best.candidate.is_control:
        return best.candidate
    ours = [trial for trial in trials if not trial.candidate.is_control]
    return min(ours, key=lambda trial: trial.score.task).candidate if ours else None


def _ranks(trials: list[Trial]) -> list[float]:
    return sorted({float(t.candidate.settings["rank"]) for t in trials if not t.candidate.is_control})


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {name: str(value) for name, value in candidate.settings.items()}
