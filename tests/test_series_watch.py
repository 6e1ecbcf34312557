"""`rlspec measure` while somebody else's trainer fills the folder, and the command itself."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from distributed_toys import save
from restore_toys import rewrite, save_model, tune
from transformers import AutoModelForCausalLM

import rlspec
from rlspec.cli.main import main
from rlspec.errors import CheckpointError
from rlspec.jobs.series import table
from rlspec.jobs.series import watch as watching
from rlspec.jobs.series.job import Job
from rlspec.jobs.series.watch import watch

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", "llama")
    (tmp_path / "run").mkdir()
    return tmp_path / "base"


class Stop(Exception):
    """The end of a test's looks."""


def looks(base: Path, *happens: Callable[[], Any]) -> tuple[list[list[str]], list[str]]:
    """What a watch of run/ measures, and what it warns of, where these things happen between its looks."""
    pending = iter(happens)

    def sleep(seconds: float) -> None:
        happening = next(pending, None)
        if happening is None:
            raise Stop
        happening()

    settings: dict[str, Any] = {"modules": "q", "rank": 0.2, "engine": "delta", "null_draws": 0}
    job = Job.open(base, out=base.parent / "out", device="auto", memory_gib=2.0, **settings)
    added: list[list[str]] = []
    warnings: list[str] = []
    try:
        for labels in watch(job, [base.parent / "run"], warn=warnings.append, sleep=sleep):
            added.append(labels)
    except Stop:
        pass
    finally:
        job.table.close()
    return added, warnings


def nothing() -> None:
    pass


