"""What studies say, from rows whose truth is known; and that their page escapes what it shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlspec.study.cells import Cell, Study
from rlspec.study.findings.choice import choice_sections
from rlspec.study.findings.duration import _what_spectra_add, duration_sections
from rlspec.study.findings.prevention import prevention_sections
from rlspec.study.findings.recovery import crossing, recoveries, resampled, shares
from rlspec.study.findings.section import Section
from rlspec.study.page import render
from rlspec.study.statistics import interval

DEALS = 200
STEPS = (100, 150, 200, 250, 300)
# Share that comes back from each step: 1, 0.8, 0.6, 0.2, 0; under a half from 200 + 50 (0.6 - 0.5) / (0.6 - 0.2) on.
SHARES = (1.0, 0.8, 0.6, 0.2, 0.0)


def outcomes(solved: int) -> str:
    return "1" * solved + "0" * (DEALS - solved)


def row(what: str, step: int, ood: int, seed: int, **more: Any) -> dict[str, Any]:
    figures = {
        "kl_nats": step / 100,
        "validation_loss": (step * 7919) % 101 / 100,
        "entropy_nats": 1 / step if step else 1.0,
        "reward_spread": 1.0,
        "delta_relative": step / 1000,
        "rotation_rad": step / 1e4 + (0.01 if what == "ppo" else 0.0),
        "rotation_beyond_random": 1.0 + (step * 31) % 7,
        "cosine_back": -0.1,
    }
    where = {"cell": f"{what}-{step}-{seed}", "seed": seed, "what": what, "sft_step": step}
    rate = {"id": 0.5, "id_outcomes": outcomes(100), "ood": ood / DEALS, "ood_outcomes": outcomes(ood)}
    return {**where, **rate, **figures, **more}


def duration_rows(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    rows = []
    for seed in seeds:
        rows += [row("base", 0, 40, seed), row("sft", 50, 120, seed)]
        rows += [row("sft", step, 20, seed) for step in STEPS]
        rows += [row("ppo", step, 20 + int(100 * share), seed) for step, share in zip(STEPS, SHARES)]
    return rows


def test_the_share_that_comes_back_is_what_was_put_in() -> None:
    found = recoveries(duration_rows())
    assert found[0].steps == STEPS and shares(found) == pytest.approx(SHARES)
    assert crossing(STEPS, shares(found)) == pytest.approx(212.5)
    drawn = [shares(each)[2] for each in resampled(found, draws=400)]
    low, high = interval([float(value) for value in drawn])
    assert low < 0.6 < high and high - low < 0.3
    assert resampled(found, draws=2)[0][0].peak.shape == (DEALS,)


def test_a_loss_too_small_to_divide_by_has_no_share() -> None:
    rows = duration_rows()
    for each in rows:
        if (each["what"], each["sft_step"]) == ("sft", 100):
            each.update(ood=0.56, ood_outcomes=outcomes(112))
    assert np.isnan(shares(recoveries(rows))[0])


@pytest.mark.parametrize(
    ("share", "where"),
    [
        ((0.9, 0.7, 0.6), None),  # never
        ((0.4, 0.2, 0.1), 1.0),  # always
        ((0.6, 0.4, 0.6, 0.4), 3.5),  # for good
        ((np.nan, 0.75, 0.25), 2.5),
    ],
)
def test_the_point_of_no_return_is_the_last_crossing(share: tuple[float, ...], where: float | None) -> None:
    assert crossing(range(1, len(share) + 1), np.array(share)) == where


def test_the_findings_of_duration_are_plain() -> None:
    back, no_return, prediction, weights = duration_sections(duration_rows())
    assert "peaks at 60.0%" in back.text and "100%, comes back from SFT step 100" in back.text
    assert back.chart is not None and len(back.rows) == 5
    assert "From SFT step 212 on" in no_return.text or "From SFT step 213 on" in no_return.text
    values = {cells[0]: cells[1] for cells in no_return.rows}
    assert values["KL to the base"] == "2.12" or values["KL to the base"] == "2.13"
    # KL and rotation both grow with the steps, and rank the shares alike.
    assert (
        "Spectra add nothing here that could be told from chance: the best |ρ| differ by +0.00"
        in prediction.text
    )
    assert "So it does from" not in no_return.text
    assert "further from the base in 10 of 10" in weights.text


@pytest.mark.parametrize(
    ("noise", "told"),
    [
        (("kl_nats",), "Rotation ranks better than everything else here"),
        (("rotation_rad", "rotation_beyond_random"), "Rotation ranks worse than simpler figures here"),
        ((), "Spectra add nothing here that could be told from chance"),
    ],
)  # fmt: skip
def test_what_spectra_add_is_told_by_an_interval(noise: tuple[str, ...], told: str) -> None:
    """Of figures that rank the shares of 40 pairs perfectly, but for those that are noise."""
    draw = np.random.default_rng(0)
    points: list[tuple[dict[str, Any], float]] = []
    for share in np.linspace(0, 1, 40):
        figures = {"kl_nats": share, "rotation_rad": share}
        points.append(({n: draw.random() if n in noise else v for n, v in figures.items()}, float(share)))
    strength = dict.fromkeys(("kl_nats", "rotation_rad"), 1.0)
    assert _what_spectra_add(points, strength).startswith(told)


def test_steps_that_fell_under_one_half_before_are_told() -> None:
    rows = duration_rows()
    for each in rows:
        if (each["what"], each["sft_step"]) == ("ppo", STEPS[0]):
            each.update(ood=0.15, ood_outcomes=outcomes(30))
    (_, no_return, *_) = duration_sections(rows)
    assert f"So it does from {STEPS[0]}, between steps that won back more" in no_return.text


def choice_row(what: str, select: int, report: int, *, keeps: float = 0.9, **more: Any) -> dict[str, Any]:
    place = {"part": "top", "mode": "directions", "modules": "q,k,v", "layers": None, "shift_k": 0}
    found = row(what, 300, report, 0, change_relative=0.1, select_id=keeps, select_ood=select / DEALS)
    return {**found, **place, "strength": 1.0, "rank": 0.2, **more}


def test_settings_are_chosen_on_the_deals_of_the_choice_and_told_by_the_others() -> None:
    rows = [
        choice_row("base", 40, 40),
        choice_row("sft", 20, 20),
        choice_row("line", 60, 60, strength=0.5),
        choice_row("restoration", 150, 110, rank=0.2),
        choice_row("restoration", 140, 190, rank=0.5),  # better where nobody may look
        choice_row("restoration", 199, 199, rank=1.0, keeps=0.1),  # costs the task itself
        *(choice_row("restoration", 150, ood, rank=0.2, shift_k=by) for by, ood in ((-1, 100), (1, 140))),
    ]
    chosen, sensitivity = choice_sections(rows, by="modules")
    assert "rank 0.2" in chosen.text and "55.0% OOD" in chosen.text and "rank 0.5" not in chosen.text
    # 90 deals gained against the tuned, 50 against the line, none lost; Holm: times 3 and 2, the line's own is last.
    assert (
        f"p = {3 * 2 * 0.5**90:.2g}, against the straight line at equal ID p = {2 * 2 * 0.5**50:.2g}"
        in chosen.text
    )
    assert sensitivity.rows[0][2:6] == ["50.0%", "55.0%", "70.0%", "20.0%"]


def test_ways_to_train_are_compared_where_they_reach_the_same_id() -> None:
    rows = [
        row("base", 0, 40, 0, select_id=0.3, select_ood=0.2),
        row("sft", 50, 100, 0, arm="plain", select_id=0.6, select_ood=0.5),
        row("sft", 300, 20, 0, arm="plain", select_id=0.95, select_ood=0.1),
        row("sft", 300, 60, 0, arm="<b>", select_id=0.92, select_ood=0.3),
    ]
    tokens = {each["cell"]: 1_000_000 for each in rows}
    half, _, most = prevention_sections(rows, tokens)
    assert "plain has the highest OOD accuracy, 50.0%" in half.text
    assert "<b> has the highest OOD accuracy, 30.0%" in most.text
    assert most.rows[0][4] == "1.00 M"


def test_the_page_escapes_every_text() -> None:
    hostile = "<script>alert(1)</script>"
    cell = Cell("measure", {"model": hostile, "seed": 0})
    whole = duration_sections(duration_rows())
    section = Section(hostile, hostile, (hostile,), [[hostile]], whole[0].chart, hostile)
    page = render(Study(hostile, [cell]), [section, replace(section, chart=None)])
    assert page.count("<script") == 1 and "<script>alert" not in page and page.count("&lt;script") >= 8
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
