"""Scores stand beside spectra of the same weights, and one that cannot be taken keeps no other from being taken."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from restore_toys import rewrite, tune
from series_toys import measure, script
from train_toys import save_toy_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlspec
from rlspec.errors import CheckpointError, OptionError
from rlspec.jobs.series import losses
from rlspec.jobs.series.watch import watch
from rlspec.train.texts import text_losses

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = ["cards 1 2 3 4", "number 24"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_toy_model(tmp_path / "base")
    for step in (10, 20, 30):
        tune(tmp_path / "base", tmp_path / "run" / f"checkpoint-{step}", size=0.01 * step, seed=step)
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def retrain(run: Path, step: int) -> Path:
    place = run / "run" / f"checkpoint-{step}"
    shutil.rmtree(place)
    tune(run / "base", place, size=0.5, seed=7)
    return place


def series(run: Path, *names: str, **more: Any) -> rlspec.Series:
    places = [run / "run" / name for name in names] or [run / "run"]
    return rlspec.measure(run / "base", places, out=run / "out", modules="q", **more)


def found(run: Path) -> dict[tuple[str, str], Any]:
    rows = [json.loads(line) for line in (run / "out" / "scores.jsonl").read_text().splitlines()]
    return {(row["checkpoint"], row["score"]): row["value"] for row in rows}


def loss(place: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return sum(text_losses(model, AutoTokenizer.from_pretrained(place), TEXTS)) / len(TEXTS)


@pytest.mark.parametrize("also", [{}, {"texts": "retain.jsonl"}])
def test_a_checkpoint_that_was_trained_anew_loses_the_scores_of_its_old_weights(
    also: dict[str, str], run: Path
) -> None:
    texts = {"texts": run / "retain.jsonl"}
    series(run, **texts)
    kept = found(run)["checkpoint-20", "text_loss"]
    place = retrain(run, 10)
    (run / "out" / "spectra.jsonl").unlink()
    (run / "out" / "measure.json").unlink()
    series(run, **{name: run / value for name, value in also.items()})
    if not also:
        assert ("checkpoint-10", "text_loss") not in found(run)  # and a report shows none
        series(run, **texts)
    assert found(run)["checkpoint-10", "text_loss"] == pytest.approx(loss(place), rel=1e-6)
    assert found(run)["checkpoint-20", "text_loss"] == kept


def test_weights_that_were_written_anew_get_no_scores_beside_the_spectra_of_others(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series(run)
    retrain(run, 10)
    scores = series(run, "checkpoint-20", texts=run / "retain.jsonl").scores
    assert {row["checkpoint"] for row in scores} == {"base", "checkpoint-20", "checkpoint-30"}
    assert "checkpoint-10: written anew since its spectra were measured" in caplog.text


def test_weights_that_change_while_they_are_scored_get_no_scores(run: Path) -> None:
    def evaluate(place: Path) -> dict[str, float]:
        if place.name == "checkpoint-20":
            retrain(run, 20)
        return {"ood": 0.5}

    with pytest.raises(CheckpointError, match="checkpoint-20: written anew since its spectra were measured"):
        series(run, evaluate=evaluate)
    assert set(found(run)) == {("checkpoint-10", "ood"), ("checkpoint-30", "ood")}


def test_one_that_cannot_be_scored_keeps_no_others_from_it_and_may_be_left_out(run: Path) -> None:
    command = script(
        run, "if step == 10: raise SystemExit('no card')\nprint(json.dumps({'ood': [True] * step}))"
    )
    more = ("--modules", "q", "--eval", command, "--texts", str(run / "retain.jsonl"))
    result = measure(run, *more)
    assert result.exit_code == 2
    assert "passed over: evaluate: " in result.stderr and "ended with code 1: no card" in result.stderr
    assert "scores that lack, for the reasons above: 1; the same command takes them again" in result.stderr
    everything = {("base", "text_loss")} | {
        (f"checkpoint-{step}", name)
        for step in (10, 20, 30)
        for name in ("ood", "text_loss", "forgetting")
        if (step, name) != (10, "ood")
    }
    assert set(found(run)) == everything
    assert all(f"checkpoint-{step}  " in result.stdout for step in (10, 20, 30))
    with pytest.raises(OptionError, match="no card"):
        series(run, evaluate=command)
    assert len(series(run, "checkpoint-20", evaluate=command).scores) == 2


def test_what_holds_no_numbers_is_named_and_passed_over(run: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan

    rewrite(run / "run" / "checkpoint-20", spoil)
    result = measure(run, "--modules", "q", "--texts", str(run / "retain.jsonl"))
    assert result.exit_code == 2
    assert any(
        line.startswith("passed over: ") and "checkpoint-20: " in line and "up_proj" in line
        for line in result.stderr.splitlines()
    )
    assert {label for label, _ in found(run)} == {"base", "checkpoint-10", "checkpoint-30"}


def test_a_base_that_cannot_be_scored_leaves_no_scores_that_lack_what_is_held_against_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = losses.text_losses

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(losses, "text_losses", full)
    with pytest.raises(CheckpointError, match="base: not scored: CUDA out of memory$"):
        series(run, texts=run / "retain.jsonl")
    assert not (run / "out" / "scores.jsonl").exists()
    monkeypatch.setattr(losses, "text_losses", right)
    series(run, texts=run / "retain.jsonl")
    assert len(found(run)) == 7


def test_functions_without_a_name_of_their_own_are_asked_anew(run: Path) -> None:
    def score(place: Path, *, value: float) -> dict[str, float]:
        return {"ood": value}

    class Judge:
        def __init__(self, value: float) -> None:
            self.value = value

        def score(self, place: Path) -> dict[str, float]:
            return {"ood": self.value}

        __call__ = score

    for value in (0.25, 0.75):
        for evaluate in (
            partial(score, value=value), lambda _, value=value: {"ood": value}, Judge(value), Judge(value).score,
        ):  # fmt: skip
            scores = series(run, evaluate=evaluate).scores
            assert [row["value"] for row in scores] == [value] * 3


def test_forgetting_is_of_the_same_tokens_whatever_tokenizer_a_checkpoint_brings(run: Path) -> None:
    """Trainers save a tokenizer that ends texts, or begins them otherwise."""
    place = run / "run" / "checkpoint-40"
    shutil.copytree(run / "base", place)
    saved = json.loads((place / "tokenizer.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(place)
    eos = tokenizer.eos_token
    saved["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": eos, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_token_id], "tokens": [eos]}},
    }
    (place / "tokenizer.json").write_text(json.dumps(saved))
    assert AutoTokenizer.from_pretrained(place)(TEXTS[0]) != tokenizer(TEXTS[0])  # or nothing is tested
    series(run, texts=run / "retain.jsonl")
    assert found(run)["checkpoint-40", "forgetting"] == 0.0


def test_a_model_that_lacks_tokens_of_the_base_is_told_of(run: Path) -> None:
    place = run / "run" / "checkpoint-40"
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    model.resize_token_embeddings(9)
    model.save_pretrained(place)
    with pytest.raises(
        OptionError, match=r"checkpoint-40: text_loss: .* makes token \d+ of .*, the model has 9"
    ):
        series(run, texts=run / "retain.jsonl")


def test_commands_are_told_nothing_of_the_launch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that finds RANK and WORLD_SIZE waits for processes that are not its own."""
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    command = script(
        run, f"import os\nprint(json.dumps({{name: name in os.environ for name in {(*launch, 'PATH')}}}))"
    )
    for name in launch:
        monkeypatch.setenv(name, "1")
    from rlspec.jobs.series.evaluation import run_command

    scores = run_command(command, run / "run" / "checkpoint-10")
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(launch, 0) | {"PATH": 1}


