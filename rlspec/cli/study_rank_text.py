"""A search's table as text and CSV, and the line that makes what it recommends."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator
from pathlib import Path

from rlspec.cli.flags import flag
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
    """The trade-off curve by rising general cost, what it leaves out, and the recommendation."""
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
    curve = front(found.trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", *names, "general", "task", "share_won_back", "control", "on_curve", "recommended"]
    )
    for label, score in (("base", found.base), ("tuned", found.tuned)):
        share = share_won_back(score, found.base, found.tuned)
        writer.writerow([label, *[""] * len(names), score.general, score.task, share, "", "", ""])
    for trial in found.trials:
        share = share_won_back(trial.score, found.base, found.tuned)
        settings = [trial.candidate.settings.get(name, "") for name in names]
        marks = [int(trial.candidate.is_control), int(trial in curve), int(trial == found.recommended)]
        writer.writerow(["restored", *settings, trial.score.general, trial.score.task, share, *marks])
    if found.random is not None:
        share = share_won_back(found.random, found.base, found.tuned)
        writer.writerow(
            ["random", *[""] * len(names), found.random.general, found.random.task, share, 1, "", ""]
        )
    return text.getvalue()


def _named(trial: Trial) -> str:
    return told(trial.candidate) + (" (control)" if trial.candidate.is_control else "")


def _line(name: str, score: Costs, found: Found) -> str:
    share = share_won_back(score, found.base, found.tuned)
    won = "" if share is None else f"{100 * share:.0f} %"
    return f"{score.general:9.4f} {won:>9} {score.task:9.4f}   {name}"


def _confirmation(found: Found) -> Iterator[str]:
    if found.confirmed is None:
        yield "Unconfirmed: chosen and scored on the same data; give confirm_eval= a command on other data."
        return
    yield "Confirmed on data that the search did not see:"
    for name, score in found.confirmed.items():
        yield f"{score.general:9.4f} {'':>9} {score.task:9.4f}   {name}"
    ours, tuned = found.confirmed["recommended"], found.confirmed["tuned"]
    if ours.details is None or tuned.details is None:
        return
    for name in ("general", "task"):
        low, high = difference_interval(ours.details[name], tuned.details[name])
        change = getattr(ours, name) - getattr(tuned, name)
        yield f"{name} loss, recommended less tuned: {change:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}] over texts"
