"""Scores beside the spectra inside a trainer: right, kept, alarming, and not noticed by the training."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import Clock, assert_same_training, plain_trainer
from torch import nn
from train_toys import toy_model, toy_tokenizer
from transformers import TrainerCallback

from rlspec.errors import OptionError
from rlspec.integrations import scoring
from rlspec.integrations.transformers import SpectralCallback
from rlspec.run.budget import Pace
from rlspec.train.texts import text_losses

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = ["1 2 3 yes", "no again 7 8"]


def score_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def texts_file(folder: Path) -> Path:
    path = folder / "retain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


class Copies(TrainerCallback):
    def __init__(self) -> None:
        self.models: dict[int, nn.Module] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.models[state.global_step] = copy.deepcopy(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.models[state.global_step] = copy.deepcopy(kwargs["model"])


def test_scores_are_those_of_the_models_at_the_steps_of_the_spectra(tmp_path: Path) -> None:
    copies = Copies()
    callback = SpectralCallback(
        every=2,
        out=tmp_path / "out",
        texts=texts_file(tmp_path),
        evaluate=lambda model: {"norm": model.lm_head.weight.norm().item(), "solved": [True, False]},
    )
    trainer = plain_trainer(tmp_path / "trainer", [copies, callback])
    trainer.processing_class = trainer.callback_handler.processing_class = toy_tokenizer()
    trainer.train()
    assert callback.disabled is None and callback.unscored is None
    rows = score_rows(tmp_path / "out")
    assert [(row["step"], row["score"]) for row in rows] == [
        (step, name) for step in (0, 2, 4) for name in ("norm", "solved", "text_loss")
    ]
    for record in callback.records:
        model: Any = copies.models[record.step]
        losses = text_losses(model, toy_tokenizer(), TEXTS)
        assert record.scores == {
            "norm": model.lm_head.weight.norm().item(),
            "solved": 0.5,
            "text_loss": pytest.approx(sum(losses) / 2, rel=1e-12),
        }
        stored = {row["score"]: row for row in rows if row["step"] == record.step}
        assert {name: row["value"] for name, row in stored.items()} == record.scores
        assert stored["solved"]["results"] == [1.0, 0.0] and stored["norm"]["n"] is None
    logged = [line for line in trainer.state.log_history if "spectra/score/norm" in line]
    assert [line["spectra/score/text_loss"] for line in logged] == [
        record.scores["text_loss"] for record in callback.records
    ]


def test_an_evaluation_that_draws_and_changes_modes_does_not_change_the_training(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def evaluate(model: Any) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        model.train()
        return {"random": torch.rand(()).item()}

    callback = SpectralCallback(every=1, evaluate=evaluate)
    assert_same_training(lambda callbacks: plain_trainer(tmp_path, callbacks), callback)
    assert callback.unscored is None and len(callback.records) == 5
    assert seen == [(False, False)] * 5


def test_an_evaluation_that_fails_ends_the_scores_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def evaluate(model: Any) -> dict[str, float]:
        raise KeyError("deal")

    callback = SpectralCallback(every=2, evaluate=evaluate)
    with caplog.at_level(logging.WARNING):
        plain_trainer(tmp_path, [callback]).train()
    assert callback.unscored == "KeyError: 'deal'" and callback.disabled is None
    assert [record.step for record in callback.records] == [0, 2, 4]
    assert [r.getMessage() for r in caplog.records if "scores end here" in r.getMessage()] == [
        "scores end here, the tracking and the training go on: KeyError: 'deal'"
    ]


def test_a_loss_that_is_no_number_ends_the_scores_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "token_loss_sums", lambda model, ids: [float("nan") for _ in ids])
    callback = SpectralCallback(every=2, texts=texts_file(tmp_path))
    trainer = plain_trainer(tmp_path, [callback])
    trainer.processing_class = trainer.callback_handler.processing_class = toy_tokenizer()
    trainer.train()
    assert callback.disabled is None and [record.step for record in callback.records] == [0, 2, 4]
    assert callback.unscored is not None and "is nan, wanted a finite number" in callback.unscored


@pytest.mark.parametrize("way", ["evaluate", "texts"])
def test_scores_of_a_model_that_is_compiled_in_place_leave_its_graphs_as_they_are(
    way: str, tmp_path: Path
) -> None:
    """Lengths that the training has not would make it one of shapes that vary, whose sums round otherwise."""
    graphs: list[list[Any]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs[-1].append([tuple(getattr(one, "shape", ())) for one in inputs])
        return graph.forward

    def evaluate(model: Any) -> dict[str, float]:
        return {str(n): model(torch.ones(1, n, dtype=torch.long)).logits.sum().item() for n in (3, 5, 7)}

    given: dict[str, Any] = {"evaluate": evaluate} if way == "evaluate" else {"texts": texts_file(tmp_path)}
    callback = SpectralCallback(every=1, **given)
    for called in ([], [callback]):
        torch.compiler.reset()
        graphs.append([])
        model = toy_model(attention_dropout=0.2)
        model.compile(backend=backend)
        trainer = plain_trainer(tmp_path, called, model, max_steps=2)
        trainer.processing_class = trainer.callback_handler.processing_class = toy_tokenizer()
        trainer.train()
    assert callback.unscored is None and all(record.scores for record in callback.records)
    assert graphs[0] == graphs[1] != []


def falling() -> Any:
    """Of 40 problems all are solved at first and at the next event, then none."""
    calls = iter([0.9, 1.0, 0.0, 0.0, 0.0])

    def evaluate(model: Any) -> dict[str, Any]:
        solved = round(40 * next(calls))
        return {"ood": [i < solved for i in range(40)]}

    return evaluate


@pytest.mark.parametrize("stop", [False, True])
def test_the_alarm_names_the_checkpoint_to_go_back_to_and_stops_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stop: bool
) -> None:
    callback = SpectralCallback(every=1, evaluate=falling(), alarm="ood", stop=stop)
    trainer = plain_trainer(tmp_path, [callback], save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert callback.fall is not None and (callback.fall.peak_step, callback.fall.step) == (1, 2)
    told = [r.getMessage() for r in caplog.records if "go back to" in r.getMessage()]
    p = 2.0**-40 * 2 * 2 * 3
    assert told == [
        f"ood fell from 100.0 % at step 1 to 0.0 % at step 2 (p = {p:.2g}): go back to {tmp_path / 'checkpoint-1'}"
    ]
    assert trainer.state.global_step == (2 if stop else 4)


def test_a_resumed_training_keeps_its_scores_and_what_the_alarm_has_seen(tmp_path: Path) -> None:
    solved = iter([36, 40, 40])
    first = SpectralCallback(
        every=1,
        out=tmp_path / "out",
        alarm="ood",
        evaluate=lambda model: {"ood": [i < n for n in [next(solved)] for i in range(40)]},
    )
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    plain_trainer(tmp_path / "trainer", [first], **settings).train()
    second = SpectralCallback(
        every=1, out=tmp_path / "out", alarm="ood", evaluate=lambda model: {"ood": [False] * 40}
    )
    again = plain_trainer(tmp_path / "trainer", [second], **{**settings, "max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert second.disabled is None and second.unscored is None
    assert [row["step"] for row in score_rows(tmp_path / "out")] == [0, 1, 2, 3]
    assert [record.scores["ood"] for record in second.records] == [0.9, 1.0, 1.0, 0.0]
    assert second.fall is not None and (second.fall.peak_step, second.fall.step) == (1, 3)


@pytest.mark.parametrize("stop", [True, False])
def test_a_training_that_is_resumed_after_a_fall_ends_again_where_asked(
    stop: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    options: dict[str, Any] = {"every": 2, "out": tmp_path / "out", "alarm": "ood"}
    first = SpectralCallback(evaluate=falling(), **options)
    plain_trainer(tmp_path / "trainer", [first], **{**settings, "max_steps": 4}).train()
    assert first.fall is not None and first.fall.step == 4
    caplog.clear()
    second = SpectralCallback(evaluate=lambda model: {"ood": [False] * 40}, stop=stop, **options)
    again = plain_trainer(tmp_path / "trainer", [second], **{**settings, "max_steps": 9})
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    assert second.disabled is None and second.fall == first.fall
    assert again.state.global_step == (5 if stop else 9)
    assert [record.step for record in second.records] == ([0, 2, 4, 5] if stop else [0, 2, 4, 6, 8, 9])
    told = [r.getMessage() for r in caplog.records if "at step 4" in r.getMessage()]
    assert [line.partition(": go back to ")[2] for line in told] == (
        [
            f"{tmp_path / 'trainer' / 'checkpoint-2'}; the training ends after its next step, as stop=True asks; "
            "stop=False trains on"
        ]
        if stop
        else []
    )


def test_scores_of_other_problems_end_the_scores_of_a_resumed_training_alone(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    options: dict[str, Any] = {"every": 1, "out": tmp_path / "out", "alarm": "ood"}
    first = SpectralCallback(evaluate=lambda model: {"ood": [True] * 40}, **options)
    plain_trainer(tmp_path / "trainer", [first], **settings).train()
    second = SpectralCallback(evaluate=lambda model: {"ood": [True] * 30}, **options)
    again = plain_trainer(tmp_path / "trainer", [second], **{**settings, "max_steps": 2})
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-1"))
    assert second.disabled is None and [record.step for record in second.records] == [0, 1, 2]
    assert second.unscored is not None and "n=30 at step 2, 40 before" in second.unscored


def test_wrong_arguments_are_told_before_the_training(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"evaluate": 3}, "evaluate=3"),
        ({"texts": tmp_path / "none.jsonl"}, "no such file"),
        ({"alarm": "ood"}, "alarm='ood': no such score"),
        ({"alarm": "ood", "texts": texts_file(tmp_path)}, "alarm='ood': no such score"),
        ({"evaluate": len, "stop": True}, "stop=True needs alarm="),
    ]
    for given, told in wrong:
        with pytest.raises(OptionError, match=told):
            SpectralCallback(**given)


def test_the_budget_counts_on_the_next_measurement_to_take_as_long_with_its_scores(tmp_path: Path) -> None:
    clock = Clock()

    class Step(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.now += 15

    def evaluate(model: nn.Module) -> dict[str, float]:
        clock.now += 10
        return {"x": 1.0}

    callback = SpectralCallback(every=1, budget=0.45, evaluate=evaluate)
    callback.pace = Pace(0.45, clock)
    plain_trainer(tmp_path, [Step(), callback], max_steps=2).train()
    # After step 1, 10 of 25 s are spent (40 %): a second event makes it 20 of 35 (57 %), and after step 2, 20 of 50.
    assert [record.step for record in callback.records] == [0, 2]
    assert callback.pace.spent == 20
