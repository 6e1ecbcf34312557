"""An evaluation of the user's that goes through the trainer's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import SETTINGS, assert_same_training, examples
from train_toys import toy_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from rlspec.integrations.transformers import SpectralCallback

pytestmark = pytest.mark.usefixtures("own_cache")


class Heard(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_it_may_be_the_trainers_which_goes_on_as_without_it(tmp_path: Path) -> None:
    trainers: list[Trainer] = []
    heard: list[Heard] = []

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        heard.append(Heard())
        patient = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)
        settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
        settings |= {"save_strategy": "steps", "load_best_model_at_end": True, "max_steps": 8}
        folder = tmp_path / str(len(trainers))
        torch.manual_seed(0)
        data: Any = {"train_dataset": examples(), "eval_dataset": examples(4)}
        args = TrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
        called = [*callbacks, patient, heard[-1]]
        trainer = Trainer(toy_model(attention_dropout=0.2), args, callbacks=called, **data)
        trainers.append(trainer)
        return trainer

    def evaluate(model: Any) -> dict[str, float]:
        return {"loss": trainers[-1].evaluate()["eval_loss"]}

    callback = SpectralCallback(every=1, evaluate=evaluate)
    assert_same_training(make, callback)
    assert callback.unscored is None and callback.disabled is None
    assert trainers[0].state.global_step == 6  # the patience was at its end
    assert heard[0].steps == heard[1].steps == [2, 4, 6]
    theirs = [line for line in trainers[1].state.log_history if "eval_loss" in line]
    assert [line["step"] for line in theirs] == [2, 4, 6]
    scores = {record.step: record.scores["loss"] for record in callback.records}
    assert all(scores[line["step"]] == line["eval_loss"] for line in theirs)
