"""The last step of a training is measured, however it ends, and with its own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration_toys import plain_trainer
from transformers import TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.integrations.transformers import SpectralCallback
from rlspec.tasks.scores import read_scores

pytestmark = pytest.mark.usefixtures("own_cache")


class Stops(TrainerCallback):
    def _stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            control.should_training_stop = True


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_save"])
def test_a_training_that_is_stopped_is_measured_at_its_end(event: str, first: bool, tmp_path: Path) -> None:
    stops = Stops()
    setattr(stops, event, stops._stop)
    callback = SpectralCallback(every=100)
    called = [stops, callback] if first else [callback, stops]
    settings = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 11}
    trainer = plain_trainer(tmp_path, called, max_steps=9, **settings)  # epochs of 3 steps
    basis = SpectralBasis.from_model(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 3 and callback.disabled is None
    assert [record.step for record in callback.records] == [0, 3]
    assert (
        callback.records[-1].rows == SpectralTracker(basis).measure(trainer.model, step=3, stage="train").rows
    )


def test_the_last_step_waits_for_no_budget(tmp_path: Path) -> None:
    callback = SpectralCallback(every=1, budget=1e-9)
    plain_trainer(tmp_path, [callback]).train()
    assert [record.step for record in callback.records] == [0, 4]


@pytest.mark.parametrize("results", [np.array([True, False]), torch.tensor([1.0, 0.0])])
def test_scores_may_be_arrays(results: Any) -> None:
    score = read_scores({"ood": results}, "evaluate")["ood"]
    assert (score.value, score.n, score.results) == (0.5, 2, (1.0, 0.0))
