"""The findings of `duration`: what RL brings back, until when, what tells it beforehand, and where the weights go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlspec.report.chart import Series, line_chart
from rlspec.study.findings.recovery import LEAST_LOSS, Recovery, crossing, recoveries, resampled, shares
from rlspec.study.findings.section import Row, Section, between, pooled
from rlspec.study.statistics import auc, auc_interval, bootstrap, interval, spearman_interval
from rlspec.tasks.stats import spearman

#: What is known when RL starts -> in words. The last three are of the weights' spectra.
PREDICTORS = {
    "sft_step": "SFT steps",
    "kl_nats": "KL to the base",
    "validation_loss": "validation loss",
    "entropy_nats": "token entropy",
    "reward_spread": "spread of rewards (advantages)",
    "delta_relative": "‖ΔW‖/‖W‖",
    "rotation_rad": "rotation",
    "rotation_beyond_random": "rotation over a random update's",
}
SPECTRAL = ("rotation_rad", "rotation_beyond_random")
_AT_RETURN = ("kl_nats", "rotation_rad", "delta_relative", "ood")


def duration_sections(rows: Sequence[Row]) -> list[Section]:
    found = recoveries(rows)
    replicates = resampled(found)
    return [
        _what_comes_back(rows, found, replicates),
        _no_return(rows, found, replicates),
        _prediction(rows, found),
        _way_of_the_weights(rows),
    ]


def _at(rows: Sequence[Row], what: str, step: int) -> list[Row]:
    return [row for row in rows if row["what"] == what and row["sft_step"] == step]


def _what_comes_back(rows: Sequence[Row], found: list[Recovery], replicates: list[list[Recovery]]) -> Section:
    steps, share = found[0].steps, shares(found)
    drawn = np.array([shares(each) for each in replicates])
    cells, band = [], []
    for i, step in enumerate(steps):
        known = [float(value) for value in drawn[:, i] if not np.isnan(value)]
        limits = interval(known) if known and not np.isnan(share[i]) else None
        before, after = _at(rows, "sft", step), _at(rows, "ppo", step)
        told = "–" if limits is None else f"{share[i]:.0%} {between(limits, '.0%')}"
        cells.append([str(step), pooled(before, "ood"), pooled(after, "ood"), told,
                      pooled(before, "id"), pooled(after, "id")])  # fmt: skip
        if limits is not None:
            band.append((float(step), max(0.0, limits[0]), max(0.0, limits[1])))
    points = [(float(s), max(0.0, float(v))) for s, v in zip(steps, share) if not np.isnan(v)]
    chart = line_chart(
        [Series("share of the lost OOD accuracy that comes back", points, "c1", band)],
        x_label="SFT steps before PPO",
        y_label="share",
        y_format=lambda v: f"{100 * v:.0f} %",
        x_range=(float(steps[0]), float(max(steps[-1], steps[0] + 1))),
    )
    peak = float(np.mean([r.peak.mean() for r in found]))
    best = max(points, key=lambda p: p[1], default=None)
    told = (
        "" if best is None else f" The largest share, {best[1]:.0%}, comes back from SFT step {best[0]:.0f}."
    )
    text = f"SFT's OOD accuracy peaks at {peak:.1%} (mean over {len(found)} seeds).{told}"
    note = (
        "Lost is the peak of SFT, chosen on these deals, less the accuracy where PPO starts; steps that lost under "
        f"{LEAST_LOSS:.0%} have no share. Accuracies over all seeds with 95 % Wilson intervals; shares with bootstrap "
        "intervals over seeds and deals. Of one seed, an interval says nothing about other seeds."
    )
    head = ("PPO from", "OOD before", "OOD after", "share back", "ID before", "ID after")
    return Section("What reinforcement learning brings back", text, head, cells, chart, note)


def _no_return(rows: Sequence[Row], found: list[Recovery], replicates: list[list[Recovery]]) -> Section:
    steps = found[0].steps
    at = crossing(steps, shares(found))
    drawn = [crossing(steps, shares(each)) for each in replicates]
    known = [value for value in drawn if value is not None]
    title = "The point of no return"
    if at is None:
        return Section(
            title, "At the last SFT step measured PPO still brings back half or more, or it is not known."
        )
    told = []
    for name in _AT_RETURN:
        values = [float(np.mean([row[name] for row in _at(rows, "sft", step)])) for step in steps]
        spread = interval([float(np.interp(value, steps, values)) for value in known])
        told.append(
            [
                PREDICTORS.get(name, "OOD accuracy"),
                f"{np.interp(at, steps, values):.3g}",
                between(spread, ".3g"),
            ]
        )
    share = len(known) / len(drawn)
    text = (
        f"From SFT step {at:.0f} on {between(interval(known), '.0f')} PPO brings back less than half of what was lost "
        f"(so in {share:.0%} of the bootstrap replicates)."
    )
    early = [str(step) for step, value in zip(steps, shares(found)) if step < at and value < 0.5]
    if early:
        text += f" So it does from {', '.join(early)}, between steps that won back more: single runs scatter."
    return Section(title, text, ("there", "value", "95 % interval"), told)


def _prediction(rows: Sequence[Row], found: list[Recovery]) -> Section:
    points: list[tuple[Row, float]] = []
    for row_seed, each in zip(dict.fromkeys(row["seed"] for row in rows), found):
        for step, share in zip(each.steps, shares([each])):
            if not np.isnan(share):
                (row,) = (r for r in _at(rows, "sft", step) if r["seed"] == row_seed)
                points.append((row, float(share)))
    title = "What tells beforehand how much will come back"
    y = [share for _, share in points]
    won = [share >= 0.5 for share in y]
    cells, strength = [], {}
    for name, words in PREDICTORS.items():
        x = [float(row[name]) for row, _ in points]
        rho = spearman(x, y)
        if rho is None:
            continue
        strength[name] = abs(rho)
        area = auc([-v for v in x], won)
        limits = auc_interval([-v for v in x], won)
        told = "–" if area is None else f"{area:.2f} {between(limits, '.2f')}"
        cells.append([words, f"{rho:+.2f} {between(spearman_interval(x, y), '+.2f')}", told])
    if not strength:
        return Section(title, "Too few shares are known to say.")
    best = max(strength, key=strength.__getitem__)
    text = (
        f"The best rank correlation with the share is that of {PREDICTORS[best]} (|ρ| = {strength[best]:.2f}). "
        f"{_what_spectra_add(points, strength)}"
    )
    note = (
        f"Spearman's ρ over {len(points)} pairs of seed and step, and the AUC of telling shares of a half or more by "
        "small values of the figure, with bootstrap intervals over the pairs. Pairs of one seed follow each other, so "
        "the intervals are too narrow rather than too wide."
    )
    return Section(title, text, ("at the start of PPO", "Spearman ρ", "AUC"), cells, note=note)


def _what_spectra_add(points: Sequence[tuple[Row, float]], strength: dict[str, float]) -> str:
    """Whether the best of the weights' spectra ranks the shares better than the best of what is simpler.

    Both bests are chosen anew in each resample, so that choosing among several counts on both sides.
    """
    kinds = (
        [name for name in strength if name in SPECTRAL],
        [name for name in strength if name not in SPECTRAL],
    )
    if not all(kinds):
        return "There is nothing to compare spectra with."

    def strongest(drawn: Sequence[tuple[Row, float]], names: Sequence[str]) -> float:
        y = [share for _, share in drawn]
        return max(abs(spearman([float(row[name]) for row, _ in drawn], y) or 0.0) for name in names)

    def gain(drawn: Sequence[tuple[Row, float]]) -> float:
        return strongest(drawn, kinds[0]) - strongest(drawn, kinds[1])

    low, high = interval(bootstrap(points, gain))
    told = f"the best |ρ| differ by {gain(points):+.2f} {between((low, high), '+.2f')}"
    if low > 0:
        return f"Rotation ranks better than everything else here: {told}."
    if high < 0:
        return f"Rotation ranks worse than simpler figures here: {told}."
    return f"Spectra add nothing here that could be told from chance: {told}."


def _way_of_the_weights(rows: Sequence[Row]) -> Section:
    cells, changes, cosines = [], [], []
    for row in rows:
        if row["what"] != "ppo":
            continue
        (before,) = (r for r in _at(rows, "sft", row["sft_step"]) if r["seed"] == row["seed"])
        change, back = row["rotation_rad"] - before["rotation_rad"], row["cosine_back"]
        changes.append(change)
        cosines.append(back)
        cells.append([str(row["seed"]), str(row["sft_step"]), f"{before['rotation_rad']:.4f}",
                      f"{row['rotation_rad']:.4f}", f"{change:+.4f}",
                      "–" if back is None else f"{back:+.3f}"])  # fmt: skip
    away = sum(change > 0 for change in changes)
    text = (
        f"PPO turned the weights further from the base in {away} of {len(changes)} branches, and back in "
        f"{sum(change < 0 for change in changes)}."
    )
    head = (
        "seed",
        "PPO from",
        "rotation before, rad",
        "after, rad",
        "change, rad",
        "cosine with the way back",
    )
    note = "The cosine is that of PPO's whole update with the way to the base: 1 is straight back, below 0 is further."
    return Section("Does reinforcement learning turn the weights back?", text, head, cells, note=note)
