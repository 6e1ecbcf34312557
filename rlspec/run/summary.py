"""The end of a run: its decisive events, paired tests between them, and where the time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rlspec.io.jsonl import Row
from rlspec.run.config import TrackConfig
from rlspec.run.evaluation import describe_test, paired_test
from rlspec.run.folder import RunFolder
from rlspec.run.rows import mean, rotation

Event = tuple[str, int]


def summarize(config: TrackConfig, folder: RunFolder) -> Row:
    """The contents of summary.json.

    ``events`` names the decisive ones (start, OOD peak of SFT, end of each stage) with their metrics row and,
    per module, their spectra; ``tests`` are McNemar tests between them on the same deals. The peak is chosen
    by the outcomes that it is tested on, so its test flatters the peak; ``note`` says so.
    """
    metrics, spectra, evals = folder.metrics(), folder.spectra(), folder.evals()
    chosen = _decisive_events(config, metrics)
    by_event = {(row["stage"], row["step"]): row for row in metrics}
    events = {
        name: {"metrics": by_event[event], "spectra": module_means(spectra, event)}
        for name, event in chosen.items()
    }
    pairs = [
        (before, after)
        for before, after in (("sft_peak", "sft_end"), ("sft_end", "ppo_end"), ("ppo_start", "ppo_end"))
        if before in chosen and after in chosen
    ]
    tests = {f"{a}_to_{b}": _tests(evals, chosen[a], chosen[b]) for a, b in pairs}
    last = metrics[-1]
    return {
        "settings": config.to_settings(),
        "events": events,
        "tests": tests,
        "note": "the OOD peak is chosen on the deals that its test uses, so that test favours a fall from it",
        "seconds": {
            name.removeprefix("seconds_"): last[name] for name in last if name.startswith("seconds_")
        },
        "tracking_share": last["seconds_tracking"] / last["seconds_wall"],
    }


def _decisive_events(config: TrackConfig, metrics: Sequence[Row]) -> dict[str, Event]:
    """Name -> (stage, step)."""
    chosen: dict[str, Event] = {}
    for stage in config.stages:
        rows = [row for row in metrics if row["stage"] == stage]
        # PPO's start is SFT's end unless it began at an earlier checkpoint or there was no SFT.
        if stage == "sft" or "sft" not in config.stages or config.ppo_from not in (None, config.sft_steps):
            chosen[f"{stage}_start"] = (stage, rows[0]["step"])
        if stage == "sft" and config.ood_shift is not None:
            peak = max(rows, key=lambda row: row["ood_accuracy"])
            chosen["sft_peak"] = (stage, peak["step"])
        chosen[f"{stage}_end"] = (stage, rows[-1]["step"])
    return chosen


def module_means(spectra: Sequence[Row], event: Event) -> dict[str, dict[str, float | None]]:
    """Per module, the mean over its matrices of the main spectral figures at one event; None if undefined."""
    by_module: dict[str, list[Row]] = defaultdict(list)
    for row in spectra:
        if (row["stage"], row["step"]) == event:
            by_module[row["module"]].append(row)
    names = ("angle_left_mean_rad", "angle_right_mean_rad", "sigma_change_rel_max", "delta_relative")
    means: dict[str, dict[str, float | None]] = {}
    for module, rows in by_module.items():
        means[module] = {name: mean(row.get(name) for row in rows) for name in names}
        means[module]["rotation_rad"] = mean(rotation(row) for row in rows)
    return means


def _tests(evals: Sequence[Row], before: Event, after: Event) -> dict[str, Row]:
    """Shift -> McNemar test between two events."""
    at = {(row["stage"], row["step"], row["shift"]): row for row in evals}
    shifts = [shift for stage, step, shift in at if (stage, step) == before]
    return {shift: paired_test(at[before + (shift,)], at[after + (shift,)]) for shift in shifts}


_NAMES = {
    "sft_start": "start",
    "sft_peak": "OOD peak",
    "sft_end": "SFT end",
    "ppo_start": "PPO start",
    "ppo_end": "PPO end",
}


def summary_lines(summary: Row) -> list[str]:
    """What `rlspec track` prints at its end."""
    ood = next(iter(summary["events"].values()))["metrics"].get("ood_shift")
    ood_title = f"OOD ({ood})" if ood else "OOD"
    head = (
        f"{'event':<10}{'step':>9}{'loss':>8}  {'ID':<22}{ood_title:<22}{'KL':>7}{'rotation':>10}{'sigma':>9}"
    )
    lines = ["", head]
    for name, event in summary["events"].items():
        row = event["metrics"]
        spectra = event["spectra"].values()
        lines.append(
            f"{_NAMES[name]:<10}{row['stage'] + ' ' + str(row['step']):>9}"
            f"{_number(row.get('loss'), '.3f'):>8}  "
            f"{_share(row, 'id'):<22}{_share(row, 'ood'):<22}"
            f"{_number(row['kl_base_nats_per_token'], '.3f'):>7}"
            f"{_number(mean(module['rotation_rad'] for module in spectra), '.4f'):>10}"
            f"{_number(mean(module['sigma_change_rel_max'] for module in spectra), '.2%'):>9}"
        )
    lines.append(
        "KL: nats per answer token from the start's model; rotation: mean principal angle to the start, "
        "rad; sigma: largest relative change of a singular value; both means over matrices"
    )
    lines.append("")
    for pair, tests in summary["tests"].items():
        before, after = (_NAMES[name] for name in pair.split("_to_"))
        lines += [f"{before} -> {after}, {describe_test(test)}" for test in tests.values()]
    if "sft_peak_to_sft_end" in summary["tests"]:
        lines.append(f"({summary['note']})")
    seconds = summary["seconds"]
    lines.append("")
    lines.append(
        f"time    {seconds['wall']:.0f} s: training {seconds['training']:.0f}, evaluating "
        f"{seconds['evaluating']:.0f}, tracking {seconds['tracking']:.1f} ({summary['tracking_share']:.1%} "
        f"of the wall time), KL {seconds['kl']:.1f}, saving {seconds['saving']:.1f}"
    )
    return lines


def _share(row: Row, prefix: str) -> str:
    if row.get(f"{prefix}_accuracy") is None:
        return "-"
    accuracy, low, high = (row[f"{prefix}_{name}"] for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