def test_a_checkpoint_is_measured_when_it_is_whole_and_still(base: Path) -> None:
    folder, source = base.parent / "run" / "checkpoint-5", base.parent / "source"
    tune(base, source)
    data = (source / "model.safetensors").read_bytes()

    def write(upto: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(data[:upto])

    def finish() -> None:
        write(len(data))
        shutil.copy(source / "config.json", folder)

    # Not there, cut off in its header, cut off in its data, whole for one look, and then for a second one.
    partial = [nothing, lambda: write(10), lambda: write(len(data) // 2), lambda: write(len(data) - 1)]
    assert looks(base, *partial, finish) == ([], [])
    added, warnings = looks(base, finish, nothing, nothing)
    assert (added, warnings) == ([["checkpoint-5"]], [])
    right = rlspec.measure(base, folder, modules="q").rows
    assert [json.loads(line) for line in (base.parent / "out" / "spectra.jsonl").open()] == right


def test_a_file_of_the_right_length_that_is_still_being_written_is_not_read(base: Path) -> None:
    """As writers make them that take the space first: only its time of change tells."""
    folder = base.parent / "run" / "checkpoint-5"
    tune(base, folder)
    data = (folder / "model.safetensors").read_bytes()
    final = bytearray(data)

    def step(share: float) -> Callable[[], None]:
        def written() -> None:
            kept = int(len(final) * share)
            header = 8 + int.from_bytes(final[:8], "little")
            (folder / "model.safetensors").write_bytes(
                bytes(final[: max(kept, header)]) + bytes(len(final) - max(kept, header))
            )

        return written

    added, warnings = looks(base, step(0.2), step(0.6), step(1.0), nothing, nothing)
    assert (added, warnings) == ([["checkpoint-5"]], [])
    rows = [json.loads(line) for line in (base.parent / "out" / "spectra.jsonl").open()]
    assert rows == rlspec.measure(base, folder, modules="q").rows


def test_shards_are_waited_for(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole, folder = base.parent / "sharded", base.parent / "run" / "checkpoint-5"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(whole, max_shard_size="60KB")
    weights = sorted(
        whole.glob("model*"), key=lambda path: path.name, reverse=True
    )  # the index before its shards
    files = [whole / "config.json", *weights]
    assert len(files) > 3

    def copy(path: Path) -> Callable[[], None]:
        def copied() -> None:
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder)

        return copied

    steps = [action for path in files for action in (copy(path), nothing)]
    added, warnings = looks(base, *steps[:-2])
    assert (added, warnings) == ([], [])
    assert looks(base, *steps[-2:], nothing) == ([["checkpoint-5"]], [])


def test_a_bad_checkpoint_is_passed_over_until_it_is_written_anew(base: Path) -> None:
    run = base.parent / "run"
    for step in (1, 2, 3):
        tune(base, run / f"checkpoint-{step}", seed=step)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.inf

    def mend() -> None:
        shutil.rmtree(run / "checkpoint-2")
        tune(base, run / "checkpoint-2", seed=2)

    rewrite(run / "checkpoint-2", spoil)
    added, warnings = looks(base, nothing, nothing, mend, nothing, nothing)
    assert added == [["checkpoint-1", "checkpoint-3"], ["checkpoint-2"]]
    assert len(warnings) == 1 and "checkpoint-2" in warnings[0] and "NaN or infinite" in warnings[0]
    rows = [json.loads(line) for line in (base.parent / "out" / "spectra.jsonl").open()]
    assert rows == rlspec.measure(base, run, modules="q").rows


def test_a_checkpoint_that_vanishes_while_it_is_read_leaves_no_rows(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = base.parent / "run"
    tune(base, run / "checkpoint-1")
    right = Job._rows

    def vanishing(self: Any, *args: Any) -> Any:
        shutil.rmtree(run / "checkpoint-1", ignore_errors=True)
        return right(self, *args)

    monkeypatch.setattr(Job, "_rows", vanishing)
    added, warnings = looks(base, nothing, nothing, nothing)
    assert added == [] and len(warnings) == 1 and "checkpoint-1" in warnings[0]
    rows = base.parent / "out" / "spectra.jsonl"
    assert not rows.exists() or rows.read_bytes() == b""


def test_a_measured_checkpoint_that_is_written_anew_keeps_its_rows(base: Path) -> None:
    folder = base.parent / "run" / "checkpoint-1"
    tune(base, folder)
    looks(base, nothing, nothing)
    rows = (base.parent / "out" / "spectra.jsonl").read_bytes()
    rewrite(folder, lambda tensors: None)
    added, warnings = looks(base, nothing, nothing, nothing)
    assert added == [] and len(warnings) == 1 and "written anew" in warnings[0]
    assert (base.parent / "out" / "spectra.jsonl").read_bytes() == rows and rows


def test_a_checkpoint_of_torch_distributed_is_read_when_its_last_file_is_there(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    place = base.parent / "run" / "checkpoint-1" / "pytorch_model_fsdp_0"
    save({"model": model.state_dict()}, place)
    (place / ".metadata").rename(base.parent / "late")

    def arrives() -> None:
        (base.parent / "late").rename(place / ".metadata")

    assert looks(base, nothing, nothing) == ([], [])
    added, warnings = looks(base, nothing, arrives, nothing, nothing)
    assert (added, warnings) == ([["checkpoint-1"]], [])


def test_formats_that_are_not_read_are_told_of_once(base: Path) -> None:
    folder = base.parent / "run" / "global_step_5" / "actor"
    folder.mkdir(parents=True)
    (folder / "model_world_size_2_rank_0.pt").touch()
    added, warnings = looks(base, nothing, nothing, nothing)
    assert added == [] and len(warnings) == 1 and "verl's model_merger" in warnings[0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_model.bin", "pytorch_model.bin but no .*save_pretrained"),
        ("adapter_model.bin", "adapter_model.bin is a pickle.*save the adapter with safetensors"),
    ],
)
def test_pickles_are_told_of_once_they_are_all_that_comes(name: str, told: str, base: Path) -> None:
    folder = base.parent / "run" / "checkpoint-5"
    folder.mkdir()
    if name == "adapter_model.bin":
        (folder / "adapter_config.json").write_text("{}")
    for other in ("optimizer.pt", "training_args.bin"):
        (folder / other).write_bytes(b"x")

    def grow() -> None:
        with (folder / name).open("ab") as file:
            file.write(b"x")

    assert looks(base, nothing, grow, grow, grow) == ([], [])  # still being written
    added, warnings = looks(base, nothing, nothing, nothing)
    assert added == [] and len(warnings) == 1
    assert "checkpoint-5" in warnings[0] and re.search(told, warnings[0])


def test_a_checkpoint_in_the_making_is_not_told_of_for_the_pickles_beside_it(base: Path) -> None:
    """Trainers put the optimizer's beside the weights, before or after them; and who converts leaves a model's, too."""
    folder, source = base.parent / "run" / "checkpoint-5", base.parent / "source"
    tune(base, source)
    whole = (source / "model.safetensors").read_bytes()
    folder.mkdir()
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(b"x")
    shutil.copy(source / "config.json", folder)
    (folder / "model.safetensors").write_bytes(whole[:1000])

    def finish() -> None:
        (folder / "model.safetensors").write_bytes(whole)

    assert looks(base, nothing, nothing, nothing) == ([], [])
    assert looks(base, nothing, finish, nothing, nothing) == ([["checkpoint-5"]], [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("checkpoint-5/model-Q4_K_M.gguf", "GGUF.*give the checkpoint that it was made of"),
        ("checkpoint-5/consolidated.00.pth", "Meta's.*convert_llama_weights_to_hf"),
        ("epoch=3-step=500.ckpt", "Lightning.*save_pretrained"),
        ("checkpoint-5/last.ckpt", "Lightning.*save_pretrained"),
    ],
)
def test_models_in_other_formats_are_told_of_once_they_are_written(name: str, told: str, base: Path) -> None:
    run = base.parent / "run"
    path = run / name
    path.parent.mkdir(exist_ok=True)

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"x")

    assert looks(base, nothing, grow, grow, grow) == ([], [])  # still being written
    added, warnings = looks(base, nothing, nothing, grow, nothing, nothing)
    assert added == [] and len(warnings) == 1
    assert warnings[0].startswith(f"{path}: ") and re.search(told, warnings[0])
    with pytest.raises(CheckpointError, match=told):  # the same where nothing is waited for
        rlspec.measure(base, path.parent)


def test_models_in_parts_are_told_of_once_and_not_at_all_beside_weights_that_are_read(base: Path) -> None:
    run = base.parent / "run"
    tune(base, run / "checkpoint-1")
    for name in ("export.gguf", "checkpoint-1/model.gguf", "consolidated.00.pth", "consolidated.01.pth"):
        (run / name).write_bytes(b"x")
    added, warnings = looks(base, nothing, nothing, nothing)
    assert added == [["checkpoint-1"]]
    assert [line.split(":")[0] for line in warnings] == [
        str(run / "export.gguf"), str(run / "consolidated.00.pth"),
    ]  # fmt: skip


def test_a_folder_that_is_not_there_is_no_folder_to_watch(base: Path) -> None:
    shutil.rmtree(base.parent / "run")
    with pytest.raises(CheckpointError, match="no such folder to watch"):
        looks(base)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["measure", *map(str, arguments)])


def test_the_command_prints_a_table_of_means_and_writes_the_rows(base: Path) -> None:
    run, out = base.parent / "run", base.parent / "out"
    for step in (200, 30):
        tune(base, run / f"checkpoint-{step}", size=1e-4 * step)
    done = invoke(run, "--base", base, "--out", out, "--null-draws", 1)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    names = [
        "checkpoint",
        "step",
        "matrices",
        "left rad",
        "right rad",
        "random rad",
        "sigma change",
        "update",
    ]
    assert lines[0].split("  ") != [] and [n for n in names if n in lines[0]] == names
    rows = rlspec.measure(base, run, null_draws=1).rows
    for line, step in zip(lines[1:3], (30, 200), strict=True):
        cells = line.split()
        mine = [row for row in rows if row["step"] == step]
        assert cells[:3] == [f"checkpoint-{step}", str(step), str(len(mine))]
        assert float(cells[-1]) == pytest.approx(sum(r["delta_relative"] for r in mine) / len(mine), rel=1e-3)
    assert [json.loads(line) for line in (out / "spectra.jsonl").open()] == rows


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rank", "2.5"], "--rank"),
        (["--engine", "x"], "unknown engine 'x'"),
        (["--modules", "x"], "unknown module 'x'"),
        (["--memory-gib", "0.0000001"], "--memory-gib 1e-07 is too little"),
        (["--null-draws", "-1"], "--null-draws -1 must be"),
    ],
)
def test_wrong_flags_get_one_line_and_exit_code_2(flags: list[str], told: str, base: Path) -> None:
    tune(base, base.parent / "run" / "checkpoint-1")
    done = invoke(base.parent / "run", "--base", base, "--out", base.parent / "out", *flags)
    assert done.exit_code == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert not (base.parent / "out" / "spectra.jsonl").exists()


