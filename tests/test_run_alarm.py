"""The line of a run's summary that names the step to go back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_toys import make_tree

from rlspec.run.folder import RunFolder
from rlspec.run.summary import summary_lines
from rlspec.tasks.alarm import Alarm, binomial_tail, correction
from rlspec.tasks.scores import Score


def alarm_lines(folder: Path) -> list[str]:
    return [line for line in summary_lines(RunFolder(folder).summary(), folder) if "go back to" in line]


def test_a_run_whose_ood_accuracy_fell_is_told_the_checkpoint_of_its_peak(tmp_path: Path) -> None:
    ood = {("sft", 0): 44, ("sft", 50): 128, ("sft", 100): 8, ("sft", 150): 0}
    run = make_tree(tmp_path / "x", ood, deals=234, sft_steps=150, stages=("sft",))
    p = binomial_tail(120, 120) * correction(2)
    assert alarm_lines(run) == [
        f"sft: OOD (both) fell from 54.7 % at step 50 to 3.4 % at step 100 (p = {p:.2g}): go back to "
        f"{run / 'checkpoints' / 'sft-50'}"
    ]


def test_a_peak_without_a_checkpoint_is_told_by_its_step(tmp_path: Path) -> None:
    ood = {("sft", 0): 44, ("sft", 50): 128, ("sft", 100): 8}
    settings: dict[str, Any] = {"sft_steps": 100, "stages": ("sft",), "checkpoint_every": 1000}
    run = make_tree(tmp_path / "x", ood, deals=234, **settings)
    assert [line.rpartition(": ")[2] for line in alarm_lines(run)] == ["go back to step 50"]


@pytest.mark.parametrize("solved", [(44, 128, 125), (44, 60, 90), (44, 8, 90)])
def test_a_fall_that_chance_explains_or_that_was_made_good_is_not_told(
    tmp_path: Path, solved: tuple[int, ...]
) -> None:
    ood = {("sft", 50 * i): count for i, count in enumerate(solved)}
    run = make_tree(tmp_path / "x", ood, deals=234, sft_steps=100, stages=("sft",))
    assert alarm_lines(run) == [] == RunFolder(run).summary()["alarms"]


def test_the_id_accuracies_of_the_embedded_run_ring_no_alarm() -> None:
    # 33, 59, 56 and 91 % of 234 deals: a dip that chance explains.
    watch = Alarm("none")
    assert [
        watch.observe(step, Score(share, 234)) for step, share in enumerate((0.33, 0.59, 0.56, 0.91))
    ] == [None] * 4
