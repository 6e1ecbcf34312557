"""TRL's trainers on a toy model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from integration_toys import SETTINGS, SETUPS, Make
from train_toys import toy_model, toy_tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

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


def maker(folder: Path, name: str, setup: str, *more: TrainerCallback, **changes: Any) -> Make:
    """Makes a trainer of the kind ``name`` with what ``setup`` names of :data:`SETUPS`, or with adapters of PEFT."""
    if not (folder / "model").exists():
        toy_model(attention_dropout=0.2).save_pretrained(
            folder / "model"
        )  # some load it again, as a reference

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