def watched(run: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    """The command with --watch, of three looks at what is there."""
    looks = iter(range(2))

    def sleep(seconds: float) -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    from rlspec.jobs.series import watch as watching

    def looked(*args: Any, **options: Any) -> Any:
        return watch(*args, **options, sleep=sleep)

    monkeypatch.setattr(watching, "watch", looked)
    return measure(run, "--modules", "q", "--watch", *more)


def test_an_alarm_waits_where_the_base_alone_has_a_score(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        (run / "run" / f"checkpoint-{step}" / "config.json").write_text("{}")
    more = ("--texts", str(run / "retain.jsonl"), "--alarm", "text_loss")
    result = watched(run, monkeypatch, *more)
    assert result.exit_code == 130, result.output
    assert set(found(run)) == {("base", "text_loss")} and result.stderr.count("passed over") == 3


def test_scores_of_other_problems_are_not_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script(run, "print(json.dumps({'ood': [True] * (59 if step == 20 else 60)}))")
    result = watched(run, monkeypatch, "--eval", command, "--alarm", "ood")
    assert result.exit_code == 130, result.output
    assert "checkpoint-20: score 'ood' of n=59 problems, 60 of checkpoint-10" in result.stderr
    assert set(found(run)) == {("checkpoint-10", "ood"), ("checkpoint-30", "ood")}
    # Without an alarm they are scores as any other; an alarm over them names the checkpoint's own step.
    assert measure(run, "--modules", "q", "--eval", command).exit_code == 0
    result = measure(run, "--modules", "q", "--eval", command, "--alarm", "ood")
    assert result.exit_code == 2 and "n=59 at step 20, 60 before" in result.stderr
