"""The run in plain words, from its data alone: the fall, what each branch won back, the limit, and the weights.

What the tests do not show is not claimed: a difference that chance could explain is called one, and before a run is
finished, when there are no tests yet, only figures are told.
"""

from __future__ import annotations

from rlspec.report.data import Row, RunData, by_event
from rlspec.run.branches import (
    decisive_events,
    event_title,
    method_title,
    segment_titles,
    start_name,
    trained_branches,
)
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import Segment, event_of

ALPHA = 0.05  # a p-value under it is more than chance explains
SAME_ROTATION = 0.01  # relative change under which a rotation has stayed


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


def trained(run: RunData) -> str:
    """What trained the model, and whose code."""
    segments = [segment for segment in run.segments if segment.stage != "restore"]
    methods = " and ".join(dict.fromkeys(map(method_title, segments)))
    return f"trained by {methods}" + (" of TRL" if run.config.get("trainer") == "trl" else "")


def headlines(run: RunData) -> list[tuple[str, str]]:
    """(figure, what it is) of the cards at the top of the page."""
    events = decisive_events(run.segments, run.metrics)
    *_, (last, end) = events.items()
    cards = [(percent(end.get("id_accuracy")), f"ID, {event_title(last, run.segments)}")]
    for name, row in events.items():
        if not name.endswith("_start") and row.get("ood_accuracy") is not None:
            cards.append(
                (percent(row["ood_accuracy"]), f"OOD, {event_title(name, run.segments).removeprefix('OOD ')}")
            )
    share = run.summary.get("tracking_share")
    if share is not None:
        cards.append((percent(share), "of the run's time spent tracking"))
    return cards


def paired(run: RunData, before: str, after: str) -> Row | None:
    """The OOD test between two decisive events, once the run is finished."""
    shift = str(run.metrics[-1].get("ood_shift"))
    return run.summary.get("tests", {}).get(f"{before}_to_{after}", {}).get(shift)


def branch_ends(run: RunData) -> list[tuple[Segment, str, Row, Row]]:
    """(branch, name of the event that it starts from, metrics there, metrics at its last event), in order."""
    events = decisive_events(run.segments, run.metrics)
    found = []
    for segment in run.segments:
        start = start_name(segment, events)
        if segment.parent is not None and start in events:
            found.append((segment, start, events[start], events[f"{segment.id}_end"]))
    return found


def turned(run: RunData, row: Row) -> float | None:
    """Mean rotation from the base at an event, radians."""
    return mean(rotation(r) for r in by_event(run.spectra).get(event_of(row), []))


def verdict(run: RunData) -> str:
    """What happened, in a few sentences."""
    return " ".join(paragraphs(run))


def paragraphs(run: RunData) -> list[str]:
    """The same sentences by what they are about: the fall, each branch, the limit, the weights."""
    told = [_fall(run)]
    told += [_recovery(run, *branch) for branch in branch_ends(run)]
    told += [_limit(run), _weights(run)]
    return [" ".join(sentences) for sentences in told if sentences]


def _fall(run: RunData) -> list[str]:
    events = decisive_events(run.segments, run.metrics)
    if "sft_start" not in events:
        return []
    start, end, peak = events["sft_start"], events["sft_end"], events.get("sft_peak")
    if end is start:
        return [_base(start)]
    told = [
        f"Supervised fine-tuning (SFT) took accuracy on the task as trained (ID) from "
        f"{percent(start.get('id_accuracy'))} to {percent(end.get('id_accuracy'))}."
    ]
    if peak is None or end.get("ood_accuracy") is None:
        return told
    top, left = peak["ood_accuracy"], end["ood_accuracy"]
    ended = "ended" if run.summary else "is now"
    words = f"On the changed task (OOD) it was best at step {peak['step']}, {percent(top)}, and {ended}"
    if not top > left:
        return [*told, f"{words} there: nothing was lost."]
    words = f"{words} at {percent(left)}"
    test = paired(run, "sft_peak", "sft_end")
    if test is None:
        return [*told, f"{words}."]
    if test["p_value"] >= ALPHA:
        return [
            *told,
            f"{words}: a difference that chance could explain (McNemar p = {test['p_value']:.2g}).",
        ]
    return [
        *told,
        f"{words}: {_points(top - left)} were lost, more than chance explains (McNemar p = {test['p_value']:.2g}; "
        f"the best step was chosen on the same deals, which favours a fall).",
    ]


def _base(row: Row) -> str:
    """Of a trunk that has not been trained, or not yet."""
    changed = "" if row.get("ood_accuracy") is None else (
        f", and {percent(row['ood_accuracy'])} of the changed one (OOD)"
    )  # fmt: skip
    return f"The base solves {percent(row.get('id_accuracy'))} of the task as trained (ID){changed}."


