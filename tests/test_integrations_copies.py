"""Copies of a callback, made by whoever copies or pickles a trainer's callbacks, and a trainer that restores them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from integration_toys import plain_trainer
from transformers import TrainerCallback

from rlspec.integrations.transformers import SpectralCallback

pytestmark = pytest.mark.usefixtures("own_cache")


class Copies(TrainerCallback):
    """At step 2, in the middle of the training."""

    def __init__(self, callback: SpectralCallback, how: str) -> None:
        self.callback, self.how = callback, how
        self.trainer: Any = None
        self.copy: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            if self.how == "pickle":
                self.copy = pickle.loads(pickle.dumps(self.callback))
            else:
                copied = copy.deepcopy(self.trainer.callback_handler)
                (self.copy,) = (one for one in copied.callbacks if isinstance(one, SpectralCallback))

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def mean_score(model: Any) -> dict[str, list[bool]]:
    return {"ood": [True, False] * 20}


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_made_in_a_training_is_in_none_and_begins_its_own(how: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"modules": "q,o", "rank": 3, "per_head": True, "budget": 1.0}
    callback = SpectralCallback(1, out=tmp_path / "out", evaluate=mean_score, alarm="ood", **arguments)
    copies = Copies(callback, how)
    trainer = copies.trainer = plain_trainer(tmp_path / "t", [copies, callback])
    trainer.train()
    assert callback.disabled is None and [record.step for record in callback.records] == [0, 1, 2, 3, 4]
    rows = (tmp_path / "out" / "spectra.jsonl").read_bytes()

    copied = copies.copy
    assert type(copied) is SpectralCallback and copied is not callback
    assert [record.rows for record in copied.records] == [record.rows for record in callback.records[:2]]
    assert copied.__getstate__().keys() == callback.__getstate__().keys()
    copied.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert len(copied.records) == 2  # it is in no training

    copied.out = tmp_path / "copied"
    plain_trainer(tmp_path / "t", [copied]).train()
    assert copied.disabled is None and copied.unscored is None
    assert (tmp_path / "copied" / "spectra.jsonl").read_bytes() == rows
    assert (tmp_path / "out" / "spectra.jsonl").read_bytes() == rows


def test_what_a_subclass_adds_is_copied_too() -> None:
    class Named(SpectralCallback):
        def __init__(self, name: str) -> None:
            super().__init__(every=3)
            self.name = name

    copied = copy.deepcopy(Named("mine"))
    assert (copied.name, copied.every, copied.records, copied.disabled) == ("mine", 3, [], None)


def test_a_trainer_that_restores_callbacks_from_a_checkpoint_keeps_this_one(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    plain_trainer(tmp_path / "t", [SpectralCallback(1, out=tmp_path / "out")], **saving).train()
    rows = (tmp_path / "out" / "spectra.jsonl").read_bytes()
    callback = SpectralCallback(1, out=tmp_path / "out")
    trainer = plain_trainer(
        tmp_path / "t", [callback], **saving, restore_callback_states_from_checkpoint=True
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-2"))
    assert callback.disabled is None and callback in trainer.callback_handler.callbacks
    assert (tmp_path / "out" / "spectra.jsonl").read_bytes() == rows
