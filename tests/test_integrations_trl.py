"""The callback inside TRL's trainers: none of them notices it, and what it measures is right."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import SETUPS, assert_same_training, losses, weights
from train_toys import toy_model
from transformers import TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.integrations.caller import LOGGED
from rlspec.integrations.transformers import SpectralCallback

pytest.importorskip("trl", reason="trl is not installed")
toys = import_module("trl_toys")
pytestmark = pytest.mark.usefixtures("own_cache")


class Kept(TrainerCallback):
    """What the loggers were handed."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


@pytest.mark.parametrize("setup", [*SETUPS, "adapters"])
@pytest.mark.parametrize("name", toys.TRAINERS)
def test_the_training_is_the_same_to_the_bit(name: str, setup: str, tmp_path: Path) -> None:
    kept, callback = Kept(), SpectralCallback(every=2, out=tmp_path / "out")
    # Their losses are in their own lines, which must hold their own averages still (see SFTTrainer.log).
    trainer = assert_same_training(toys.maker(tmp_path, name, setup, kept), callback)
    assert callback.disabled is None
    assert [record.step for record in callback.records] == [0, 2, 3]
    assert [line["step"] for line in kept.logs if LOGGED.keys() <= line.keys()] == [0, 2, 3]
    truth = SpectralTracker(SpectralBasis.from_model(toy_model())).measure(
        trainer.model, step=3, stage="train"
    )
    assert callback.records[-1].rows == truth.rows
    assert max(row["delta_relative"] for row in truth.rows) > 1e-3


@pytest.mark.parametrize("name", toys.TRAINERS)
def test_a_resumed_training_is_the_same_and_goes_on_in_its_folder(name: str, tmp_path: Path) -> None:
    ends: list[tuple[Any, Any]] = []
    for watched in (False, True):
        folder = tmp_path / str(watched)
        callback = SpectralCallback(every=1, out=folder / "out")
        make = toys.maker(folder, name, "plain", save_strategy="steps", save_steps=2, max_steps=4)
        called = [callback] if watched else []
        make(called).train()
        whole = [(folder / "out" / "spectra.jsonl").read_bytes()] if watched else []
        trainer = make(called)
        trainer.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
        ends.append((losses(trainer), weights(trainer)))
        if watched:
            assert callback.disabled is None
            assert [record.step for record in callback.records] == [0, 1, 2, 3, 4]
            assert [(folder / "out" / "spectra.jsonl").read_bytes()] == whole
    (alone, alone_weights), (with_it, with_it_weights) = ends
    assert alone == with_it and len(alone) == 4
    assert all(torch.equal(with_it_weights[key], tensor) for key, tensor in alone_weights.items())
