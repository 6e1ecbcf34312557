"""A search's table as text and CSV, and the line that makes what it recommends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlspec.cli.flags import flag
from rlspec.io.csv_text import csv_text
from rlspec.study.repair.candidates import Candidate
from rlspec.study.repair.choice import Trial, difference_interval, front, share_won_back
from rlspec.study.repair.scores import Costs
from rlspec.study.repair.search import Found


def told(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.settings.items())


def restore_line(candidate: Candidate, base: Path, tuned: Path) -> str:
    """The command that writes the candidate's checkpoint."""
    words = ["rlspec", "restore", "--base", str(base), "--tuned", str(tuned), "--out", "REPAIRED"]
    return shlex.join([*words, *restore_flags(candidate)])


def restore_flags(candidate: Candidate) -> list[str]:
    """The options of `rlspec restore` that the candidate's settings are."""
    return [word for name, value in candidate.settings.items() for word in (flag(name), str(value))]


def lines(found: Found, base: Path, tuned: Path) -> Iterator[str]:
    """The trade-off curve, best general score first, what it leaves out, and the recommendation."""
    curve = front(found.trials)
    rest = sorted((t for t in found.trials if t not in curve), key=lambda trial: trial.score.general)
    yield f"{'general':>9} {'won back':>9} {'task':>9}   setting"
    yield _line("base", found.base, found)
    yield _line("tuned", found.tuned, found)
    yield "trade-off curve:"
    yield from (_line(_named(trial), trial.score, found) for trial in curve)
    yield "beside it:"
    yield from (_line(_named(trial), trial.score, found) for trial in rest)
    if found.random is not None:
        yield _line("a random change as large as the recommended one (control)", found.random, found)
    if found.passed_over:
        yield f"not possible here: {len(found.passed_over)} settings, the first: {found.passed_over[0][1]}"
    yield ""
    rule = f"most won back with at most {100 * found.tolerance:g} % of the task's gain given up"
    if found.recommended is None:
        yield f"No recommendation ({rule}): no setting tried is better than the tuned model within that."
        return
    yield f"Recommended ({rule}): {_named(found.recommended)}"
    yield from _confirmation(found)
    yield ""
    yield restore_line(found.recommended.candidate, base, tuned)


def as_csv(found: Found) -> str:
    """Every model scored: its settings and scores; ``on_curve`` and ``recommended`` are 0 or 1."""
    names = ("mode", "rank", "part", "strength", "modules", "layers")
    scores, marks = ("general", "task", "share_won_back"), ("control", "on_curve", "recommended")
    curve = front(found.trials)

    def scored(model: str, score: Costs) -> dict[str, Any]:
        share = share_won_back(score, found.base, found.tuned)
        return {"model": model, **dict(zip(scores, (*given(score, found.sign), share)))}

    rows = [scored("base", found.base), scored("tuned", found.tuned)]
    for trial in found.trials:
        marked = trial.candidate.is_control, trial in curve, trial == found.recommended
        rows.append(
            {
                **scored("restored", trial.score),
                **trial.candidate.settings,
                **dict(zip(marks, map(int, marked))),
            }
        )
    if found.random is not None:
        rows.append({**scored("random", found.random), "control": 1})
    return csv_text(["model", *names, *scores, *marks], rows)


def _named(trial: Trial) -> str:
    return told(trial.candidate) + (" (control)" if trial.candidate.is_control else "")


def _line(name: str, score: Costs, found: Found) -> str:
    share = share_won_back(score, found.base, found.tuned)
    won = "" if share is None else f"{100 * share:.0f} %"
    general, task = given(score, found.sign)
    return f"{general:9.4f} {won:>9} {task:9.4f}   {name}"


def given(score: Costs, sign: float) -> tuple[float, float]:
    """The general score and the task's as they were given, see ``Scores.sign``."""
    return sign * score.general, sign * score.task


def _confirmation(found: Found) -> Iterator[str]:
    if found.confirmed is None:
        yield "Unconfirmed: chosen and scored on the same data; give confirm_eval= a command on other data."
        return
    yield "Confirmed on data that the search did not see:"
    for name, score in found.confirmed.items():
        general, task = given(score, found.sign)
        yield f"{general:9.4f} {'':>9} {task:9.4f}   {name}"
    ours, tuned = found.confirmed["recommended"], found.confirmed["tuned"]
    if ours.details is None or tuned.details is None:
        return
    for name in ("general", "task"):
        low, high = difference_interval(ours.details[name], tuned.details[name])
        change = getattr(ours, name) - getattr(tuned, name)
        yield f"{name} loss, recommended less tuned: {change:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}] over texts"
