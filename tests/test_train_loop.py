"""Invariants of a training run: accumulation, resume after a kill, Ctrl-C and watching change no loss."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_toys import ToyTask, toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlspec import _C
from rlspec.errors import CheckpointError, OptionError, RunFolderError, TensorError
from rlspec.signals import Terminated
from rlspec.train import (
    Callback,
    PPOConfig,
    ResumePoint,
    SFTConfig,
    StepState,
    TrainResult,
    evaluate,
    read_resume_point,
    save_checkpoint,
    train_ppo,
    train_sft,
)
from rlspec.train.schedule import learning_rate_at
from rlspec.train.state import resume_step, write_resume_point

TOKENIZER = toy_tokenizer()
SFT = SFTConfig(steps=8, batch_size=12, learning_rate=1e-2, checkpoint_every=3)
PPO = PPOConfig(updates=5, turns_per_update=24, mini_batch_size=12, learning_rate=1e-3, checkpoint_every=2)


def test_sft_learns_the_answers() -> None:
    config = SFTConfig(steps=60, batch_size=16, learning_rate=1e-2)
    model = toy_model()
    result = train_sft(model, TOKENIZER, ToyTask(), config)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert evaluate(model, TOKENIZER, ToyTask(), deals=40, turns=1).accuracy > 0.9


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_gradients_that_are_not_finite_are_no_step(stage: str, tmp_path: Path) -> None:
    """At a loss that is: the loop, which looks at losses, would save the broken weights."""
    model, passes = toy_model(), 0
    start = {}

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes < 2:
            return gradient
        start.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return gradient * torch.inf

    model.model.layers[0].self_attn.q_proj.weight.register_hook(spoil)
    with pytest.raises(TensorError, match=f"{stage} step .*gradients is .*; lower the learning rate"):
        if stage == "sft":
            config = replace(SFT, checkpoint_every=1, micro_batch_size=12)
            train_sft(model, TOKENIZER, ToyTask(), config, resume_dir=tmp_path)
        else:
            config = replace(PPO, checkpoint_every=1, epochs=2, micro_batch_size=100)
            train_ppo(model, TOKENIZER, ToyTask(), config, resume_dir=tmp_path)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    point = read_resume_point(tmp_path)
    assert (point is not None and point.step == 1) if stage == "sft" else point is None


def test_first_sft_loss_is_the_mean_over_answer_tokens() -> None:
    from rlspec.train.sft import sft_batch

    model = toy_model()
    pairs = sft_batch(TOKENIZER, ToyTask(), SFT, 1, frozenset())
    total, tokens = 0.0, 0
    for prompt, answer in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        total -= logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        tokens += len(answer)
    losses = train_sft(model, TOKENIZER, ToyTask(), SFT).losses
    assert losses[0] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 5])
def test_the_split_into_micro_batches_changes_rounding_only(micro: int) -> None:
    whole = train_sft(toy_model(), TOKENIZER, ToyTask(), SFTConfig(steps=4, batch_size=12)).losses
    parts = train_sft(
        toy_model(), TOKENIZER, ToyTask(), SFTConfig(steps=4, batch_size=12, micro_batch_size=micro)
    ).losses
    assert parts == pytest.approx(whole, rel=1e-5)
    settings = {"updates": 2, "turns_per_update": 20, "mini_batch_size": 10}
    whole = train_ppo(toy_model(), TOKENIZER, ToyTask(), PPOConfig(**settings)).losses
    parts = train_ppo(toy_model(), TOKENIZER, ToyTask(), PPOConfig(**settings, micro_batch_size=micro)).losses
    assert parts == pytest.approx(whole, rel=1e-3, abs=1e-5)


class Meddler(Callback):
    """Draws random numbers, changes modes and plays episodes, as trackers and evaluations do."""

    def on_start(self, state: StepState) -> None:
        self.on_step(state)

    def on_step(self, state: StepState) -> None:
        state.model.train(not state.model.training)
        random.random(), np.random.rand(), torch.rand(7)
        evaluate(state.model, state.tokenizer, ToyTask(), deals=4, turns=1)


def test_watching_changes_nothing() -> None:
    # With dropout, the losses depend on the mode and on the global generator.
    def sft(callbacks: list[Callback]) -> list[float]:
        model = toy_model(attention_dropout=0.3)
        return train_sft(model, TOKENIZER, ToyTask(), SFT, callbacks=callbacks).losses

    def ppo(callbacks: list[Callback]) -> list[float]:
        return train_ppo(toy_model(), TOKENIZER, ToyTask(), PPO, callbacks=callbacks).losses

    assert sft([]) == sft([Meddler()])
    assert ppo([]) == ppo([Meddler()])


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_train_loop import *
class Killer(Callback):
    def on_step(self, state):
        if state.step == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
stage, folder = sys.argv[2], Path(sys.argv[3])
train, config = (train_sft, SFT) if stage == "sft" else (train_ppo, PPO)
train(toy_model(attention_dropout=0.3), TOKENIZER, ToyTask(), config, callbacks=[Killer()], resume_dir=folder)
"""


