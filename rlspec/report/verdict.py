"""The run in plain words and in headline figures, from its data alone."""

from __future__ import annotations

from typing import Any

from rlspec.report.data import Row, RunData, by_event
from rlspec.run.rows import mean, rotation

NAMES = {
    "sft_start": "base",
    "sft_peak": "OOD peak of SFT",
    "sft_end": "end of SFT",
    "ppo_start": "start of PPO",
    "ppo_end": "end of PPO",
}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def accuracy(row: Row, prefix: str) -> str:
    """``41.5 % (35.3–47.9)``: the accuracy and its 95 % interval."""
    if row.get(f"{prefix}_accuracy") is None:
        return "–"
    found, low, high = (row.get(f"{prefix}_{name}") for name in ("accuracy", "low", "high"))
    return (
        percent(found)
        if low is None or high is None
        else f"{percent(found)} ({100 * low:.1f}–{100 * high:.1f})"
    )


def events(run: RunData) -> dict[str, Row]:
    """The decisive events' metrics rows, from the summary or, before there is one, from the rows so far."""
    found = run.summary.get("events")
    if found:
        return {name: event["metrics"] for name, event in found.items() if name in NAMES}
    chosen: dict[str, Row] = {}
    for stage in ("sft", "ppo"):
        rows = [row for row in run.metrics if row["stage"] == stage]
        if rows and stage == "sft":
            chosen["sft_start"] = rows[0]
            if any(row.get("ood_accuracy") is not None for row in rows):
                chosen["sft_peak"] = max(rows, key=lambda row: row.get("ood_accuracy") or 0.0)
        if rows:
            chosen[f"{stage}_end"] = rows[-1]
    return chosen


def headlines(run: RunData) -> list[tuple[str, str]]:
    """(figure, what it is) of the cards at the top of the page."""
    cards = [(percent(run.metrics[-1].get("id_accuracy")), "ID at the end")]
    for name, row in events(run).items():
        if name in ("sft_peak", "sft_end", "ppo_end"):
            cards.append((percent(row.get("ood_accuracy")), f"OOD, {NAMES[name]}"))
    share = run.summary.get("tracking_share")
    if share is not None:
        cards.append((percent(share), "of the run's time spent tracking"))
    return cards


def _test(run: RunData, pair: str) -> Row | None:
    tests: dict[str, Any] = run.summary.get("tests", {}).get(pair, {})
    shift = run.metrics[-1].get("ood_shift")
    return tests.get(str(shift))


def verdict(run: RunData) -> str:
    """What happened, in a few sentences; differences that could be chance are called so."""
    found = events(run)
    sentences = []
    if "sft_end" in found and "sft_start" in found:
        start, end = found["sft_start"], found["sft_end"]
        sentences.append(
            f"Supervised fine-tuning took accuracy on the task as trained (ID) from "
            f"{percent(start.get('id_accuracy'))} to {percent(end.get('id_accuracy'))}."
        )
        peak = found.get("sft_peak")
        if peak is not None and end.get("ood_accuracy") is not None:
            top, left = peak.get("ood_accuracy") or 0.0, end["ood_accuracy"]
            lost = (top - left) / top if top > 0 else 0.0
            at = f"step {peak['step']}"
            ended = "ended" if run.summary else "is now"
            words = f"On the changed task (OOD) it was best at {at}, {percent(top)}, and {ended} at {percent(left)}"
            sentences.append(
                f"{words}: {percent(lost)} of the peak was lost."
                if lost >= 0.1
                else f"{words}: no loss to speak of."
            )
    if "ppo_end" in found:
        end = found["ppo_end"]
        before = found.get("sft_end") or found.get("ppo_start") or run.metrics[0]
        sentences.append(
            f"Reinforcement learning (PPO) then left ID at {percent(end.get('id_accuracy'))} and OOD at "
            f"{percent(end.get('ood_accuracy'))}, from {percent(before.get('ood_accuracy'))}."
        )
        test = _test(run, "sft_end_to_ppo_end")
        if test is not None:
            p = test["p_value"]
            likely = "a difference that chance explains" if p >= 0.05 else "more than chance explains"
            sentences.append(f"On the same {test['n']} OOD deals that is {likely} (McNemar p = {p:.2g}).")
    spectra = by_event(run.spectra)
    if len(spectra) > 1:
        last = list(spectra.values())[-1]
        turned, moved = mean(rotation(r) for r in last), mean(r.get("sigma_change_rel_mean") for r in last)
        if turned is not None and moved is not None:
            sentences.append(
                f"Meanwhile the leading singular vectors turned by {turned:.3f} rad ({57.29578 * turned:.1f}°) on "
                f"average, while singular values changed by {percent(moved)}."
            )
    return " ".join(sentences)
