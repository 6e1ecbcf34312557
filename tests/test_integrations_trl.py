"""The callback inside TRL's trainers: none of them notices it, and what it measures is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import SETTINGS, assert_same_training
from train_toys import toy_model, toy_tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.integrations.transformers import LOGGED, SpectralCallback

trl = pytest.importorskip("trl", reason="trl is not installed")

PROMPTS = ["1 2 3", "4 5", "6 7 8", "9 0"] * 8


def dataset(**columns: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def shorter_is_better(completions: list[str], **kwargs: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def sft(folder: Path, **settings: Any) -> tuple[type[Trainer], dict[str, Any]]:
    data = dataset(prompt=PROMPTS, completion=[f" yes {prompt}" for prompt in PROMPTS])
    return trl.SFTTrainer, {"args": trl.SFTConfig(str(folder), **settings), "train_dataset": data}


def dpo(folder: Path, **settings: Any) -> tuple[type[Trainer], dict[str, Any]]:
    size = len(PROMPTS)
    data = dataset(prompt=PROMPTS, chosen=[" yes"] * size, rejected=[" no"] * size)
    return trl.DPOTrainer, {"args": trl.DPOConfig(str(folder), **settings), "train_dataset": data}


def online(kind: str) -> Callable[..., tuple[type[Trainer], dict[str, Any]]]:
    def made(folder: Path, **settings: Any) -> tuple[type[Trainer], dict[str, Any]]:
        sampling = {"num_generations": 2, "max_completion_length": 6}
        args = getattr(trl, f"{kind}Config")(str(folder), **settings, **sampling)
        data = dataset(prompt=PROMPTS)
        return getattr(trl, f"{kind}Trainer"), {
            "args": args,
            "train_dataset": data,
            "reward_funcs": shorter_is_better,
        }

    return made


TRAINERS = {"SFT": sft, "DPO": dpo, "GRPO": online("GRPO"), "RLOO": online("RLOO")}


class Kept(TrainerCallback):
    """What the loggers were handed."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


@pytest.mark.parametrize("name", TRAINERS)
def test_the_training_is_the_same_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path / "cache"))
    kept = Kept()
    toy_model(attention_dropout=0.2).save_pretrained(tmp_path / "model")  # some load it again, as a reference

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        torch.manual_seed(0)
        settings = {**SETTINGS, "max_steps": 3, "bf16": False}
        kind, arguments = TRAINERS[name](tmp_path / "trainer", **settings)
        return kind(
            model=LlamaForCausalLM.from_pretrained(tmp_path / "model"),
            processing_class=toy_tokenizer(),
            callbacks=[*callbacks, kept],
            **arguments,
        )

    callback = SpectralCallback(every=2, out=tmp_path / "out")
    # Their losses are in their own lines, which must hold their own averages still (see SFTTrainer.log).
    trainer = assert_same_training(make, callback)
    assert callback.disabled is None
    assert [record.step for record in callback.records] == [0, 2, 3]
    assert [line["step"] for line in kept.logs if LOGGED.keys() <= line.keys()] == [0, 2, 3]
    truth = SpectralTracker(SpectralBasis.from_model(toy_model())).measure(
        trainer.model, step=3, stage="train"
    )
    assert callback.records[-1].rows == truth.rows
    assert max(row["delta_relative"] for row in truth.rows) > 1e-3
