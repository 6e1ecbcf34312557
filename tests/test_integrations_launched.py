"""The callback in trainers that several processes run, as torchrun starts them: DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_toys import losses, plain_trainer
from process_toys import together
from torch import Tensor
from train_toys import toy_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from rlspec import SpectralBasis, SpectralTracker
from rlspec.integrations.transformers import SpectralCallback
from rlspec.io.module import gathered, strip_wrappers
from rlspec.spectra.spread import is_spread, sharded_modules

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"ddp_backend": "gloo"},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    },
}


def launched(number: int, count: int, out: Path, way: str) -> None:
    """What torchrun tells a process, of which the group is made already."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RLSPEC_CACHE=str(out / "cache"))
    if way != "ddp":
        # accelerate takes both for a matter of accelerators: on CPUs it silently trains with DDP, or refuses.
        from accelerate import DistributedType, PartialState
        from accelerate.state import AcceleratorState

        right = AcceleratorState.__init__

        def as_accelerator(self: Any, *args: Any, **options: Any) -> None:
            known = PartialState._shared_state
            if known["distributed_type"] == DistributedType.MULTI_CPU:
                known["distributed_type"] = DistributedType.MULTI_XPU
            right(self, *args, **options)

        AcceleratorState.__init__ = as_accelerator


class Killed(TrainerCallback):
    """As by the kernel, after the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def trains(number: int, count: int, out: Path, way: str, watched: bool, part: str) -> None:
    launched(number, count, out, way)
    model = LlamaForCausalLM.from_pretrained(out / "model")
    callback = SpectralCallback(every=1, out=out / "run")
    called: list[TrainerCallback] = [callback] if watched else []
    if part == "killed":
        called.append(Killed())
    saving = {"save_strategy": "steps", "save_steps": 2}
    folder = out / f"trainer {watched}"
    trainer = plain_trainer(folder, called, model, **WAYS[way], **saving)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if part == "resumed" else None)
    assert is_spread(trainer.model) == (way == "fsdp2") and callback.disabled is None, callback.disabled
    assert ("model.layers.1" in sharded_modules(trainer.model)) == (way == "fsdp2")
    keep(trainer, number, out / f"{watched}.pt")


def keep(trainer: Trainer, number: int, file: Path) -> None:
    """What became of a training: its losses, weights and random state."""
    assert trainer.model is not None and trainer.args.world_size > 1
    whole = {strip_wrappers(n): gathered(p).detach().clone() for n, p in trainer.model.named_parameters()}
    if number == 0:
        torch.save((losses(trainer), whole, torch.get_rng_state()), file)


def assert_same(folder: Path) -> dict[str, Tensor]:
    """Equal to the bit without the callback and with it; the weights."""
    (alone, start, state), (with_it, end, watched_state) = (
        torch.load(folder / f"{watched}.pt") for watched in (False, True)
    )
    assert alone == with_it and len({str(line) for line in alone}) == len(alone) > 2
    assert torch.equal(state, watched_state) and start.keys() == end.keys()
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items())
    return end


def assert_rows(folder: Path, end: dict[str, Tensor]) -> None:
    """No step twice, none missing, and the last one's are those of the weights."""
    rows = [json.loads(line) for line in (folder / "run" / "spectra.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[::6]] == [0, 1, 2, 3, 4] and len(rows) == 30
    model = toy_model()
    basis = SpectralBasis.from_model(model)
    model.load_state_dict(end, strict=False)
    truth = SpectralTracker(basis).measure(model, step=4, stage="train").rows
    assert rows[-6:] == truth and truth[0]["delta_relative"] > 1e-3


@pytest.mark.parametrize(("way", "count"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)])
def test_a_training_that_is_killed_and_resumed_is_the_same_and_goes_on_in_its_folder(
    way: str, count: int, tmp_path: Path
) -> None:
    toy_model(attention_dropout=0.2).save_pretrained(tmp_path / "model")
    for watched in (False, True):
        assert together(count, trains, count, tmp_path, way, watched, "killed") == [-signal.SIGKILL] * count
        assert together(count, trains, count, tmp_path, way, watched, "resumed") == [0] * count
    assert_rows(tmp_path, assert_same(tmp_path))


def trains_with_trl(number: int, out: Path, name: str, way: str, watched: bool) -> None:
    launched(number, 2, out, way)
    from trl_toys import maker

    callback = SpectralCallback(every=1, out=out / "run")
    trainer = maker(out, name, "plain", **WAYS[way])([callback] if watched else [])
    trainer.train()
    assert is_spread(trainer.model) == (way == "fsdp2") and callback.disabled is None, callback.disabled
    assert [record.step for record in callback.records] == ([0, 1, 2, 3] if watched else [])
    keep(trainer, number, out / f"{watched}.pt")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "RLOO"])
def test_a_training_of_trl_is_the_same(name: str, way: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    toy_model(attention_dropout=0.2).save_pretrained(tmp_path / "model")
    for watched in (False, True):
        assert together(2, trains_with_trl, tmp_path, name, way, watched) == [0, 0]
    assert_same(tmp_path)


def trains_with_tensor_parallelism(number: int, out: Path, watched: bool) -> None:
    launched(number, 2, out, "tp")
    callback = SpectralCallback(every=1, out=out / "run")
    model = LlamaForCausalLM.from_pretrained(out / "model", tp_plan="auto")
    trainer = plain_trainer(out / "trainer", [callback] if watched else [], model)
    trainer.train()
    assert is_spread(trainer.model) and callback.disabled is None, callback.disabled
    keep(trainer, number, out / f"{watched}.pt")


def test_a_training_by_tensor_parallelism_is_the_same(tmp_path: Path) -> None:
    """Which Trainer does not resume."""
    toy_model(attention_dropout=0.2).save_pretrained(tmp_path / "model")
    for watched in (False, True):
        assert together(2, trains_with_tensor_parallelism, tmp_path, watched) == [0, 0]
    assert_rows(tmp_path, assert_same(tmp_path))
