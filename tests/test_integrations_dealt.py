"""The callback in trainings of several processes: transformers' Trainer with DDP, and hand-made loops on FSDP2."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_toys import loop, plain_trainer
from process_toys import held, together, toy_with_uneven_layers
from transformers import TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.integrations import store
from rlspec.integrations.transformers import SpectralCallback
from rlspec.run.budget import Pace
from rlspec.spectra import dealt


def trains(number: int, out: Path, kind: str) -> None:
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    model = held(toy_with_uneven_layers(), kind, dist.get_world_size())
    callback = SpectralCallback(every=2, out=out / "run")
    loop(model, callback, last=2)
    assert callback.disabled is None, callback.disabled
    second = SpectralCallback(every=2, out=out / "run")
    loop(model, second, first=2)
    assert second.disabled is None, second.disabled
    assert [record.step for record in second.records] == [0, 2, 4]
    (out / f"{number}.json").write_text(json.dumps([record.rows for record in second.records]))


@pytest.mark.parametrize(("count", "kind"), [(2, "fsdp2"), (4, "fsdp2"), (2, "ddp"), (2, "tp")])
def test_the_folder_is_that_of_one_process_to_the_byte_and_resumes(
    count: int, kind: str, tmp_path: Path
) -> None:
    assert together(count, trains, tmp_path, kind) == [0] * count
    alone = SpectralCallback(every=2, out=tmp_path / "alone")
    loop(toy_with_uneven_layers(), alone)
    truth = [record.rows for record in alone.records]
    assert [rows[0]["step"] for rows in truth] == [0, 2, 4] and truth[-1][0]["delta_relative"] > 1e-3
    for number in range(count):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == truth
    for file in (path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*")):
        if file.name == "tracking.json":  # each training has a name of its own
            found, wanted = (json.loads((tmp_path / name / file).read_text()) for name in ("run", "alone"))
            assert found.pop("training") != wanted.pop("training") and found == wanted
        else:
            assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def passes(model: Any) -> None:
    """As an evaluation, after which nothing says that the weights are no longer needed whole."""
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert not any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def evaluates(number: int, out: Path) -> None:
    """Before the training, as ``trainer.evaluate(); trainer.train()``, and before each measurement."""

    class Evaluates(SpectralCallback):
        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            passes(kwargs["model"])
            super().on_step_end(*given, **kwargs)

    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    model = held(toy_with_uneven_layers(), "fsdp2, whole after a pass", 2)
    passes(model)
    callback = Evaluates(every=1, out=out / "run")
    loop(model, callback, last=1)
    assert callback.disabled is None, callback.disabled


def test_weights_that_fsdp2_kept_whole_after_an_evaluation_are_measured_as_those_of_one_process(
    tmp_path: Path,
) -> None:
    assert together(2, evaluates, tmp_path) == [0, 0]
    alone = SpectralCallback(every=1, out=tmp_path / "alone")
    loop(toy_with_uneven_layers(), alone, last=1)
    rows = [(tmp_path / name / "spectra.jsonl").read_bytes() for name in ("run", "alone")]
    assert rows[0] == rows[1] and alone.records[1].rows[0]["delta_relative"] > 1e-3


def fails(number: int, out: Path, kind: str, where: str) -> None:
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rlspec").addHandler(handler)

    def fault(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a fault")

    if where == "decomposing" and number == 1:
        SpectralTracker.__init__ = fault  # type: ignore[method-assign]
    if where == "measuring" and number == 1:
        SpectralTracker.measure = fault  # type: ignore[method-assign]
    if where == "writing" and number == 0:
        (out / "run").write_text("a file is in the way")
    callback = SpectralCallback(every=2, out=out / "run")
    loop(held(toy_with_uneven_layers(), kind, dist.get_world_size()), callback)
    dist.barrier()  # the training goes on together
    assert callback._tracker is None and callback.records == []
    (out / f"{number}.json").write_text(json.dumps([callback.disabled, told]))


@pytest.mark.parametrize("where", ["decomposing", "measuring", "writing"])
@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_one_process_that_fails_ends_the_tracking_in_all_with_one_warning(
    kind: str, where: str, tmp_path: Path
) -> None:
    assert together(2, fails, tmp_path, kind, where) == [0, 0]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    at_fault = 0 if where == "writing" else 1
    reason = "FileExistsError: " if where == "writing" else "ZeroDivisionError: a fault"
    assert first[0] == second[0] and first[0].startswith(f"process {at_fault} of 2: {reason}")
    assert first[1] == [f"tracking of the spectra ends here, the training goes on: {first[0]}"]
    assert second[1] == []


def begins_late(number: int, out: Path, where: str) -> None:
    """One is at it for longer than the training's group waits: the first at the reference, the second at its factors."""
    patched, name = (store._Reference, "finish") if where == "writing" else (SpectralTracker, "__init__")
    right = getattr(patched, name)
    slept: list[int] = []

    def slow(*given: Any, **options: Any) -> Any:
        if (number == 0) == (where == "writing") and not slept:
            slept.append(number)
            time.sleep(6)
        return right(*given, **options)

    setattr(patched, name, slow)
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    callback = SpectralCallback(every=1, out=out / "run")
    loop(held(toy_with_uneven_layers(), "ddp", 2), callback, last=1)
    assert callback.disabled is None and len(callback.records) == 2, callback.disabled


