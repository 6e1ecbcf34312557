"""`rlspec measure --locking`: each checkpoint beside the last one of its series, which may grow or be interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from restore_toys import rewrite, save_model, tensors_of, tune
from series_toys import loaded, rows_in
from test_series_processes import ended, start

import rlspec
from rlspec.cli.main import main
from rlspec.errors import CheckpointError, RunFolderError, TensorError
from rlspec.jobs.series import job as jobs
from rlspec.jobs.series.job import Job
from rlspec.run.folder import RunFolder
from rlspec.spectra import SpectralTracker

pytestmark = pytest.mark.usefixtures("own_cache")
COLUMNS = ("locking_left", "locking_right", "locking_error_bound", "locking_end")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base beside a folder with three checkpoints of it."""
    save_model(tmp_path / "base", "llama")
    for i, step in enumerate((300, 20, 1000)):
        tune(tmp_path / "base", tmp_path / "run" / f"checkpoint-{step}", size=2e-5 * step, seed=i)
    return tmp_path / "run"


def measured(run: Path, *names: str, **options: Any) -> list[dict[str, Any]]:
    places = [run / name for name in names] or [run]
    return rlspec.measure(run.parent / "base", places, locking=True, **options).rows


def shared(now: torch.Tensor, end: torch.Tensor, k: int) -> tuple[float, float]:
    (u, _, v), (u_end, _, v_end) = (torch.linalg.svd(w.double(), full_matrices=False) for w in (now, end))
    left, right = (u[:, :k].T @ u_end[:, :k], v[:k] @ v_end[:k].T)
    return float(left.square().sum()) / k, float(right.square().sum()) / k


def assert_locked(rows: list[dict[str, Any]], run: Path, end: str) -> None:
    """Every value is that of LAPACK's decompositions in float64, to within its bound; and the bounds say something."""
    last = tensors_of(run / end)
    for row in rows:
        assert row["locking_end"] == end
        now = tensors_of(run / row["checkpoint"])[row["name"]]
        for column, right in zip(COLUMNS, shared(now, last[row["name"]], row["rank"]), strict=False):
            if row[column] is None:  # the whole of that side
                assert row["rank"] == row["rows" if column == "locking_left" else "cols"]
                continue
            assert abs(row[column] - right) <= row["locking_error_bound"] < 1e-4
            assert right == pytest.approx(1.0, abs=0.05) and (row["checkpoint"] == end or right < 1.0 - 1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"engine": "exact"}, {"modules": "all", "rank": 5}, {"modules": "q,v", "rank": 32, "null_draws": 1}],
    ids=["default", "exact", "all modules", "a whole side"],
)
def test_it_is_that_of_whole_decompositions(options: dict[str, Any], run: Path) -> None:
    rows = measured(run, out=run.parent / "out", **options)
    assert_locked(rows, run, "checkpoint-1000")
    assert rows == rows_in(run.parent / "out")
    plain = rlspec.measure(run.parent / "base", run, **options).rows
    empty = dict.fromkeys(COLUMNS)
    assert [row | empty for row in rows] == plain  # nothing else is different


def test_another_end_is_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Job._end

    def before_last(self: Job, opened: Any) -> Any:
        end = right(self, opened)
        return jobs._End(end.label, *opened["checkpoint-300"])

    monkeypatch.setattr(Job, "_end", before_last)
    rows = measured(run)
    with pytest.raises(AssertionError):
        assert_locked(rows, run, "checkpoint-1000")


