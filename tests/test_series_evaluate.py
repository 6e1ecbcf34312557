"""Scores of a series in Python, what goes with them, and scores beside a folder that fills."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from restore_toys import tune
from series_toys import measure, script
from train_toys import save_toy_model

import rlspec
from rlspec.errors import OptionError
from rlspec.jobs.series import Series
from rlspec.jobs.series.watch import watch

pytestmark = pytest.mark.usefixtures("own_cache")
SIZES = {10: 0.01, 20: 0.02, 30: 0.05, 40: 0.03, 50: 0.08, 60: 0.07}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_toy_model(tmp_path / "base")
    for step, size in SIZES.items():
        tune(tmp_path / "base", tmp_path / "run" / f"checkpoint-{step}", size=size, seed=step)
    return tmp_path


def step_of(place: Path) -> int:
    return int(place.name.rpartition("-")[2])


def evaluated(place: Path) -> dict[str, Any]:
    return {"ood": [i < 50 * (1 - 10 * SIZES[step_of(place)]) for i in range(50)], "speed": step_of(place)}


def test_a_function_scores_each_checkpoint_once(run: Path) -> None:
    asked: list[int] = []

    def evaluate(place: Path) -> dict[str, Any]:
        asked.append(step_of(place))
        return evaluated(place)

    for _ in range(2):
        series = rlspec.measure(run / "base", run / "run", modules="q", out=run / "out", evaluate=evaluate)
        assert asked == list(SIZES)
        found = {(row["checkpoint"], row["score"]): row["value"] for row in series.scores}
        assert found == {
            (f"checkpoint-{step}", name): value
            for step, size in SIZES.items()
            for name, value in (("ood", math.ceil(50 * (1 - 10 * size)) / 50), ("speed", step))
        }
    assert len(series.scores.to_pandas()) == 12 and len(series[1:3].scores) == 4
    assert [one.path for one in series] == [run / "run" / f"checkpoint-{step}" for step in SIZES]
    assert list(rlspec.measure(run / "base", run / "run", modules="q", out=run / "out").scores) == []


def test_correlations_are_scipy_s_over_the_checkpoints(run: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    series = rlspec.measure(run / "base", run / "run", modules="q", evaluate=evaluated)
    found = {(row["score"], row["metric"]): row for row in series.correlations()}
    ood = [row["value"] for row in series.scores if row["score"] == "ood"]
    for metric in ("angle_left_mean_rad", "delta_relative", "stable_rank"):
        means = [sum(row[metric] for row in one.rows) / len(one.rows) for one in series]
        row = found["ood", metric]
        assert row["spearman"] == pytest.approx(stats.spearmanr(means, ood).statistic, abs=1e-12)
        assert row["n"] == len(SIZES)
    assert found["ood", "delta_relative"]["spearman"] < -0.8 and found["speed", "step"]["spearman"] == 1.0
    assert ("ood", "rank") not in found and Series(list(series)).correlations() == []


def test_a_function_that_fails_or_gives_no_scores_is_told_with_its_checkpoint(run: Path) -> None:
    def broken(place: Path) -> dict[str, Any]:
        raise KeyError("mmlu")

    def empty(place: Path) -> dict[str, Any]:
        return {}

    def taken(place: Path) -> dict[str, Any]:
        return {"text_loss": 1.0}

    texts = run / "texts.jsonl"
    texts.write_text('{"text": "cards 1 2 3 4"}\n')
    for evaluate, told in [
        (broken, r"broken\('.*checkpoint-10'\): raised KeyError: 'mmlu'"),
        (empty, r"empty\('.*checkpoint-10'\): gave dict, wanted named scores"),
        (taken, "gave a score 'text_loss', which texts= and prompts= give"),
    ]:
        with pytest.raises(OptionError, match=told):
            rlspec.measure(run / "base", run / "run", modules="q", evaluate=evaluate, texts=texts)
    with pytest.raises(OptionError, match="evaluate=3: neither a command nor a function"):
        rlspec.measure(run / "base", run / "run", modules="q", evaluate=3)  # type: ignore[arg-type]


def invoke(run: Path, *more: str) -> Result:
    return measure(run, *more, "--modules", "q")


def test_the_command_tells_what_goes_with_the_scores_and_writes_a_table_of_them(run: Path) -> None:
    evaluate = script(run, "print(json.dumps({'ood': [i < 60 - step for i in range(60)]}))")
    result = invoke(run, "--eval", evaluate, "--csv", str(run / "table.csv"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    at = lines.index("rank correlation (95 %)  ood")
    assert lines[at + 1].split() == ["step", "-1.00"]
    assert any(line.startswith("update ") and " to " in line for line in lines[at:])
    scores = (run / "table-scores.csv").read_text().splitlines()
    assert scores[0] == "checkpoint,step,score,value,n,by" and len(scores) == 1 + len(SIZES)
    assert scores[1].startswith("checkpoint-10,10,ood,0.8333333333333334,60,")


def test_a_misspelt_alarm_is_told_at_the_first_score(run: Path) -> None:
    log = run / "asked"
    evaluate = script(
        run, f"open({str(log)!r}, 'a').write('.')\nprint(json.dumps({{'ood': [step > 9] * 9}}))"
    )
    result = invoke(run, "--eval", evaluate, "--alarm", "odd")
    assert result.exit_code == 2 and "--alarm 'odd': no such score; there are ood" in result.stderr
    assert log.read_text() == "." and "checkpoint-60" in result.stdout  # the spectra are told before
    result = invoke(run, "--eval", evaluate, "--alarm", "ood")
    assert result.exit_code == 0 and log.read_text() == "." * len(SIZES)


def test_a_folder_that_fills_is_scored_as_it_does(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlspec.jobs.series import watch as watching

    for step in (40, 50, 60):
        shutil.move(run / "run" / f"checkpoint-{step}", run / f"checkpoint-{step}")
    evaluate = script(
        run,
        "solved = {10: 30, 20: 58, 30: 31, 40: 30, 60: 10}[step]\n"
        "print(json.dumps({'ood': [i < solved for i in range(60)]}))",
    )
    assert invoke(run).exit_code == 0  # three are measured, and not scored
    coming = iter([[40], [], [50], [], [60], [], None])

    def fills(job: Any, paths: Any, **options: Any) -> Any:
        def sleep(_: float) -> None:
            steps = next(coming)
            if steps is None:
                raise KeyboardInterrupt
            for step in steps:
                shutil.move(run / f"checkpoint-{step}", run / "run" / f"checkpoint-{step}")

        return watch(job, paths, sleep=sleep, **options)

    monkeypatch.setattr(watching, "watch", fills)
    more = ("--eval", evaluate, "--alarm", "ood", "--csv", str(run / "table.csv"))
    result = invoke(run, "--watch", *more)
    assert result.exit_code == 130, result.output
    assert result.stderr.count("passed over") == 1 and "KeyError: 50" in result.stderr
    scores = [json.loads(line) for line in (run / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in scores] == [10, 20, 30, 40, 60]
    lines = result.stdout.splitlines()
    assert [line for line in lines if "go back to" in line] == [
        next(
            line for line in lines if line.startswith("ood fell from 96.7 % at step 20 to 51.7 % at step 30")
        )
    ]
    assert sum(line.startswith("checkpoint-40 ") for line in lines) == 2  # once its spectra, once its scores
    assert len((run / "table-scores.csv").read_text().splitlines()) == 6
