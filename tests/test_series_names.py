"""What the checkpoints of a series are called: their order, steps and labels, and the links that lead to them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from distributed_toys import save
from series_toys import make_run

import rlspec
from rlspec.jobs.series.checkpoints import Checkpoint, find_checkpoints, labels
from rlspec.run.segments import training_of

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def make(path: Path, name: str = "model.safetensors") -> Path:
    path.mkdir(parents=True)
    (path / name).touch()
    return path


def test_the_order_of_checkpoints_is_that_of_their_steps(tmp_path: Path) -> None:
    def found(*paths: Path) -> list[str]:
        return [str(c.path.relative_to(tmp_path)) for c in find_checkpoints(paths)]

    for name in ("checkpoint-1000", "checkpoint-90", "final", "runs", "checkpoint-200"):
        make(tmp_path / "hf" / name, "x" if name == "runs" else "adapter_config.json")
    steps = ["hf/checkpoint-90", "hf/checkpoint-200", "hf/checkpoint-1000", "hf/final"]
    assert found(tmp_path / "hf") == steps
    (tmp_path / "hf" / "model.safetensors").touch()  # the trainer's last save
    assert found(tmp_path / "hf") == [*steps, "hf"]
    for name in ("ppo-5", "sft-10", "ppo-0", "sft-0"):
        make(tmp_path / "ours" / name)
    assert found(tmp_path / "ours") == ["ours/sft-0", "ours/sft-10", "ours/ppo-0", "ours/ppo-5"]
    for name in ("ppo-from-300-5", "ppo-from-100-20", "ppo-from-100-5", "sft-300"):
        make(tmp_path / "tree" / name)
    branches = ["ppo-from-100-5", "ppo-from-100-20", "ppo-from-300-5"]
    assert found(tmp_path / "tree") == [f"tree/{name}" for name in ("sft-300", *branches)]
    assert Checkpoint.at(tmp_path / "tree" / "ppo-from-100-5").stage == "ppo"
    for step in (20, 100):
        make(tmp_path / "verl" / f"global_step_{step}" / "actor" / "huggingface")
    assert found(tmp_path / "verl", tmp_path / "ours" / "sft-0") == [
        "verl/global_step_20/actor/huggingface",
        "verl/global_step_100/actor/huggingface",
        "ours/sft-0",
    ]
    assert found(*(tmp_path / f"hf/checkpoint-{n}" for n in (1000, 90, 90))) == [steps[0], steps[2]]


@pytest.mark.parametrize(
    ("name", "step", "stage"),
    [
        ("checkpoint-500", 500, ""),
        ("sft-300", 300, "sft"),
        ("global_step_300", 300, ""),
        ("global_step300", 300, ""),
        ("iter_0000500", 500, ""),
        ("epoch3", 3, ""),
        ("checkpoint-10-merged", 10, ""),
        ("checkpoint-10-bf16", 10, ""),
        ("epoch_3_merged", 3, ""),
        ("epoch=3-step=500", 500, ""),
        ("step_000500_hf", 500, ""),
        ("global_step300_hf", 300, ""),
        ("Llama-3.2-1B", None, ""),
        ("llama-3-8b", None, ""),
        ("Qwen2.5-7B-Instruct", None, ""),
        ("model-v2", None, ""),
        ("Step-3.5-Flash", None, ""),
        ("Jupiter-8-chat", None, ""),
        ("final", None, ""),
        ("run2", None, ""),
    ],
)
def test_steps_are_read_from_names(name: str, step: int | None, stage: str) -> None:
    found = Checkpoint.at(Path("x") / name)
    assert (found.step, found.stage) == (step, stage)


@pytest.mark.parametrize(
    ("names", "training"),
    [
        (("checkpoint-10-bf16", "checkpoint-20-bf16"), "checkpoint-bf16"),
        (("run2/step_10_hf", "run2/step_300_hf"), "run2/step_hf"),
        (("epoch_1_step500", "epoch_1_step600"), "epoch_1_step"),
        (("step_3_x/checkpoint-20", "step_3_x/checkpoint-30"), "step_3_x/checkpoint"),
        (("global_step_20/actor/huggingface", "global_step_300/actor/huggingface"), None),
    ],
)
def test_checkpoints_that_differ_by_their_step_are_of_one_training(
    names: tuple[str, str], training: str | None
) -> None:
    one, other = map(training_of, names)
    assert one == other and (training is None or one == training)


def test_labels_are_the_ends_of_paths_that_tell_them_apart() -> None:
    paths = [Path("/a/run/checkpoint-5"), Path("/b/run/checkpoint-5"), Path("/b/run/checkpoint-6")]
    checkpoints = [Checkpoint.at(path) for path in paths]
    assert labels(checkpoints) == ["a/run/checkpoint-5", "b/run/checkpoint-5", "b/run/checkpoint-6"]
    assert labels(checkpoints[2:], {"checkpoint-6": Path("/c/checkpoint-6")}) == ["run/checkpoint-6"]
    unnumbered = [Checkpoint.at(Path(path)) for path in ("/a/run/final", "/b/run/best", "/c/best")]
    assert labels(unnumbered) == ["final", "run/best", "c/best"]


@pytest.mark.parametrize("together", [True, False])
def test_what_checkpoints_of_one_training_are_called_differs_by_their_step_alone(together: bool) -> None:
    """However many another training has, and whichever of them came when."""
    places = [f"/runs/a/checkpoint-{step}" for step in (100, 200)]
    places += [f"/runs/b/checkpoint-{step}" for step in (100, 200, 300, 400)]
    places += [f"/runs/verl/global_step_{step}/actor/huggingface" for step in (40, 80)]
    checkpoints = [Checkpoint.at(Path(place)) for place in places]
    known: dict[str, Path] = {}
    for given in [checkpoints] if together else [[one] for one in checkpoints]:
        known |= dict(zip(labels(given, known), (one.called for one in given), strict=True))
    assert len(known) == len(places)
    trainings = [training_of(label) for label in known]
    assert [trainings.index(one) for one in trainings] == [0, 0, 2, 2, 2, 2, 6, 6]
    assert next(iter(known)) == ("a/checkpoint-100" if together else "checkpoint-100")
    assert next(iter(reversed(known))) == "verl/global_step_80/actor/huggingface"


def test_two_runs_with_checkpoints_of_one_name_stay_apart(run: Path) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    base, out = run.parent / "base", run.parent / "out"
    first = rlspec.measure(base, run, out=out)
    both = rlspec.measure(base, other, out=out)
    names = [spectra.checkpoint for spectra in both]
    assert len(both) == 6 and len(set(names)) == 6
    assert set(names) == {s.checkpoint for s in first} | {f"other/{s.checkpoint}" for s in first}


def linked(link: Path, to: Path) -> Path:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(to)
    return link


def test_a_link_gives_its_name_and_step_to_what_it_leads_to(run: Path) -> None:
    """Stores and caches call what they hold by digests; who links to it says what it is."""
    base, out, store = run.parent / "base", run.parent / "out", run.parent / "store"
    store.mkdir()
    for digest, step in (("abc", 1000), ("zz9", 20), ("b77", 300)):
        (run / f"checkpoint-{step}").rename(store / digest)
        linked(run / f"checkpoint-{step}", store / digest)
    linked(run / "latest", run / "checkpoint-1000")
    linked(run / "best", store / "b77")
    names = ["checkpoint-20", "checkpoint-300", "checkpoint-1000"]
    series = rlspec.measure(base, run, out=out, modules="q")
    assert [(s.checkpoint, s.step) for s in series] == list(zip(names, (20, 300, 1000), strict=True))
    assert [row["step"] for row in series.rows] == [step for step in (20, 300, 1000) for _ in range(2)]
    # By its other paths, each is known.
    again = rlspec.measure(base, [run / "latest", store / "zz9"], out=out, modules="q")
    assert again.rows == series.rows and [s.step for s in again] == [20, 300, 1000]
    (alone,) = rlspec.measure(base, linked(run / "last", Path("checkpoint-20")), modules="q")
    assert (alone.checkpoint, alone.step) == ("checkpoint-20", 20)


def test_a_table_from_before_links_kept_their_names_goes_on(run: Path) -> None:
    base, out, store = run.parent / "base", run.parent / "out", run.parent / "store"
    (run / "checkpoint-20").rename(store)
    rlspec.measure(base, store, out=out, modules="q")  # as earlier versions entered it: by the resolved path
    linked(run / "checkpoint-20", store)
    series = rlspec.measure(base, run, out=out, modules="q")
    assert [(s.checkpoint, s.step) for s in series] == [
        ("store", 20), ("checkpoint-300", 300), ("checkpoint-1000", 1000),
    ]  # fmt: skip


def test_a_checkpoint_that_a_link_replaces_is_the_same_and_a_link_moved_on_leads_to_another(
    run: Path,
) -> None:
    base, out, store = run.parent / "base", run.parent / "out", run.parent / "store"
    first = rlspec.measure(base, run / "checkpoint-20", out=out, modules="q")
    store.mkdir()
    (run / "checkpoint-20").rename(store / "abc")
    linked(run / "checkpoint-20", store / "abc")
    assert rlspec.measure(base, run / "checkpoint-20", out=out, modules="q").rows == first.rows
    (run / "checkpoint-300").rename(store / "def")
    current = linked(run.parent / "current", store / "def")
    rlspec.measure(base, current, out=out, modules="q")
    current.unlink()
    (run / "checkpoint-1000").rename(store / "ghi")
    current.symlink_to(store / "ghi")
    series = rlspec.measure(base, current, out=out, modules="q")
    assert {s.checkpoint for s in series} == {"checkpoint-20", "current", "ghi"}
    assert len({row["delta_frobenius"] for row in series.rows}) == 6


def test_a_checkpoint_called_as_the_base_is_told_apart_from_it(run: Path) -> None:
    """Rows of scores call the reference "base"."""
    (run / "checkpoint-20").rename(run / "base")
    series = rlspec.measure(run.parent / "base", run, modules="q")
    assert [s.checkpoint for s in series] == ["checkpoint-300", "checkpoint-1000", "run/base"]
    assert labels([Checkpoint.at(Path("/base"))]) == ["/base"]


def test_one_checkpoint_of_accelerate_is_one_by_either_of_its_folders(tmp_path: Path) -> None:
    for step in (9, 10):
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            save({"model": {"x": torch.ones(1)}}, tmp_path / f"checkpoint-{step}" / part)
    folders = [tmp_path / "checkpoint-9", tmp_path / "checkpoint-10"]
    assert [(c.path, c.step) for c in find_checkpoints([tmp_path])] == list(
        zip(folders, (9, 10), strict=True)
    )
    assert [c.path for c in find_checkpoints(folders[:1])] == folders[:1]
    (inner,) = find_checkpoints([folders[1] / "pytorch_model_fsdp_0"])
    assert inner.step == 10