def test_ctrl_c_ends_a_watch_and_keeps_what_is_measured(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = base.parent / "run", base.parent / "out"
    tune(base, run / "checkpoint-1")

    def one(job: Job, paths: Any, **options: Any) -> Iterator[list[str]]:
        times = iter((None, None))

        def sleep(seconds: float) -> None:
            if next(times, 0) == 0:
                raise KeyboardInterrupt

        return watch(job, paths, sleep=sleep, **options)

    monkeypatch.setattr(watching, "watch", one)
    done = invoke(run, "--base", base, "--out", out, "--watch")
    assert (
        done.exit_code == 130 and "checkpoint-1" in done.stdout and "what is measured is kept" in done.stderr
    )
    assert len((out / "spectra.jsonl").read_text().splitlines()) == 6


def test_one_for_which_there_is_no_memory_is_tried_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a trainer on the same card."""
    tune(base, base.parent / "run" / "checkpoint-5")
    right, tries = Job._rows, []

    def full(self: Any, *args: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return right(self, *args)

    monkeypatch.setattr(Job, "_rows", full)
    added, warnings = looks(base, *[nothing] * 4)
    assert added == [["checkpoint-5"]] and len(warnings) == 1
    assert warnings[0].endswith("checkpoint-5: until there is room: CUDA out of memory")
    rows = [json.loads(line) for line in (base.parent / "out" / "spectra.jsonl").open()]
    assert rows == rlspec.measure(base, base.parent / "run", modules="q").rows


def test_a_table_that_cannot_be_written_ends_the_watch_and_goes_on(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        tune(base, base.parent / "run" / f"checkpoint-{step}", seed=step)
    right, calls = table.append_rows, []

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        right(*args)

    monkeypatch.setattr(table, "append_rows", full)
    with pytest.raises(CheckpointError, match="out: cannot be written: No space left on device"):
        looks(base, nothing, nothing)
    assert len(calls) == 2
    added, warnings = looks(base, nothing, nothing)
    assert (added, warnings) == ([["checkpoint-2"]], [])  # the other one was whole
    rows = [json.loads(line) for line in (base.parent / "out" / "spectra.jsonl").open()]
    assert rows == rlspec.measure(base, base.parent / "run", modules="q").rows