@pytest.mark.parametrize("where", ["writing", "decomposing"])
def test_a_start_that_takes_longer_in_one_process_than_the_trainings_collectives_may_does_not_end_it(
    where: str, tmp_path: Path
) -> None:
    assert together(2, begins_late, tmp_path, where, patience=3.0) == [0, 0]


def without_memory(number: int, out: Path, event: int) -> None:
    """The second process has none left at the reference that is kept, the decomposition, step 0, or step 2."""
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    right, calls = dealt.make_room, [0]

    def room(*given: Any) -> None:
        calls[0] += 1
        with pytest.MonkeyPatch.context() as patch:
            if number == 1 and calls[0] == event:
                patch.setattr(torch, "empty", none_left)
            right(*given)

    empty = torch.empty

    def none_left(*size: Any, dtype: Any = None, **options: Any) -> Any:
        if dtype == torch.float32:  # not for what the processes say
            raise torch.OutOfMemoryError("none is left")
        return empty(*size, dtype=dtype, **options)

    dealt.make_room = store.make_room = room  # type: ignore[assignment]
    callback = SpectralCallback(every=2, out=out / "run")
    loop(held(toy_with_uneven_layers(), "fsdp2", 2), callback)
    dist.barrier()  # the training goes on together
    (out / f"{number}.json").write_text(
        json.dumps([callback.disabled, [record.step for record in callback.records]])
    )


@pytest.mark.parametrize("event", [1, 2, 3, 4])
def test_memory_that_runs_out_before_a_gather_ends_the_tracking_in_all(event: int, tmp_path: Path) -> None:
    assert together(2, without_memory, tmp_path, event) == [0, 0]
    reason = "process 1 of 2: OutOfMemoryError: none is left"
    for number in range(2):
        told = json.loads((tmp_path / f"{number}.json").read_text())
        assert told == [reason, [0] if event == 4 else []]


def waits(number: int, out: Path) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 1.0
            return self.now

    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    callback = SpectralCallback(every=1, budget=0.3)
    callback.pace = Pace(0.3 if number == 0 else 1e-9, Clock())  # the second one alone would never measure
    loop(held(toy_with_uneven_layers(), "fsdp2", 2), callback, last=12)
    assert callback.disabled is None
    (out / f"{number}.json").write_text(json.dumps([record.step for record in callback.records]))


def test_whether_there_is_time_is_decided_by_one_clock(tmp_path: Path) -> None:
    assert together(2, waits, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"{number}.json").read_text() for number in range(2))
    assert first == second and 1 < len(json.loads(first)) < 12


def in_trainer(number: int, out: Path, watched: bool) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RLSPEC_CACHE=str(out / "cache"))
    callback = SpectralCallback(every=2, out=out / "run")
    callbacks: list[TrainerCallback] = [callback] if watched else []
    trainer = plain_trainer(out / "t", callbacks, toy_with_uneven_layers(), ddp_backend="gloo")
    trainer.train()
    assert trainer.args.world_size == 2 and callback.disabled is None
    lines = [line for line in trainer.state.log_history if "loss" in line]
    (out / f"{watched}{number}.json").write_text(json.dumps([line["loss"] for line in lines]))
    if watched:
        trainer.model.save_pretrained(out / f"model{number}")  # type: ignore[union-attr]
        found = [line["step"] for line in trainer.state.log_history if "spectra/delta_relative" in line]
        assert found == [0, 2, 4]


def test_a_trainer_with_ddp_trains_the_same_and_is_measured(tmp_path: Path) -> None:
    for watched in (False, True):
        assert together(2, in_trainer, tmp_path, watched) == [0, 0]
    alone, with_it = ((tmp_path / f"{watched}0.json").read_text() for watched in (False, True))
    assert alone == with_it and len(set(json.loads(alone))) == 4
    rows = [json.loads(line) for line in (tmp_path / "run" / "spectra.jsonl").read_text().splitlines()]
    basis = SpectralBasis.from_checkpoint(tmp_path / "run" / "reference")
    truth = SpectralTracker(basis).measure(tmp_path / "model0", step=4, stage="train").rows
    assert [row for row in rows if row["step"] == 4] == truth and truth[0]["delta_relative"] > 1e-3