@pytest.mark.parametrize(("stage", "kill_at"), [("sft", 5), ("ppo", 3)])
def test_resume_after_sigkill_gives_the_same_losses(stage: str, kill_at: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), stage, str(tmp_path), str(kill_at)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], check=False)
    assert killed.returncode == -signal.SIGKILL
    point = read_resume_point(tmp_path)
    assert point is not None and 0 < point.step < kill_at

    train, config = (train_sft, SFT) if stage == "sft" else (train_ppo, PPO)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Other weights than the run began with: those of the state must replace them.
        model = toy_model(seed=9, attention_dropout=0.3)
        resumed = train(model, TOKENIZER, ToyTask(), config, resume_dir=tmp_path)  # type: ignore[operator]
        whole_model = toy_model(attention_dropout=0.3)
        whole = train(whole_model, TOKENIZER, ToyTask(), config)  # type: ignore[operator]
    finally:
        torch.set_num_threads(threads)
    assert resumed.losses == whole.losses
    for ours, theirs in zip(model.parameters(), whole_model.parameters()):
        assert torch.equal(ours, theirs)


class Interrupt(Callback):
    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_step(self, state: StepState) -> None:
        if state.step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def sft_with(callback: Callback, folder: Path) -> TrainResult:
    return train_sft(toy_model(), TOKENIZER, ToyTask(), SFT, callbacks=[callback], resume_dir=folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_between_steps_and_the_run_resumes(number: int, tmp_path: Path) -> None:
    previous = signal.getsignal(number)
    stopped = sft_with(Interrupt(number, 4), tmp_path)
    assert stopped.stopped and stopped.steps == 4 and stopped.signal == number
    assert signal.getsignal(number) is previous
    resumed = train_sft(toy_model(seed=9), TOKENIZER, ToyTask(), SFT, resume_dir=tmp_path)
    assert resumed.losses == train_sft(toy_model(), TOKENIZER, ToyTask(), SFT).losses
    # A finished stage loads its weights and does nothing more.
    again = train_sft(toy_model(seed=9), TOKENIZER, ToyTask(), SFT, resume_dir=tmp_path)
    assert again == resumed


class EndsAt(Callback):
    """Ends the stage after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def on_step(self, state: StepState) -> None:
        self.seen = state.step

    def ends(self) -> bool:
        return self.seen == self.step


def test_a_callback_ends_the_stage_as_its_last_step_would(tmp_path: Path) -> None:
    ended = sft_with(EndsAt(3), tmp_path)
    whole = train_sft(toy_model(), TOKENIZER, ToyTask(), SFT)
    assert ended.steps == 3 and ended.losses == whole.losses[:3]
    assert not ended.stopped and ended.signal is None


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_second_signal_stops_at_once(number: int, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stop:
        sft_with(Interrupt(number, 4, times=2), tmp_path)
    assert stop.type is error


def test_a_signal_during_the_last_step_is_told(tmp_path: Path) -> None:
    result = sft_with(Interrupt(signal.SIGTERM, SFT.steps), tmp_path)
    assert result.steps == SFT.steps and not result.stopped and result.signal == signal.SIGTERM


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_a_look_at_the_step_reads_no_tensor(tmp_path: Path) -> None:
    size = 64 << 20
    big = {"model": {"weight": torch.ones(size // 4)}}
    write_resume_point(tmp_path, ResumePoint("sft", 3, 8, [1.0], 2.0, {}, big))
    del big
    before = anonymous_bytes()
    assert resume_step(tmp_path) == 3
    assert anonymous_bytes() - before < size / 4
    assert "resume.pt" not in mapped_files()
    # The measure would notice: a state that is read whole, and one that is held.
    whole = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert anonymous_bytes() - before > size / 2
    del whole
    point = read_resume_point(tmp_path)
    assert point is not None and "resume.pt" in mapped_files()


class Maps(Callback):
    """Whether the resume state was still mapped at each step."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step(self, state: StepState) -> None:
        self.seen.append("resume.pt" in mapped_files())


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_resume_state_is_let_go_before_training_goes_on(stage: str, tmp_path: Path) -> None:
    train, config = (train_sft, SFT) if stage == "sft" else (train_ppo, PPO)
    stop, maps = Interrupt(signal.SIGTERM, 3), Maps()
    train(toy_model(), TOKENIZER, ToyTask(), config, callbacks=[stop], resume_dir=tmp_path)  # type: ignore[operator]
    train(toy_model(), TOKENIZER, ToyTask(), config, callbacks=[maps], resume_dir=tmp_path)  # type: ignore[operator]
    assert maps.seen and not any(maps.seen)


def test_a_state_from_before_a_setting_goes_on_as_its_default(tmp_path: Path) -> None:
    config = SFTConfig(steps=2, batch_size=2)

    def train(config: SFTConfig) -> list[float]:
        return train_sft(toy_model(), TOKENIZER, ToyTask(), config, resume_dir=tmp_path).losses

    losses = train(config)
    point = read_resume_point(tmp_path)
    assert point is not None
    older = {name: value for name, value in point.settings.items() if name not in ("loss", "kl_coef")}
    write_resume_point(tmp_path, replace(point, settings=older))
    assert train(config) == losses
    with pytest.raises(
        RunFolderError, match="was begun with loss = 'cross_entropy', cannot continue with 'dft'"
    ):
        train(replace(config, loss="dft"))


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    train_sft(toy_model(), TOKENIZER, ToyTask(), SFT, resume_dir=tmp_path)
    other = SFTConfig(steps=8, batch_size=12, learning_rate=2e-2)
    with pytest.raises(RunFolderError, match="learning_rate"):
        train_sft(toy_model(), TOKENIZER, ToyTask(), other, resume_dir=tmp_path)
    with pytest.raises(RunFolderError, match="sft"):
        train_ppo(toy_model(), TOKENIZER, ToyTask(), PPO, resume_dir=tmp_path)
    path = tmp_path / "resume.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"resume\.pt"):
        train_sft(toy_model(), TOKENIZER, ToyTask(), SFT, resume_dir=tmp_path)


def test_checkpoints_are_hugging_face_folders(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "sft-3"
    for seed in (0, 1):
        model = toy_model(seed)
        save_checkpoint(model, TOKENIZER, folder, overwrite=seed == 1)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    messages = [{"role": "user", "content": "1 2"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s> 1 2 >"
    assert [path.name for path in folder.parent.iterdir()] == ["sft-3"]


def test_a_checkpoint_replaces_nothing_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(toy_model(), TOKENIZER, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_checkpoint_that_fails_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(toy_model(0), TOKENIZER, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(content: Path) -> None:
        assert (content / "config.json").is_file()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(toy_model(1), TOKENIZER, folder, overwrite=True, on_complete=fail)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_checkpoint_interrupted_between_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system cannot swap two names, the old one is put back by whoever writes next."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(toy_model(0), TOKENIZER, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(_C, "exchange", lambda a, b: False)
    rename = os.rename

    def dying(source: Path, target: Path) -> None:
        if Path(target) == folder:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(toy_model(1), TOKENIZER, folder, overwrite=True)
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(toy_model(1), TOKENIZER, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_checkpoint(toy_model(1), TOKENIZER, folder, overwrite=True)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_checkpoint_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(toy_model(0), TOKENIZER, folder)
    save_checkpoint(toy_model(1), TOKENIZER, folder, overwrite=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"also holds thesis\.txt"):
        save_checkpoint(toy_model(0), TOKENIZER, folder, overwrite=True)
    (folder / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        save_checkpoint(toy_model(0), TOKENIZER, notes, overwrite=True)
    assert (notes / "thesis.txt").read_text() == "years of work"


def test_learning_rates() -> None:
    rates = [learning_rate_at(step, 100, peak=2.0, warmup_ratio=0.1, floor=0.2) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.1)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.2 < rates[-1] < 0.21
    assert learning_rate_at(7, 10, peak=1.0, schedule="constant") == 1.0


def test_excluded_problems_are_never_trained_on() -> None:
    class Two(ToyTask):
        def sample(self, rng: random.Random, shift: str = "none"):  # type: ignore[no-untyped-def]
            from train_toys import ToyProblem

            return ToyProblem((rng.randrange(2), 0))

        def sft_example(self, problem, rng):  # type: ignore[no-untyped-def]
            assert problem.key == (1, 0)
            return super().sft_example(problem, rng)

    config = SFTConfig(steps=2, batch_size=8)
    train_sft(toy_model(), TOKENIZER, Two(), config, exclude=frozenset({(0, 0)}))
    with pytest.raises(OptionError, match="none to train on"):
        train_sft(toy_model(), TOKENIZER, Two(), config, exclude=frozenset({(0, 0), (1, 0)}))
