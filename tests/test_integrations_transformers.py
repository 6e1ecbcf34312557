"""The callback inside transformers' Trainer: what it measures is right, and the training does not notice it."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import SETUPS, Clock, assert_same_training, examples, losses, plain_trainer
from restore_toys import save_model
from torch import nn
from train_toys import toy_model
from transformers import TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.errors import CheckpointError, OptionError
from rlspec.integrations.caller import LOGGED
from rlspec.integrations.store import TrackingFolder
from rlspec.integrations.transformers import SpectralCallback
from rlspec.run.budget import Pace, parse_budget
from rlspec.spectra.table import COLUMNS

NAMES = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkv"]


pytestmark = pytest.mark.usefixtures("own_cache")


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "spectra.jsonl").read_text().splitlines()]


def steps(rows: list[dict[str, Any]]) -> list[int]:
    """The steps of whole events, in order."""
    assert [row["name"] for row in rows] == NAMES * (len(rows) // len(NAMES))
    return [row["step"] for row in rows[:: len(NAMES)]]


class Keep(TrainerCallback):
    """Copies of the model by step, and what the loggers were handed."""

    def __init__(self) -> None:
        self.models: dict[int, nn.Module] = {}
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.models[state.global_step] = copy.deepcopy(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


def test_rows_are_those_of_the_tracker_on_the_models_of_those_steps(tmp_path: Path) -> None:
    keep, callback = Keep(), SpectralCallback(every=2, out=tmp_path / "out")
    trainer = plain_trainer(tmp_path / "trainer", [keep, callback], max_steps=5)
    start = copy.deepcopy(trainer.model)
    trainer.train()
    assert callback.disabled is None
    rows = rows_in(tmp_path / "out")
    assert steps(rows) == [0, 2, 4, 5]  # the last one, too
    assert all(list(row) == list(COLUMNS) for row in rows)
    tracker = SpectralTracker(SpectralBasis.from_model(start))
    for record, step in zip(callback.records, [0, 2, 4, 5], strict=True):
        truth = tracker.measure(keep.models[step] if step else start, step=step, stage="train").rows
        assert record.rows == truth
        assert [row for row in rows if row["step"] == step] == truth
    assert rows[0]["delta_relative"] == 0 and rows[-1]["delta_relative"] > 1e-4
    frame = callback.records.to_pandas()
    assert list(frame.columns) == list(COLUMNS) and frame["angle_left_max_rad"].tolist() == [
        row["angle_left_max_rad"] for row in rows
    ]
    callback.records.to_csv(tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + len(rows)


def test_the_trainers_loggers_get_the_means_and_lose_no_line_of_their_own(tmp_path: Path) -> None:
    keep, callback = Keep(), SpectralCallback(every=2)
    plain_trainer(tmp_path, [callback, keep]).train()
    ours = {line["step"]: line for line in keep.logs if LOGGED.keys() & line.keys()}
    assert list(ours) == [0, 2, 4]
    for record in callback.records:
        for name, column in LOGGED.items():
            values = [row[column] for row in record.rows]
            assert ours[record.step][name] == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert [line["step"] for line in keep.logs if "loss" in line] == [1, 2, 3, 4]


def test_tensorboard_and_the_log_history_hold_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = plain_trainer(tmp_path / "t", [SpectralCallback(every=2)], report_to="tensorboard")
    trainer.train()
    folder = next(tmp_path.rglob("events.out.tfevents*")).parent
    events = accumulator.EventAccumulator(str(folder)).Reload()
    found = events.Scalars("train/spectra/delta_relative")
    assert [event.step for event in found] == [0, 2, 4]
    history = [line for line in trainer.state.log_history if "spectra/delta_relative" in line]
    assert [line["step"] for line in history] == [0, 2, 4]


@pytest.mark.parametrize("setup", SETUPS)
def test_the_training_is_the_same_to_the_bit(setup: str, tmp_path: Path) -> None:
    callback = SpectralCallback(every=1, out=tmp_path / "out")
    assert_same_training(lambda c: plain_trainer(tmp_path / "t", c, **SETUPS[setup]), callback)
    assert callback.disabled is None
    assert steps(rows_in(tmp_path / "out")) == [0, 1, 2, 3, 4]


def test_a_callback_that_draws_a_number_would_be_noticed(tmp_path: Path) -> None:
    class Draws(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1)

    with pytest.raises(AssertionError):
        assert_same_training(lambda c: plain_trainer(tmp_path, c), Draws())


def test_adapters_are_measured_as_their_merged_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make(callbacks: list[TrainerCallback]) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "k_proj"])
        model = peft.get_peft_model(toy_model(), config)
        return plain_trainer(tmp_path / "t", callbacks, model, learning_rate=0.1)

    callback = SpectralCallback(every=4)
    trainer = assert_same_training(make, callback)
    merged = trainer.model.merge_and_unload()
    truth = SpectralTracker(SpectralBasis.from_model(toy_model())).measure(merged, step=4).rows
    for row, right in zip(callback.records[-1].rows, truth, strict=True):
        assert row["name"] == right["name"]
        # Both are rounded sums in float32: of W + s B A, and what PEFT wrote into W.
        assert row["delta_frobenius"] == pytest.approx(right["delta_frobenius"], rel=1e-5, abs=1e-6)
        assert row["angle_left_mean_rad"] == pytest.approx(right["angle_left_mean_rad"], rel=1e-4, abs=1e-6)
        assert (row["delta_frobenius"] > 0.01) == (row["module"] != "v")


def test_a_base_folder_is_the_reference(tmp_path: Path) -> None:
    base = toy_model(seed=5)
    base.save_pretrained(tmp_path / "base")
    callback = SpectralCallback(every=4, base=tmp_path / "base", out=tmp_path / "out")
    trainer = plain_trainer(tmp_path / "t", [callback])
    truth = SpectralTracker(SpectralBasis.from_model(base)).measure(trainer.model, step=0, stage="train").rows
    trainer.train()
    assert callback.records[0].rows == truth and truth[0]["delta_relative"] > 0.5
    assert not (tmp_path / "out" / "reference").exists()


def test_heads_are_measured_by_themselves(tmp_path: Path) -> None:
    callback = SpectralCallback(every=4, modules="q,o", per_head=True, out=tmp_path / "out")
    trainer = plain_trainer(tmp_path / "t", [callback])
    trainer.train()
    assert callback.disabled is None
    basis = SpectralBasis.from_model(toy_model(), modules="q,o", per_head=True)
    truth = SpectralTracker(basis).measure(trainer.model, step=4, stage="train").rows
    assert callback.records[-1].rows == truth and {row["head"] for row in truth} > {0, 1}


def resumable(tmp_path: Path, callbacks: list[TrainerCallback], model: Any = None, **changes: Any) -> Any:
    return plain_trainer(
        tmp_path / "t", callbacks, model, **{"save_strategy": "steps", "save_steps": 2, **changes}
    )


def steps_of_rows(lines: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in lines.splitlines()]


def test_a_resumed_training_goes_on_with_the_same_reference_and_doubles_no_step(tmp_path: Path) -> None:
    def callback() -> SpectralCallback:
        return SpectralCallback(every=1, out=tmp_path / "out")

    resumable(tmp_path, [callback()], max_steps=4).train()
    whole = (tmp_path / "out" / "spectra.jsonl").read_bytes()
    # Killed while it wrote the event after the last checkpoint of step 2.
    (tmp_path / "out" / "spectra.jsonl").write_bytes(whole[: len(whole) * 7 // 10])
    second = callback()
    trainer = resumable(tmp_path, [second])
    trainer.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2"))
    assert second.disabled is None
    assert (tmp_path / "out" / "spectra.jsonl").read_bytes() == whole
    assert [record.step for record in second.records] == [0, 1, 2, 3, 4]
    assert second.records.to_pandas()["step"].tolist() == steps_of_rows(whole)


def test_a_resumed_training_whose_start_is_not_known_is_trained_and_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumable(tmp_path, []).train()
    for out, reason in ((None, "without out="), (tmp_path / "new", "reference is not there")):
        callback = SpectralCallback(every=1, out=out)
        trainer = resumable(tmp_path, [callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2"))
        assert trainer.state.global_step == 4 and callback.records == []
        assert callback.disabled is not None and callback.disabled.startswith("resumed at step 2")
        assert reason in callback.disabled and callback.disabled.endswith("give them as base=")
    assert sum("tracking of the spectra ends here" in r.message for r in caplog.records) == 2


def test_a_callback_that_measured_the_earlier_part_keeps_its_records(tmp_path: Path) -> None:
    for base in (None, tmp_path / "base"):
        toy_model(seed=5).save_pretrained(tmp_path / "base")
        callback = SpectralCallback(every=1, base=base)
        trainer = resumable(tmp_path, [callback])
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2"))
        assert (callback.disabled is None) == (base is not None)
        assert [record.step for record in callback.records] == (
            [0, 1, 2] if base is None else [0, 1, 2, 3, 4]
        )
    other = resumable(tmp_path / "other", [], toy_model(seed=1))
    other.train()
    trainer = resumable(tmp_path / "other", [callback])
    trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "t" / "checkpoint-2"))
    assert [record.step for record in callback.records] == [3, 4]  # another training's are not mixed in


def test_a_resumed_training_with_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    resumable(tmp_path, [SpectralCallback(every=2, out=tmp_path / "out")]).train()
    before = (tmp_path / "out" / "spectra.jsonl").read_bytes()
    callback = SpectralCallback(every=2, out=tmp_path / "out", rank=0.5)
    resumable(tmp_path, [callback]).train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2"))
    assert callback.disabled is not None and "rank is '0.2' there and '0.5' now" in callback.disabled
    assert (tmp_path / "out" / "spectra.jsonl").read_bytes() == before


def test_a_new_training_sets_the_files_of_the_one_before_aside(tmp_path: Path) -> None:
    for number in range(3):
        callback = SpectralCallback(every=4, out=tmp_path / "out")
        plain_trainer(tmp_path / "t", [callback], toy_model(seed=number)).train()
        assert callback.disabled is None and steps(rows_in(tmp_path / "out")) == [0, 4]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    names = {"spectra.jsonl", "reference", "tracking.json"}
    assert files == {".lock"} | names | {f"{name}.{n}" for name in names for n in (1, 2)}


def test_a_failure_warns_once_and_ends_the_tracking_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = SpectralTracker.measure
    called = []

    def broken(self: SpectralTracker, source: Any, *, step: int, **options: Any) -> Any:
        called.append(step)
        if step == 2:
            source.eval()
            torch.rand(5)
            raise ZeroDivisionError("a fault\nof two lines")
        return right(self, source, step=step, **options)

    monkeypatch.setattr(SpectralTracker, "measure", broken)
    callback = SpectralCallback(every=1, out=tmp_path / "out")
    assert_same_training(lambda c: plain_trainer(tmp_path / "t", c), callback)
    assert called == [0, 1, 2] and [record.step for record in callback.records] == [0, 1]
    assert callback.disabled == "ZeroDivisionError: a fault of two lines"
    warnings = [r for r in caplog.records if r.name.startswith("rlspec") and r.levelno >= logging.WARNING]
    assert [r.getMessage() for r in warnings] == [
        f"tracking of the spectra ends here, the training goes on: {callback.disabled}"
    ]


def test_a_logger_that_fails_ends_the_tracking_alone(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "spectra/delta_relative" in logs:
                raise ConnectionError("no network")

    callback = SpectralCallback(every=1)
    trainer = plain_trainer(tmp_path, [callback, Fails()])
    trainer.train()
    assert callback.disabled == "ConnectionError: no network" and trainer.state.global_step == 4
    assert sum("loss" in line for line in losses(trainer)) == 4


def test_ctrl_c_inside_a_measurement_is_still_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(SpectralTracker, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        plain_trainer(tmp_path, [SpectralCallback(every=1)]).train()


@pytest.mark.parametrize(("share", "cost"), [(0.01, 0.5), (0.1, 0.5), (0.5, 2.0), (1.0, 3.0)])
def test_a_budget_is_kept_at_every_measurement(share: float, cost: float) -> None:
    clock = Clock()
    pace = Pace(share, clock)
    with pace.spending(once=True):
        clock.now += 3  # the reference
    measured = 0
    for _ in range(3000):
        clock.now += 1
        if pace.allows():
            with pace.spending():
                clock.now += cost
            measured += 1
            assert measured == 1 or pace.spent <= share * pace.elapsed + 1e-9
    # Nor is less measured than there is time for.
    assert measured >= min(3000, 0.9 * (share * pace.elapsed - 3) / cost)


def test_measurements_wait_for_the_budget_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    right = SpectralTracker.measure

    def slow(self: SpectralTracker, *args: Any, **options: Any) -> Any:
        clock.now += 1
        return right(self, *args, **options)

    class Step(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 1

    monkeypatch.setattr(SpectralTracker, "measure", slow)
    callback = SpectralCallback(every=2, budget="25%")
    callback.pace = Pace(0.25, clock)
    plain_trainer(tmp_path, [Step(), callback], max_steps=12).train()
    # One second a step and one a measurement: after the one at step 0, the n-th needs 4 n seconds with its own.
    assert [record.step for record in callback.records] == [0, 6, 9, 12]
    assert callback.pace.spent <= 0.25 * callback.pace.elapsed
    told = [r.getMessage() for r in caplog.records if "budget='25%'" in r.getMessage()]
    assert len(told) == 1 and "step 2 waits" in told[0]


@pytest.mark.parametrize(
    ("budget", "share"),
    [("1%", 0.01), (" 2.5 % ", 0.025), (0.01, 0.01), ("0.01", 0.01), (1, 1.0), (None, None)],
)
def test_budgets_that_are_shares(budget: Any, share: float | None) -> None:
    assert parse_budget(budget) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize("budget", ["1", "0%", "101%", "-1%", "fast", 0, 2, -0.1, True, float("nan")])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(OptionError, match=r"^budget=.* is not valid: give a share"):
        SpectralCallback(budget=budget)


def test_wrong_arguments_are_told_before_the_training(tmp_path: Path) -> None:
    for every in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="^every="):
            SpectralCallback(every=every)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown module 'x'"):
        SpectralCallback(modules="x")
    with pytest.raises(OptionError, match="rank="):
        SpectralCallback(rank=2.0)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        SpectralCallback(base=tmp_path / "nothing")


def test_only_the_first_process_measures_and_writes(tmp_path: Path) -> None:
    callback = SpectralCallback(every=1, out=tmp_path / "out")
    trainer = plain_trainer(tmp_path / "t", [callback])
    trainer.state.is_world_process_zero = False
    trainer.is_world_process_zero = lambda: False  # type: ignore[method-assign]
    trainer.train()
    assert callback.records == [] and not (tmp_path / "out").exists()


class Sharded(nn.Parameter):
    ds_shape = (32, 32)


class Slice(nn.Parameter):
    tensor_model_parallel = True


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            Sharded,
            "spread over 2 processes by FSDP1 or DeepSpeed's ZeRO-3, which is not gathered inside a training; "
            "use FSDP2 (fsdp_version: 2 for accelerate), or measure the checkpoints that it saves",
        ),
        (
            Slice,
            "a slice of a weight, of DeepSpeed's AutoTP or of Megatron, which are not gathered inside a training; "
            'use tensor parallelism of transformers (tp_plan="auto") or FSDP2, or measure the whole checkpoints '
            "that it saves",
        ),
    ],
)
def test_weights_that_are_spread_and_no_dtensors_are_refused_in_one_line(
    kind: type[nn.Parameter], told: str, tmp_path: Path
) -> None:
    model = toy_model()
    layer: Any = model.model.layers[0].self_attn.q_proj
    layer.weight = kind(layer.weight.detach())
    callback = SpectralCallback(every=1)
    trainer = plain_trainer(tmp_path, [callback], model)

    class Args:
        world_size = 2

    callback.on_train_begin(Args(), trainer.state, trainer.control, model=model)
    assert callback.disabled == f"{NAMES[0]}: {told}"


def test_importing_the_package_imports_no_trainer() -> None:
    code = (
        "import rlspec, rlspec.integrations, sys; print({'transformers', 'trl', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_toys_have_losses_that_differ(tmp_path: Path) -> None:
    """Else equality of the trainings above would say little."""
    trainer = plain_trainer(tmp_path)
    trainer.train()
    assert len({line["loss"] for line in losses(trainer) if "loss" in line}) == 4 and len(examples()) == 32


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_reference_that_is_kept_is_the_models(kind: str, tmp_path: Path) -> None:
    """Fused tensors of which only a part is tracked, too."""
    model = save_model(tmp_path / "model", kind)
    folder = TrackingFolder(tmp_path / "out", {})
    folder.start()
    folder.save_reference(model, ("q", "v"))
    kept, right = (
        SpectralBasis.from_checkpoint(tmp_path / name, modules="q,v") for name in ("out/reference", "model")
    )
    assert [p.name for p in kept.projections] == [p.name for p in right.projections]
    for projection in right.projections:
        assert torch.equal(kept.matrix(projection.name).W, right.matrix(projection.name).W)