def _recovery(run: RunData, segment: Segment, start: str, before: Row, after: Row) -> list[str]:
    name = _told(run, segment)
    from_id, to_id = percent(before.get("id_accuracy")), percent(after.get("id_accuracy"))
    low, high = before.get("ood_accuracy"), after.get("ood_accuracy")
    if low is None or high is None:
        return [f"{name} took ID from {from_id} to {to_id}."]
    words = f"{name} {'took' if run.summary else 'has taken'} OOD from {percent(low)} to {percent(high)}"
    ended = f"ID {'went' if run.summary else 'has gone'} from {from_id} to {to_id}."
    test = paired(run, start, f"{segment.id}_end")
    if test is None:
        return [f"{words}.", ended]
    p = f"McNemar p = {test['p_value']:.2g} on the same {test['n']} deals"
    if test["p_value"] >= ALPHA:
        return [f"{words}, a difference that chance could explain ({p}): no recovery is shown.", ended]
    if high < low:
        return [f"{words}: a further loss, more than chance explains ({p}).", ended]
    return [
        f"{words}, more than chance explains ({p}){_share_won_back(run, segment, start, before, after)}.",
        ended,
    ]


def _share_won_back(run: RunData, segment: Segment, start: str, before: Row, after: Row) -> str:
    """What a gain is of the loss before it, where a loss is shown."""
    peak = decisive_events(run.segments, run.metrics).get("sft_peak")
    fall = paired(run, "sft_peak", start)
    if (
        peak is None
        or fall is None
        or fall["p_value"] >= ALPHA
        or not peak["ood_accuracy"] > before["ood_accuracy"]
    ):
        return "; that OOD had been lost before is not shown"
    share = (after["ood_accuracy"] - before["ood_accuracy"]) / (peak["ood_accuracy"] - before["ood_accuracy"])
    if share >= 1:
        return ": all of what had been lost since the best step"
    return f": {100 * share:.0f} % of what had been lost since the best step"


def _limit(run: RunData) -> list[str]:
    """Whether later branches gained as much as the first."""
    branches = trained_branches(run.segments)
    shift = str(run.metrics[-1].get("ood_shift"))
    told = []
    for first, segment in zip(branches[:1] * len(branches), branches[1:]):
        found = run.summary.get("gains", {}).get(f"{first.id}_and_{segment.id}", {}).get(shift)
        if found is None or first.parent is None or segment.parent is None:
            continue
        a, b = found["first_gain"], found["second_gain"]
        early, late = first.parent[1], segment.parent[1]
        test = (
            f"{found['more_in_first']} deals gained more from the early start, {found['more_in_second']} from the "
            f"late one, sign test p = {found['p_value']:.2g}"
        )
        if found["p_value"] >= ALPHA or a == b:
            told.append(
                f"Whether the start from step {late} gained less than that from step {early} is not shown: "
                f"{_points(b)} against {_points(a)} ({test})."
            )
        else:
            words = "less" if b < a else "more"
            told.append(
                f"With the same number of updates the start from step {late} gained {words} than that from step "
                f"{early}: {_points(b)} against {_points(a)} ({test})."
            )
    return told


def _weights(run: RunData) -> list[str]:
    """How far the weights had turned after SFT, and whether reinforcement learning turned them back."""
    told = []
    titles = segment_titles(run.segments)
    events = decisive_events(run.segments, run.metrics)
    trunk = events[f"{run.segments[0].id}_end"]
    angle = turned(run, trunk)
    moved = mean(r.get("sigma_change_rel_mean") for r in by_event(run.spectra).get(event_of(trunk), []))
    if angle is not None and moved is not None and trunk["step"] > 0:
        told.append(
            f"By the end of {titles[run.segments[0].id]} the leading singular vectors had turned "
            f"by {angle:.3f} rad ({57.29578 * angle:.1f}°) from the base on average, while singular values had changed "
            f"by {percent(moved)}."
        )
    groups: dict[str, list[str]] = {}
    branches = trained_branches(run.segments)
    for segment, _, before, after in branch_ends(run):
        low, high = turned(run, before), turned(run, after)
        if segment not in branches or low is None or high is None or after["step"] == 0:
            continue
        kind = "stayed" if abs(high - low) <= SAME_ROTATION * low else "grew" if high > low else "fell"
        groups.setdefault(kind, []).append(f"{titles[segment.id]} ({low:.4f} to {high:.4f} rad)")
    method = method_title((branches or run.segments)[-1])
    meaning = {
        "grew": f"the rotation from the base grew: {method} did not turn the weights back",
        "fell": f"the rotation from the base fell: {method} turned the weights back, part of the way",
        "stayed": "the rotation from the base stayed where it was",
    }
    told += [f"In {_listed(names)} {meaning[kind]}." for kind, names in groups.items()]
    return told


def _told(run: RunData, segment: Segment) -> str:
    if segment.stage == "restore":
        return _restoration(run.config)
    title = segment_titles(run.segments)[segment.id]
    if segment.stage != "ppo" or segment is not run.segments[1]:
        return title
    method = method_title(segment)
    return title.replace(method, f"Reinforcement learning ({method})", 1)


def _restoration(settings: Row) -> str:
    """The settings of the stage restore, in words."""
    modules, rank = settings.get("restore_modules"), settings.get("restore_rank")
    what = ", ".join(map(str, modules)) if isinstance(modules, list) else str(modules)
    return f"Restoring {what} from the base (rank {rank}) after SFT"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
