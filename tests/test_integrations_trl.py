"""The callback inside TRL's trainers: none of them notices it, and what it measures is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import SETTINGS, SETUPS, Make, assert_same_training, losses, weights
from train_toys import toy_model, toy_tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.integrations.transformers import LOGGED, SpectralCallback

trl = pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.usefixtures("own_cache")

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


def maker(folder: Path, name: str, setup: str, *more: TrainerCallback, **changes: Any) -> Make:
    """Makes a trainer of the kind ``name`` with what ``setup`` names of :data:`SETUPS`, or with adapters of PEFT."""
    toy_model(attention_dropout=0.2).save_pretrained(folder / "model")  # some load it again, as a reference

    def make(callbacks: list[TrainerCallback]) -> Trainer:
        torch.manual_seed(0)
        settings = {**SETTINGS, "max_steps": 3, "bf16": False, **SETUPS.get(setup, {}), **changes}
        kind, arguments = TRAINERS[name](folder / "trainer", **settings)
        if setup == "adapters":
            peft = pytest.importorskip("peft")
            arguments["peft_config"] = peft.LoraConfig(
                r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "k_proj"]
            )
        return kind(
            model=LlamaForCausalLM.from_pretrained(folder / "model"),
            processing_class=toy_tokenizer(),
            callbacks=[*callbacks, *more],
            **arguments,
        )

    return make


@pytest.mark.parametrize("setup", [*SETUPS, "adapters"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_training_is_the_same_to_the_bit(name: str, setup: str, tmp_path: Path) -> None:
    kept, callback = Kept(), SpectralCallback(every=2, out=tmp_path / "out")
    # Their losses are in their own lines, which must hold their own averages still (see SFTTrainer.log).
    trainer = assert_same_training(maker(tmp_path, name, setup, kept), callback)
    assert callback.disabled is None
    assert [record.step for record in callback.records] == [0, 2, 3]
    assert [line["step"] for line in kept.logs if LOGGED.keys() <= line.keys()] == [0, 2, 3]
    truth = SpectralTracker(SpectralBasis.from_model(toy_model())).measure(
        trainer.model, step=3, stage="train"
    )
    assert callback.records[-1].rows == truth.rows
    assert max(row["delta_relative"] for row in truth.rows) > 1e-3


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_training_is_the_same_and_goes_on_in_its_folder(name: str, tmp_path: Path) -> None:
    ends: list[tuple[Any, Any]] = []
    for watched in (False, True):
        folder = tmp_path / str(watched)
        callback = SpectralCallback(every=1, out=folder / "out")
        make = maker(folder, name, "plain", save_strategy="steps", save_steps=2, max_steps=4)
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
