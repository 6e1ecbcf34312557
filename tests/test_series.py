"""Checkpoints on disk against their base: the rows of a tracker on the loaded models, PEFT's merge, and interruptions."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from distributed_toys import save
from restore_toys import rewrite, save_model, tune
from series_toys import loaded, make_run, rows_in
from test_extras import run_without

import rlspec
from rlspec.cli.main import main
from rlspec.errors import CheckpointError, OptionError, RunFolderError, TensorError
from rlspec.io.jsonl import write_rows
from rlspec.io.projections import find_projections
from rlspec.jobs.series import Series
from rlspec.jobs.series import job as jobs
from rlspec.jobs.series.stacks import held_bytes, stack_bytes, stacks
from rlspec.linalg.rank import Rank
from rlspec.spectra import SpectralBasis, SpectralTracker
from rlspec.spectra.table import COLUMNS

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def truth(base: Path, tuned: Any, step: int | None, **options: Any) -> list[dict[str, Any]]:
    """A tracker on models that transformers loaded."""
    draws = options.pop("null_draws", 0)
    engine = options.pop("engine", "delta")
    tracker = SpectralTracker(SpectralBasis.from_model(loaded(base), **options), engine=engine)
    rows = tracker.measure(tuned, step=0, null_draws=draws).rows
    return [{**row, "step": step} for row in rows]


@pytest.mark.parametrize(
    "options",
    [{}, {"modules": "all", "rank": 5}, {"engine": "exact", "null_draws": 2}],
    ids=["default", "all modules", "exact, with random updates"],
)
def test_rows_are_those_of_a_tracker_on_the_loaded_models(options: dict[str, Any], run: Path) -> None:
    base, out = run.parent / "base", run.parent / "out"
    series = rlspec.measure(base, run, out=out, **options)
    assert [spectra.checkpoint for spectra in series] == [
        "checkpoint-20",
        "checkpoint-300",
        "checkpoint-1000",
    ]
    assert rows_in(out) == series.rows
    for spectra in series:
        step = int(spectra.checkpoint.rpartition("-")[2])
        right = truth(base, loaded(run / spectra.checkpoint), step, **options)
        assert spectra.rows == [{"checkpoint": spectra.checkpoint, **row} for row in right]
        assert spectra.step == step and right[0]["delta_relative"] == pytest.approx(1e-3 * step, rel=0.1)
    assert list(series.rows[0]) == ["checkpoint", *COLUMNS]


def test_without_a_folder_nothing_is_written(run: Path) -> None:
    before = sorted(run.parent.rglob("*"))
    series = rlspec.measure(run.parent / "base", [run / "checkpoint-20"], cache_dir=run.parent / "cache")
    assert len(series) == 1 and sorted(run.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_adapters_are_measured_as_peft_merges_them(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_model(tmp_path / "base", kind)
    torch.manual_seed(1)
    targets = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets.get(kind, ["q_proj", "v_proj"]))
    model = peft.get_peft_model(loaded(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path / "run" / "checkpoint-7")
    (spectra,) = rlspec.measure(tmp_path / "base", tmp_path / "run")
    right = truth(tmp_path / "base", model.merge_and_unload(), 7)
    assert spectra.step == 7 and [row["name"] for row in spectra.rows] == [row["name"] for row in right]
    for row, merged in zip(spectra.rows, right, strict=True):
        # Both are float32 sums W + s B A, rounded in another order.
        for column in ("delta_frobenius", "angle_left_mean_rad", "angle_right_mean_rad", "sigma_max"):
            assert row[column] == pytest.approx(merged[column], rel=1e-4, abs=1e-6), column
        assert (row["delta_frobenius"] == 0) == (kind == "llama" and row["module"] == "k")


def test_what_is_in_the_table_is_not_measured_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = run.parent / "base", run.parent / "out"
    rlspec.measure(base, [run / "checkpoint-300"], out=out)
    measured = []
    right = SpectralTracker.measure

    def counted(self: SpectralTracker, source: Any, **options: Any) -> Any:
        measured.append(source.where)
        return right(self, source, **options)

    monkeypatch.setattr(SpectralTracker, "measure", counted)
    both = rlspec.measure(base, run, out=out)
    assert {where.rpartition("-")[2] for where in measured} == {"20", "1000"}
    assert [row["step"] for row in rows_in(out)] == sorted(row["step"] for row in rows_in(out))
    assert both.rows == rows_in(out) and len(both) == 3
    measured.clear()
    once = (out / "spectra.jsonl").read_bytes()
    again = rlspec.measure(base, [run / "checkpoint-20"], out=out)
    assert measured == [] and again.rows == both.rows and (out / "spectra.jsonl").read_bytes() == once


def test_a_table_of_before_a_column_came_is_gone_on_with(run: Path) -> None:
    base, out = run.parent / "base", run.parent / "out"
    rlspec.measure(base, [run / "checkpoint-300"], out=out)
    later = ("best_match_left_mean", "best_match_left_min", "best_match_right_mean", "best_match_right_min")
    old = [{name: value for name, value in row.items() if name not in later} for row in rows_in(out)]
    write_rows(out / "spectra.jsonl", old)
    series = rlspec.measure(base, run, out=out)
    assert [row for row in rows_in(out) if row["step"] == 300] == old
    assert sum(row.get("best_match_left_min") is None for row in series.rows) == len(old) < len(series.rows)
    series.to_csv(out / "table.csv")
    result = CliRunner().invoke(main, ["report", str(out)])
    assert result.exit_code == 0, result.output


def test_a_series_that_was_killed_anywhere_goes_on_without_doubles(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, whole = run.parent / "base", run.parent / "whole"
    rlspec.measure(base, run, out=whole)
    wanted = (whole / "spectra.jsonl").read_bytes()
    right = jobs.Job._rows
    for kill_at in (1, 3, 5):
        out = run.parent / f"killed-{kill_at}"
        calls = []

        def killed(self: Any, *args: Any, calls: list[int] = calls, kill_at: int = kill_at) -> Any:
            calls.append(1)
            if len(calls) == kill_at:
                raise KeyboardInterrupt
            return right(self, *args)

        monkeypatch.setattr(jobs.Job, "_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            rlspec.measure(base, run, out=out)
        monkeypatch.setattr(jobs.Job, "_rows", right)
        if kill_at > 1:  # and cut off in the middle of a line
            data = (out / "spectra.jsonl").read_bytes()
            assert 0 < data.count(b"\n") < wanted.count(b"\n")
            (out / "spectra.jsonl").write_bytes(data[:-50])
        rlspec.measure(base, run, out=out)
        assert (out / "spectra.jsonl").read_bytes() == wanted


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 0.5}, "measured with rank='0.2', now rank='0.5'"),
        ({"modules": "q,k"}, "measured with modules="),
        ({"engine": "exact"}, "measured with engine='delta', now engine='exact'"),
        ({"null_draws": 3}, "measured with null_draws=0, now null_draws=3"),
    ],
)
def test_rows_measured_otherwise_are_not_mixed_in(change: dict[str, Any], told: str, run: Path) -> None:
    base, out = run.parent / "base", run.parent / "out"
    rlspec.measure(base, [run / "checkpoint-20"], out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RunFolderError, match=told):
        rlspec.measure(base, run, out=out, **change)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_base_and_a_checkpoint_written_anew_are_refused(run: Path) -> None:
    base, out, tuned = run.parent / "base", run.parent / "out", run / "checkpoint-20"
    rlspec.measure(base, [tuned], out=out)
    shutil.copytree(base, run.parent / "moved", copy_function=shutil.copy2)  # the same files elsewhere
    rlspec.measure(run.parent / "moved", [tuned], out=out)
    tune(base, run.parent / "other")
    with pytest.raises(RunFolderError, match="measured against another base"):
        rlspec.measure(run.parent / "other", [tuned], out=out)
    rewrite(tuned, lambda tensors: None)
    with pytest.raises(CheckpointError, match=r"checkpoint-20: written anew since its rows"):
        rlspec.measure(base, [tuned], out=out)


@pytest.mark.parametrize(
    ("name", "error"), [("run/checkpoint-20", CheckpointError), ("base", RunFolderError)]
)
def test_files_that_are_not_as_they_were_are_told_and_have_their_times_back_as_told(
    name: str, error: type[Exception], run: Path
) -> None:
    base, out, folder = run.parent / "base", run.parent / "out", run.parent / name
    rows = rlspec.measure(base, run / "checkpoint-20", out=out).rows

    def refused(told: str) -> str:
        with pytest.raises(error, match=told) as caught:
            rlspec.measure(base, run / "checkpoint-20", out=out)
        return str(caught.value)

    os.utime(folder / "model.safetensors")
    os.utime(folder / "config.json")
    for file, more in (("config.json", "and of 1 more "), ("model.safetensors", "")):
        told = refused(rf"\(only the time of {file} {more}is another: ")
        way = re.search(r"touch -d (\S+) ", told)
        assert way is not None
        subprocess.run(["touch", "-d", way[1], folder / file], check=True)
    assert rlspec.measure(base, run / "checkpoint-20", out=out).rows == rows
    with (folder / "config.json").open("a") as config:
        config.write("\n")
    os.utime(folder / "model.safetensors")
    size = (folder / "config.json").stat().st_size
    refused(rf"\(config.json has {size} bytes, had {size - 1}\)")
    (folder / "config.json").unlink()
    refused(r"\(config.json is gone\)")


def test_a_folder_of_something_else_is_left_alone(run: Path) -> None:
    base, out = run.parent / "base", run.parent / "out"
    out.mkdir()
    (out / "spectra.jsonl").write_text('{"stage": "sft"}\n')
    with pytest.raises(RunFolderError, match="rows of something else"):
        rlspec.measure(base, run, out=out)
    assert (out / "spectra.jsonl").read_text() == '{"stage": "sft"}\n'
    with pytest.raises(OptionError, match="^out=.* is the base"):
        rlspec.measure(base, run, out=base)
    with pytest.raises(OptionError, match="^out= is one of the checkpoints"):
        rlspec.measure(base, run, out=run / "checkpoint-20")


@pytest.mark.parametrize("kind", ["accelerate", "torchtune"])
def test_checkpoints_of_torch_distributed_have_the_rows_of_the_same_weights(kind: str, run: Path) -> None:
    """In the folders of both, with an optimizer's state beside the model's, and in bfloat16."""
    base, other = run.parent / "base", run.parent / "other"
    for folder in run.iterdir():
        model = loaded(folder).bfloat16()
        model.save_pretrained(folder)
        state = model.state_dict()
        step = folder.name.rpartition("-")[2]
        moments = {"state": {name: {"exp_avg": tensor} for name, tensor in state.items()}}
        if kind == "accelerate":
            save({"model": state}, other / folder.name / "pytorch_model_fsdp_0")
            save({"optimizer": moments}, other / folder.name / "optimizer_0")
        else:
            save(
                {"model": state, "optimizer": moments},
                other / f"dist_epoch_{step}",
                single_file_per_rank=False,
            )
    right = rlspec.measure(base, run, modules="all")
    series = rlspec.measure(base, other, modules="all", out=run.parent / "out")
    assert [spectra.step for spectra in series] == [20, 300, 1000]
    for one, measured in zip(series, right, strict=True):
        assert [{**row, "checkpoint": ""} for row in one.rows] == [
            {**row, "checkpoint": ""} for row in measured.rows
        ]
    again = rlspec.measure(base, other, modules="all", out=run.parent / "out")
    assert again.rows == series.rows


def test_a_base_may_be_one_of_torch_distributed(run: Path) -> None:
    base, other = run.parent / "base", run.parent / "other"
    save({"model": loaded(base).state_dict()}, other)
    assert rlspec.measure(other, run).rows == rlspec.measure(base, run).rows


def files(*names: str) -> Callable[[Path, Any], None]:
    def written(folder: Path, model: Any) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save({}, folder / name)

    return written


FOREIGN: dict[str, tuple[Callable[[Path, Any], None], str]] = {
    "verl": (files("actor/model_world_size_2_rank_0.pt"), "as verl saves them .*verl's model_merger"),
    "DeepSpeed": (files("global_step9/mp_rank_00_model_states.pt"), "DeepSpeed's parts .*zero_to_fp32.py"),
    "DeepSpeed's optimizer": (
        files("global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "DeepSpeed's parts .*zero_to_fp32.py",
    ),
    "accelerate": (files("pytorch_model_fsdp_0_rank0.bin"), "as accelerate saves them .*SHARDED_STATE_DICT"),
    "accelerate, in one": (files("pytorch_model_fsdp.bin"), "pickled weights are not read"),
    "Megatron": (files("mp_rank_00/model_optim_rng.pt"), "Megatron's parts .*Megatron Bridge"),
    "pickles": (files("pytorch_model.bin"), "pickled weights are not read"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_formats_that_are_not_read_are_refused_with_the_way_out(kind: str, run: Path) -> None:
    write, told = FOREIGN[kind]
    write(run / "checkpoint-9", loaded(run.parent / "base"))
    with pytest.raises(CheckpointError, match=told) as caught:
        rlspec.measure(run.parent / "base", run, out=run.parent / "out")
    assert "\n" not in str(caught.value) and "checkpoint-9" in str(caught.value)


def test_what_does_not_fit_the_base_is_refused_before_the_work(run: Path) -> None:
    def resized(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(64, 63)

    rewrite(run / "checkpoint-1000", resized)
    with pytest.raises(
        TensorError, match=r"checkpoint-1000: model.layers.1.self_attn.q_proj.weight is \(64, 63\)"
    ):
        rlspec.measure(run.parent / "base", run, out=run.parent / "out")
    assert not (run.parent / "out" / "spectra.jsonl").exists()
    rewrite(run / "checkpoint-1000", lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(TensorError, match="checkpoint-1000.*no such tensor|no such tensor.*checkpoint-1000"):
        rlspec.measure(run.parent / "base", run)


def test_a_half_written_checkpoint_is_refused_with_what_to_do_about_the_others(run: Path) -> None:
    base, out = run.parent / "base", run.parent / "out"
    weights = run / "checkpoint-1000" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    done = CliRunner().invoke(main, ["measure", str(run), "--base", str(base), "--out", str(out)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and not (out / "spectra.jsonl").exists()
    assert "checkpoint-1000" in done.stderr and "2 of 3 checkpoints can be measured" in done.stderr
    assert "`rlspec measure` (--watch)" in done.stderr
    with pytest.raises(CheckpointError) as caught:  # alone, there are no others to speak of
        rlspec.measure(base, run / "checkpoint-1000")
    assert "can be measured" not in str(caught.value)
    # What it says works, and nothing is measured twice once the last one is whole.
    rlspec.measure(base, [run / "checkpoint-20", run / "checkpoint-300"], out=out)
    weights.write_bytes(whole)
    assert [s.step for s in rlspec.measure(base, run, out=out)] == [20, 300, 1000]


def test_nan_is_told_with_the_checkpoint(run: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = torch.nan

    rewrite(run / "checkpoint-1000", spoil)
    with pytest.raises(TensorError, match="checkpoint-1000.*v_proj.weight.*1 of 2048 values are NaN"):
        rlspec.measure(run.parent / "base", run)


def test_the_memory_bounds_what_is_measured_together(run: Path) -> None:
    """And the rows do not depend on it beyond their own error bounds."""
    base = run.parent / "base"
    alone = stack_bytes((64, 64), 1, rank=Rank.parse(0.2)) / 2**30
    with pytest.raises(
        OptionError, match=r"^memory_gib=.* is too little: .*q_proj.weight \(64x64\) takes up to"
    ):
        rlspec.measure(base, run, memory_gib=0.99 * alone)
    narrow = rlspec.measure(base, run, memory_gib=1.01 * alone)
    for row, wide in zip(narrow.rows, rlspec.measure(base, run).rows, strict=True):
        assert row["name"] == wide["name"]
        bound = row["angle_error_bound_rad"] + wide["angle_error_bound_rad"]
        assert abs(row["angle_left_mean_rad"] - wide["angle_left_mean_rad"]) <= bound
    with pytest.raises(OptionError, match="memory_gib=0"):
        rlspec.measure(base, run, memory_gib=0)


def test_as_many_stacks_are_measured_side_by_side_as_the_memory_has_room_for() -> None:
    """Each of two such took up to twice what it holds where a thread of its own computed it."""
    shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (1024, 1024) for i in range(9)}
    projections, rank, cpu = find_projections(shapes, ("q",)), Rank.parse(1.0), torch.device("cpu")
    alone, held = stack_bytes((1024, 1024), 1, rank=rank), held_bytes((1024, 1024), 1, rank=rank)
    seen = set()
    for memory in range(alone, 10 * alone, alone // 4):
        found = stacks(projections, shapes, memory, memory / 2**30, rank=rank, device=cpu, parts=3)
        at_once = max(map(len, found))
        seen.add(at_once)
        assert at_once == 1 or 2.0 * at_once * held <= memory
    assert seen == {1, 2, 3}


def test_wrong_arguments_are_told_before_the_work(run: Path) -> None:
    base = run.parent / "base"
    with pytest.raises(OptionError, match="unknown engine 'x'"):
        rlspec.measure(base, run, engine="x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="^null_draws=-1"):
        rlspec.measure(base, run, null_draws=-1)
    with pytest.raises(CheckpointError, match="nothing: no such checkpoint"):
        rlspec.measure(base, run.parent / "nothing")
    os.mkdir(run.parent / "empty")
    with pytest.raises(CheckpointError, match="empty: neither"):
        rlspec.measure(base, run.parent / "empty")


def test_a_models_folder_in_the_cache_is_refused_with_the_snapshot_to_give(run: Path) -> None:
    base, model = run.parent / "base", run.parent / "models--org--x"
    (model / "blobs").mkdir(parents=True)
    for revision in ("1f0", "2e1"):
        shutil.copytree(base, model / "snapshots" / revision)

    def told() -> str:
        """The same of a base and of a checkpoint."""
        found = set()
        for arguments in ((model, run), (base, model)):
            with pytest.raises(CheckpointError) as caught:
                rlspec.measure(*arguments)
            found.add(str(caught.value))
        (one,) = found
        return one

    assert told().endswith(f"give one of its 2 snapshots, such as {model / 'snapshots' / '1f0'}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("2e1\n")
    assert told().endswith(f"; give {model / 'snapshots' / '2e1'}")
    (model / "refs" / "main").write_text("../../base")
    assert "give one of its 2 snapshots" in told()
    shutil.rmtree(model / "snapshots" / "2e1")
    path = told().rpartition(" ")[2]
    assert len(rlspec.measure(base, path, modules="q")) == 1
    shutil.rmtree(path)
    assert "there is no snapshot in it" in told()


def test_a_data_frame_of_all_rows(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    series = rlspec.measure(run.parent / "base", run)
    frame = series.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == ["checkpoint", *COLUMNS]
    assert frame.step.tolist() == [row["step"] for row in series.rows]
    assert isinstance(series[1:], Series) and len(series[1:]) == 2


def test_a_csv_reads_back_as_the_same_numbers(run: Path) -> None:
    out, table = run.parent / "out", run.parent / "table.csv"
    command = [
        "measure",
        str(run),
        "--base",
        str(run.parent / "base"),
        "--out",
        str(out),
        "--csv",
        str(table),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    rows = rows_in(out)
    assert list(read[0]) == ["checkpoint", *COLUMNS] and len(read) == len(rows)
    for cells, row in zip(read, rows, strict=True):
        for name, value in row.items():
            assert cells[name] == "" if value is None else type(value)(cells[name]) == value, name
    with pytest.raises(CheckpointError, match="nowhere/t.csv: cannot be written"):
        Series([]).to_csv(run.parent / "nowhere" / "t.csv")


def test_without_pandas_the_message_says_what_to_install() -> None:
    done = run_without("pandas", "from rlspec.jobs.series import Series; Series([]).to_pandas()")
    assert done.stderr.splitlines()[-1].endswith("not installed: pip install 'rlspec[pandas]'")