def test_an_adapter_is_compared_through_its_factors(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_model(tmp_path / "base", "llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(loaded(tmp_path / "base"), config)
    torch.manual_seed(1)
    for step in (1, 2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    tune(tmp_path / "base", tmp_path / "run" / "checkpoint-3", size=0.01)
    base = tensors_of(tmp_path / "base")
    end = tensors_of(tmp_path / "run" / "checkpoint-3")
    for row in measured(tmp_path / "run"):
        name = row["name"]
        if row["step"] == 2:  # W + s B A, as the adapter that is in memory still has it
            layer = model.get_submodule("base_model.model." + name.removesuffix(".weight"))
            added = layer.get_delta_weight("default").detach().double() if row["module"] != "k" else 0.0
            for column, right in zip(
                COLUMNS, shared(base[name].double() + added, end[name], row["rank"]), strict=False
            ):
                assert abs(row[column] - right) <= row["locking_error_bound"] + 1e-6 < 1e-3


def test_a_series_that_grows_is_measured_anew_against_its_new_end(run: Path) -> None:
    out = run.parent / "out"
    first = measured(run, "checkpoint-20", "checkpoint-300", out=out)
    assert_locked(first, run, "checkpoint-300")
    assert measured(run, out=out) == measured(run) == rows_in(out)
    assert_locked(rows_in(out), run, "checkpoint-1000")


def test_what_is_not_given_keeps_the_end_that_it_was_measured_against(run: Path) -> None:
    """The trainer may have removed it."""
    out = run.parent / "out"
    measured(run, "checkpoint-20", "checkpoint-300", out=out)
    shutil.rmtree(run / "checkpoint-20")
    ends = {row["checkpoint"]: row["locking_end"] for row in measured(run, out=out)}
    assert ends == {
        "checkpoint-20": "checkpoint-300",
        "checkpoint-300": "checkpoint-1000",
        "checkpoint-1000": "checkpoint-1000",
    }


def test_a_part_of_the_series_is_compared_with_the_end_of_the_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run.parent / "out"
    measured(run, "checkpoint-20", "checkpoint-1000", out=out)
    assert_locked(measured(run, "checkpoint-300", out=out), run, "checkpoint-1000")
    once, calls = (out / "spectra.jsonl").read_bytes(), []
    monkeypatch.setattr(SpectralTracker, "subspaces", lambda *a: calls.append(a))
    measured(run, "checkpoint-20", out=out)
    assert calls == [] and (out / "spectra.jsonl").read_bytes() == once


def test_an_end_that_is_gone_or_written_anew_is_refused(run: Path) -> None:
    out = run.parent / "out"
    measured(run, "checkpoint-20", "checkpoint-1000", out=out)
    before = rows_in(out)
    rewrite(run / "checkpoint-1000", lambda tensors: None)
    with pytest.raises(CheckpointError, match="checkpoint-1000: written anew since its rows"):
        measured(run, "checkpoint-300", out=out)
    shutil.rmtree(run / "checkpoint-1000")
    with pytest.raises(
        CheckpointError, match=r"checkpoint-1000.*compares with checkpoint-1000, the last"
    ) as told:
        measured(run, "checkpoint-300", out=out)
    assert "\n" not in str(told.value) and rows_in(out) == before


def test_what_is_wrong_with_the_end_names_it(run: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = torch.nan

    rewrite(run / "checkpoint-1000", spoil)
    with pytest.raises(TensorError, match="checkpoint-1000.*v_proj.weight.*1 of 2048 values are NaN"):
        measured(run)


@pytest.mark.parametrize("kill_at", [1, 2, 5])
def test_a_series_killed_while_it_is_measured_anew_goes_on(
    kill_at: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = run.parent / "out", run.parent / "whole"
    measured(run, out=whole)
    measured(run, "checkpoint-20", "checkpoint-300", out=out)
    right, calls = Job._rows, []

    def killed(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return right(self, *args)

    monkeypatch.setattr(Job, "_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(run, out=out)
    kept = [(row["checkpoint"], row["name"]) for row in rows_in(out)]
    assert len(set(kept)) == len(kept)  # what is measured anew takes the place of what was
    monkeypatch.setattr(Job, "_rows", right)
    measured(run, out=out)
    assert (out / "spectra.jsonl").read_bytes() == (whole / "spectra.jsonl").read_bytes()


def test_a_table_without_it_is_not_mixed_with_one_that_has_it(run: Path) -> None:
    """One of an earlier version, which does not tell, has none."""
    base, out = run.parent / "base", run.parent / "out"
    rlspec.measure(base, run, out=out)
    about = json.loads((out / "measure.json").read_text())
    assert about["settings"].pop("locking") is False
    (out / "measure.json").write_text(json.dumps(about))
    with pytest.raises(RunFolderError, match="measured with locking=False, now locking=True"):
        measured(run, out=out)
    assert len(rlspec.measure(base, run, out=out)) == 3


def test_several_processes_write_the_bytes_of_one(run: Path) -> None:
    options = {"modules": "q,k,v,o,mlp", "rank": 0.2}
    measured(run, out=run.parent / "alone", **options)
    measured(run, "checkpoint-20", out=run.parent / "together", **options)  # before it grew
    said = ended([start(number, 2, run, run.parent / "together", locking=True) for number in range(2)])
    assert [code for code, _, _ in said] == [0, 0], said
    alone, together = (run.parent / place / "spectra.jsonl" for place in ("alone", "together"))
    assert alone.read_bytes() == together.read_bytes()


def test_the_checkpoints_of_a_tracked_run_are_such_a_series(finished: tuple[RunFolder, Any]) -> None:
    folder, _ = finished
    places = folder.path / "checkpoints"
    series = rlspec.measure(places / "sft-0", places, locking=True)
    assert [one.checkpoint for one in series] == [
        *(f"sft-{step}" for step in (0, 5, 10, 15, 20, 22)), *(f"ppo-{step}" for step in (2, 4, 6)),
    ]  # fmt: skip
    end = tensors_of(places / "ppo-6")
    for row in series.rows:
        now = tensors_of(places / row["checkpoint"])[row["name"]]
        for column, right in zip(COLUMNS, shared(now, end[row["name"]], row["rank"]), strict=False):
            assert abs(row[column] - right) <= row["locking_error_bound"]
    assert series[0].rows[0]["locking_right"] < series[-1].rows[0]["locking_right"] == 1.0


def invoke(run: Path, *flags: str) -> Any:
    command = ["measure", str(run), "--base", str(run.parent / "base"), "--out", str(run.parent / "out")]
    return CliRunner().invoke(main, [*command, "--locking", *flags])


def test_the_command_prints_the_means(run: Path) -> None:
    done = invoke(run)
    assert done.exit_code == 0, done.output
    heading, *lines = done.stdout.splitlines()
    assert heading.endswith("left locked  right locked")
    found = [float(line.split()[-1]) for line in lines[:3]]
    rows = measured(run)
    means = [[row["locking_right"] for row in rows if row["step"] == step] for step in (20, 300, 1000)]
    assert found == pytest.approx([sum(some) / len(some) for some in means], rel=1e-3) and found[-1] == 1.0
    assert rows_in(run.parent / "out") == rows


def test_a_watched_folder_has_no_end(run: Path) -> None:
    done = invoke(run, "--watch")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "--watch follows a series that has no last checkpoint yet for --locking" in done.stderr
    assert not (run.parent / "out").exists()
