"""What the page and the command say happened: each outcome on rows made for it, and nothing that they do not show."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from report_toys import make_run, make_tree

from rlspec.report import write_report
from rlspec.report.data import read_run
from rlspec.report.verdict import headlines, trained, verdict
from rlspec.run.evaluation import compare_gains
from rlspec.run.folder import RunFolder
from rlspec.run.segments import Event
from rlspec.run.summary import summary_lines
from rlspec.tasks import mcnemar

FALL: dict[Event, int] = {("sft", 0): 20, ("sft", 50): 55, ("sft", 100): 5, ("sft", 300): 10}
EARLY, LATE = "ppo-from-100", "ppo-from-300"
TREE = {**FALL, (EARLY, 0): 5, (EARLY, 20): 56, (LATE, 0): 10, (LATE, 20): 24}


def told(tmp_path: Path, ood: dict[Event, int], **settings: Any) -> str:
    return verdict(read_run(make_tree(tmp_path / "run", ood, **settings)))


def test_fall_recovery_and_limit_are_told_with_their_tests(tmp_path: Path) -> None:
    text = told(tmp_path, TREE)
    assert (
        "On the changed task (OOD) it was best at step 50, 55.0 %, and ended at 10.0 %: 45.0 points were lost, more "
        "than chance explains (McNemar p = 5.7e-14; the best step was chosen on the same deals, which favours a fall)."
    ) in text
    assert (
        "Reinforcement learning (PPO) from step 100 took OOD from 5.0 % to 56.0 %, more than chance explains (McNemar "
        "p = 8.9e-16 on the same 100 deals): all of what had been lost since the best step."
    ) in text
    assert (
        "PPO from step 300 took OOD from 10.0 % to 24.0 %, more than chance explains (McNemar p = 0.00012 on the same "
        "100 deals): 31 % of what had been lost since the best step."
    ) in text
    # Deals 5 to 9 are won by the first branch alone, 24 to 55 as well; none by the second alone.
    assert (
        "With the same number of updates the start from step 300 gained less than that from step 100: 14.0 points "
        "against 51.0 points (37 deals gained more from the early start, 0 from the late one, sign test p = 1.5e-11)."
    ) in text


@pytest.mark.parametrize(
    ("after", "wanted", "unwanted"),
    [
        (10, "took OOD from 10.0 % to 10.0 %, a difference that chance could explain", "won back"),
        (
            13,
            "took OOD from 10.0 % to 13.0 %, a difference that chance could explain (McNemar p = 0.25",
            "had been lost",
        ),
        (2, "took OOD from 10.0 % to 2.0 %: a further loss, more than chance explains", "had been lost"),
        (30, "to 30.0 %, more than chance explains", "no recovery is shown"),
    ],
)
def test_each_outcome_of_one_branch(after: int, wanted: str, unwanted: str, tmp_path: Path) -> None:
    ood = {**FALL, ("ppo", 0): 10, ("ppo", 20): after}
    text = told(tmp_path, ood, ppo_from=(300,))
    assert wanted in text and unwanted not in text
    assert "Reinforcement learning (PPO) took" in text
    assert "gained less" not in text and "gained more" not in text


def test_a_gain_after_no_loss_is_no_recovery(tmp_path: Path) -> None:
    ood = {("sft", 0): 20, ("sft", 300): 40, ("ppo", 0): 40, ("ppo", 20): 60}
    text = told(tmp_path, ood, ppo_from=(300,))
    assert "it was best at step 300, 40.0 %, and ended there: nothing was lost." in text
    assert "more than chance explains" in text and "that OOD had been lost before is not shown" in text
    assert "of what had been lost" not in text


def test_a_fall_that_chance_explains_is_called_one(tmp_path: Path) -> None:
    ood = {("sft", 0): 20, ("sft", 50): 43, ("sft", 300): 40, ("ppo", 0): 40, ("ppo", 20): 60}
    text = told(tmp_path, ood, ppo_from=(300,))
    assert "43.0 %, and ended at 40.0 %: a difference that chance could explain (McNemar p = 0.25)." in text
    assert "were lost" not in text and "that OOD had been lost before is not shown" in text


def test_a_branch_from_before_the_best_step_has_nothing_to_win_back(tmp_path: Path) -> None:
    ood = {**FALL, (EARLY.replace("100", "0"), 0): 20, ("ppo-from-0", 20): 60, (LATE, 0): 10, (LATE, 20): 24}
    text = told(tmp_path, ood, ppo_from=(0, 300))
    assert "PPO) from step 0 took OOD from 20.0 % to 60.0 %" in text
    assert (
        text.split("from step 0 took")[1]
        .split("ID went")[0]
        .endswith("; that OOD had been lost before is not shown. ")
    )


@pytest.mark.parametrize(
    ("early", "late", "wanted"),
    [
        (8, 60, "gained more than that from step 100: 50.0 points against 3.0 points"),
        (
            15,
            20,
            "Whether the start from step 300 gained less than that from step 100 is not shown: 10.0 points",
        ),
        (
            15,
            22,
            "Whether the start from step 300 gained less than that from step 100 is not shown: 12.0 points",
        ),
    ],
)
def test_a_limit_is_told_where_it_is_shown(early: int, late: int, wanted: str, tmp_path: Path) -> None:
    text = told(tmp_path, {**TREE, (EARLY, 20): early, (LATE, 20): late})
    assert wanted in text and "gained less than that from step 100: " not in text


@pytest.mark.parametrize(
    ("early", "late", "wanted"),
    [
        (
            0.036, 0.044,
            "In PPO from step 100 (0.0200 to 0.0360 rad) and PPO from step 300 (0.0330 to "
            "0.0440 rad) the rotation from the base grew: PPO did not turn the weights back.",
        ),
        (0.01, 0.044, "from step 100 (0.0200 to 0.0100 rad) the rotation from the base fell: PPO turned the weights"),
        (0.0201, 0.044, "from step 100 (0.0200 to 0.0201 rad) the rotation from the base stayed where it was."),
    ],
)  # fmt: skip
def test_whether_the_weights_turned_back(early: float, late: float, wanted: str, tmp_path: Path) -> None:
    angles = {("sft", 300): 0.033, (EARLY, 0): 0.02, (EARLY, 20): early, (LATE, 0): 0.033, (LATE, 20): late}
    text = told(tmp_path, TREE, angles=angles)
    assert wanted in text
    assert "turned by 0.033 rad (1.9°) from the base on average" in text
    assert ("turned the weights back, part" in text) == (early < 0.02)


@pytest.mark.parametrize(
    ("settings", "method", "whose"),
    [
        ({}, "PPO", ""),
        ({"further": {"advantages": "gae"}}, "PPO", ""),
        ({"further": {"advantages": "grpo"}}, "GRPO", ""),
        ({"further": {"advantages": "rloo"}}, "RLOO", ""),
        ({"trainer": "trl"}, "GRPO", " of TRL"),
    ],
)
def test_reinforcement_learning_has_the_name_of_what_trained(
    settings: dict[str, Any], method: str, whose: str, tmp_path: Path
) -> None:
    angles = {("sft", 300): 0.033, (EARLY, 0): 0.02, (EARLY, 20): 0.036, (LATE, 0): 0.033, (LATE, 20): 0.044}
    folder = make_tree(tmp_path / "run", TREE, angles=angles, ppo_updates=20, **settings)
    page = write_report(folder).read_text()
    shown = page[: page.index("<h2>Configuration")] + "\n".join(summary_lines(RunFolder(folder).summary()))
    assert f"trained by SFT and {method}{whose};" in shown
    assert f"Reinforcement learning ({method}) from step 100 took" in shown
    assert f"grew: {method} did not turn the weights back" in shown
    assert f"{method} updates count their optimizer steps" in shown
    assert f"start of {method} from step 100 -&gt; end" in shown.replace("->", "-&gt;")
    assert set(re.findall(r"PPO|GRPO|RLOO", shown)) == {method}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "cross entropy"),
        ({"sft_loss": "dft"}, "DFT"),
        ({"sft_loss": "dft", "sft_kl_coef": 0.1}, "DFT and KL to the start"),
    ],
)
def test_the_loss_of_sft_has_its_name(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    page = write_report(make_tree(tmp_path / "run", TREE, further=settings)).read_text()
    assert f"</svg>SFT, {name}</span>" in page


def test_before_the_end_figures_are_told_and_no_more(tmp_path: Path) -> None:
    begun = {event: solved for event, solved in TREE.items() if event[0] != LATE}
    text = told(tmp_path, begun, finished=False)
    assert "it was best at step 50, 55.0 %, and is now at 10.0 %." in text
    assert "from step 100 has taken OOD from 5.0 % to 56.0 %." in text or "has taken OOD" in text
    assert "chance" not in text and "lost" not in text and "gained" not in text


def test_of_a_base_that_is_not_trained_yet_no_training_is_told(tmp_path: Path) -> None:
    text = told(tmp_path, {("sft", 0): 20}, finished=False)
    assert text == "The base solves 50.0 % of the task as trained (ID), and 20.0 % of the changed one (OOD)."
    page = write_report(tmp_path / "run").read_text()
    steps = re.findall(r'<text class="x"[^>]*>([^<]+)<', page)
    assert steps and {*steps} == {"0", "1"}  # no fractions of a step


def test_without_another_task_nothing_is_said_of_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("ood_accuracy", "ood_shift"):
        path = folder / "metrics.jsonl"
        path.write_text(path.read_text().replace(f'"{name}"', f'"other_{name}"'))
    text = verdict(read_run(folder))
    assert "OOD" not in text and "took ID from" in text


def test_the_page_and_the_command_draw_and_tell_the_branches(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "run", TREE)
    page = write_report(folder).read_text()
    assert page.count("PPO from step 100") > 5 and "What was won back" in page
    assert f"{verdict(read_run(folder))}".replace("(", "")[:40] in page.replace("(", "")
    summary = RunFolder(folder).summary()
    assert [row["segment"] for row in summary["segments"]] == ["sft", EARLY, LATE]
    lines = "\n".join(summary_lines(summary))
    assert "start of PPO from step 100 -> end of PPO from step 100, shift both: 5.0% -> 56.0%" in lines
    assert "OOD peak of SFT -> start of PPO from step 100, shift both: 55.0% -> 5.0%" in lines
    assert (
        "gain of PPO from step 100 against PPO from step 300, shift both: +51.0 against +14.0 points" in lines
    )


def test_a_restoration_is_told_beside_the_branches(tmp_path: Path) -> None:
    ood = {**TREE, ("restore", 0): 10, ("restore", 1): 62}
    angles = {
        ("sft", 300): 0.03,
        (LATE, 0): 0.03,
        (LATE, 20): 0.04,
        ("restore", 0): 0.03,
        ("restore", 1): 0.03,
    }
    folder = make_tree(tmp_path / "run", ood, angles=angles)
    run = read_run(folder)
    text = verdict(run)
    assert (
        "Restoring mlp from the base (rank 0.5) after SFT took OOD from 10.0 % to 62.0 %, more than chance explains "
        "(McNemar p = 4.4e-16 on the same 100 deals): all of what had been lost since the best step. ID went from "
        "50.0 % to 50.0 %."
    ) in text
    # It is no training: neither a start that gained less or more, nor a rotation that training did not turn back.
    assert text.count("With the same number of updates") == 1 and "start from step 300 gained less" in text
    assert "In PPO from step 300 (0.0300 to 0.0400 rad) the rotation from the base grew: PPO did not" in text
    assert "restoration" not in text and trained(run) == "trained by SFT and PPO"
    assert headlines(run)[0] == ("50.0 %", "ID, restored") and ("62.0 %", "OOD, restored") in headlines(run)
    summary = RunFolder(folder).summary()
    assert summary["tests"]["sft_end_to_restore_end"]["both"]["gained"] == 52
    assert not any("restore" in pair for pair in summary["gains"])
    assert "end of SFT -> restored, shift both: 10.0% -> 62.0%" in "\n".join(summary_lines(summary))
    page = write_report(folder).read_text()
    # Two branches begin at one place of the axis: one line, one text.
    assert ">PPO from step 300, restoration</text>" in page and ">restoration</text>" not in page


def test_gains_are_compared_deal_by_deal() -> None:
    rng = random.Random(0)
    rows = [
        {"shift": "both", "n": 60, "turns": 5, "seed": 0, "outcomes": "".join(rng.choices("01", k=60))}
        for _ in range(4)
    ]
    found = compare_gains((rows[0], rows[1]), (rows[2], rows[3]))
    changes = [
        (int(b) - int(a)) - (int(d) - int(c))
        for a, b, c, d in zip(*(row["outcomes"] for row in rows), strict=True)
    ]
    more, less = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    assert (found["more_in_first"], found["more_in_second"]) == (more, less)
    assert found["p_value"] == mcnemar([True] * more + [False] * less, [False] * more + [True] * less).p_value
    assert found["first_gain"] - found["second_gain"] == pytest.approx(sum(changes) / 60)
    with pytest.raises(ValueError, match="different deals"):
        compare_gains((rows[0], rows[1]), (rows[2], rows[3] | {"seed": 1}))
