"""`rlspec track --trainer trl`: TRL's SFT is ours up to rounding, its GRPO has our rewards, its runs are like ours."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from track_toys import arguments, assert_same_run, invoke, stop_at
from train_toys import ToyProblem, ToyTask, toy_model, toy_tokenizer

from rlspec.errors import CheckpointError, OptionError
from rlspec.io.jsonl import read_rows
from rlspec.jobs import run_track
from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.run.segments import event_of
from rlspec.tasks import Verdict, get_task, training_problem
from rlspec.train import Callback, PPOConfig, SFTConfig, StepState, train_sft
from rlspec.train.encode import encode_answer, encode_prompt

pytest.importorskip("trl", reason="trl is not installed")
stages = import_module("rlspec.integrations.trl")
pytestmark = pytest.mark.usefixtures("cache")

TOKENIZER = toy_tokenizer()
SFT = SFTConfig(steps=12, batch_size=12, learning_rate=1e-2, dtype="float32", weight_decay=0.1)
GRPO = PPOConfig(
    updates=3,
    turns_per_update=12,
    mini_batch_size=6,
    group_size=4,
    epochs=2,
    learning_rate=1e-2,
    dtype="float32",
)


class Steps(Callback):
    """What a stage told of each step."""

    def __init__(self) -> None:
        self.states: list[StepState] = []

    def on_start(self, state: StepState) -> None:
        self.states.append(state)

    on_step = on_start

    def logged(self, name: str) -> torch.Tensor:
        return torch.tensor([state.logs[name] for state in self.states[1:]])


def differences(config: SFTConfig, theirs: SFTConfig, tmp_path: Path) -> dict[str, float]:
    """The largest relative difference between what our loop and TRL's log of a step."""
    ours, others = Steps(), Steps()
    train_sft(toy_model(), TOKENIZER, ToyTask(), config, callbacks=[ours])
    result = stages.train_sft(toy_model(), TOKENIZER, ToyTask(), theirs, callbacks=[others], out=tmp_path)
    assert [state.step for state in others.states] == list(range(config.steps + 1))
    assert result.losses == others.logged("loss").tolist() and not result.stopped
    found = {
        name: (ours.logged(name), others.logged(name)) for name in ("loss", "grad_norm", "learning_rate")
    }
    return {name: ((a - b).abs() / a.abs()).max().item() for name, (a, b) in found.items()}


@pytest.mark.parametrize("micro", [12, 5])
def test_the_losses_of_sft_are_those_of_our_loop(micro: int, tmp_path: Path) -> None:
    """Two loops, two ways of padding, and micro-batches of other sizes: on the same batches they differ by rounding."""
    config = SFTConfig(**{**vars(SFT), "micro_batch_size": micro})
    found = differences(config, config, tmp_path)
    assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-4 and found["learning_rate"] < 1e-6


def test_a_callback_ends_the_stage_after_its_step(tmp_path: Path) -> None:
    class EndsAtTwo(Steps):
        def ends(self) -> bool:
            return self.states[-1].step == 2

    steps = EndsAtTwo()
    result = stages.train_sft(toy_model(), TOKENIZER, ToyTask(), SFT, callbacks=[steps], out=tmp_path)
    assert [state.step for state in steps.states] == [0, 1, 2]
    assert result.steps == 2 and not result.stopped and result.signal is None


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"schedule": "constant"},
        {"warmup_ratio": 0.2},
        {"weight_decay": 0.0},
        {"max_grad_norm": 100.0},
    ],
)
def test_the_comparison_would_notice_a_setting_that_does_not_arrive(
    change: dict[str, Any], tmp_path: Path
) -> None:
    assert differences(SFT, SFTConfig(**{**vars(SFT), **change}), tmp_path)["loss"] > 1e-3


class Watched(ToyTask):
    """Keeps what was judged."""

    def __init__(self) -> None:
        self.judged: list[tuple[ToyProblem, str]] = []

    def verify(self, problem: ToyProblem, answer: str) -> Verdict:
        self.judged.append((problem, answer))
        return super().verify(problem, answer)


def test_grpo_plays_our_problems_a_group_each_and_learns_from_their_rewards(tmp_path: Path) -> None:
    task, steps = Watched(), Steps()
    model = toy_model()
    before = model.lm_head.weight.detach().clone()
    result = stages.train_grpo(model, TOKENIZER, task, GRPO, callbacks=[steps], out=tmp_path)
    assert [state.step for state in steps.states] == [0, 1, 2, 3] and result.steps == 3
    wanted = []
    for step in (1, 2, 3):
        rng = random.Random(f"0/ppo/{step}")
        wanted += [problem for _ in range(3) for problem in [training_problem(task, rng)] * 4]
    assert [problem for problem, _ in task.judged] == wanted
    rewards = torch.tensor([1.0 if answer.startswith("yes") else -1.5 for _, answer in task.judged])
    assert torch.allclose(steps.logged("mean_reward"), rewards.view(3, 12).mean(1))
    assert not torch.equal(model.lm_head.weight, before)


def test_rewards_are_the_verifier_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlspec.jobs.loading import load_tokenizer, model_folder

    tokenizer = load_tokenizer(model_folder("embedded"))
    task = get_task("general_points", tokenizer=tokenizer, turns=5)
    rng = random.Random(0)
    problems = [task.sample(rng) for _ in range(8)]
    reward = stages.verdicts(task, tokenizer, problems)
    right = [encode_answer(tokenizer, task.answer(problem)) for problem in problems]
    rewards = reward(completion_ids=right, problem=list(range(8)), trainer_state=None)
    assert rewards == [task.verify(problem, task.answer(problem)).reward for problem in problems]
    assert all(task.verify(problem, task.answer(problem)).solved for problem in problems)
    # Another problem's answer, and none: not solved, which ends the episode.
    wrong = [*right[1:], []]
    answers = [*(task.answer(problem) for problem in problems[1:]), ""]
    verdicts = [task.verify(problem, answer) for problem, answer in zip(problems, answers)]
    assert not all(verdict.solved for verdict in verdicts)
    expected = [v.reward + (0 if v.solved else task.turn_limit_reward) for v in verdicts]
    assert reward(completion_ids=wrong, problem=list(range(8))) == expected
    # TRL writes the prompts with the same tokens as we do.
    prompts = [task.prompt(problem) for problem in problems]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == [encode_prompt(tokenizer, prompt) for prompt in prompts]


def test_grpo_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template, which trainer='trl' needs"):
        stages.train_grpo(toy_model(), tokenizer, ToyTask(), GRPO, out=tmp_path)


RUN = {"trainer": "trl", "ppo_updates": 2, "ppo_every": 1, "group_size": 4}


@pytest.fixture(scope="module")
def tracked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Result]:
    out = tmp_path_factory.mktemp("runs") / "trl"
    result = invoke(*arguments(model, out, **RUN))
    assert result.exit_code == 0, result.output
    return RunFolder(out), result


def test_a_run_is_like_one_of_ours(
    tracked: tuple[RunFolder, Result], finished: tuple[RunFolder, Result]
) -> None:
    (folder, result), (ours, _) = tracked, finished
    events = [("sft", step) for step in (0, 5, 10, 15, 20, 22)] + [("ppo", step) for step in (0, 1, 2)]
    assert [event_of(row) for row in folder.metrics()] == events
    assert [event_of(row) for row in folder.spectra()] == [event for event in events for _ in range(6)]
    assert [(*event_of(row), row["shift"]) for row in folder.evals()] == [
        (*event, shift) for event in events for shift in ("none", "both")
    ]
    assert [row["global_step"] for row in folder.metrics()] == [0, 5, 10, 15, 20, 22, 22, 26, 30]
    for column in ("loss", "kl_base_nats_per_token", "seconds_training"):
        assert all(column in row for row in folder.metrics()[1:6])
    # The first stage is our own, up to rounding: losses, weights, and what is measured of them.
    for found, wanted in zip(folder.metrics()[1:6], ours.metrics()[1:6]):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["kl_base_nats_per_token"] == pytest.approx(wanted["kl_base_nats_per_token"], rel=1e-3)
    for found, wanted in zip(folder.spectra()[6:36], ours.spectra()[6:36]):
        assert (found["name"], found["step"]) == (wanted["name"], wanted["step"])
        assert found["delta_frobenius"] == pytest.approx(wanted["delta_frobenius"], rel=1e-2)
    assert invoke("report", str(folder.path)).exit_code == 0
    assert "examples/s" not in result.output


def test_the_callback_inside_trl_measures_what_the_run_does(tracked: tuple[RunFolder, Result]) -> None:
    folder, _ = tracked
    for segment, steps_each in (("sft", 1), ("ppo", 4)):
        inside = read_rows(folder.resume_dir(segment) / "spectra.jsonl")
        rows = [row for row in folder.spectra() if row["segment"] == segment]
        assert [row["step"] for row in inside] == [row["step"] * steps_each for row in rows]
        for found, wanted in zip(inside, rows):
            assert found["name"] == wanted["name"]
            assert found["angle_left_mean_rad"] == pytest.approx(wanted["angle_left_mean_rad"], rel=1e-6)
            assert found["delta_frobenius"] == wanted["delta_frobenius"]
        assert (folder.resume_dir(segment) / "trainer_state.json").exists()


def test_a_run_that_was_stopped_trains_the_stage_anew(
    tracked: tuple[RunFolder, Result], model: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    stop_at(arguments(model, folder.path, **RUN), "sft", 5)
    assert event_of(folder.metrics()[-1]) == ("sft", 5)
    again = ["track", "--resume", "--out", str(folder.path)]
    stop_at(again, "ppo", 1)
    assert invoke(*again).exit_code == 0
    assert_same_run(folder, tracked[0])


def test_settings_are_those_that_trl_has() -> None:
    config = TrackConfig(trainer="trl")
    assert (config.ppo.advantage, config.ppo.level, config.ppo.updates) == ("grpo", "token", 5)
    for settings, message in (
        ({"advantages": "gae"}, "advantages='gae': trainer='trl' has 'grpo' alone"),
        ({"device": "cuda:1"}, "device='cuda:1': trainer='trl' takes the first GPU"),
        ({"ppo_level": "turn"}, "ppo_level='turn': trainer='trl' has 'token' alone"),
        (
            {"turns_per_update": 100},
            "turns_per_update=100 must be a multiple of group_size=8 with trainer='trl'",
        ),
        (
            {"turns_per_update": 4},
            "turns_per_update=4 must be a multiple of group_size=8 with trainer='trl'",
        ),
        ({"ppo_mini_batch_size": 60}, "turns_per_update=256 must be a multiple of ppo_mini_batch_size=60"),
    ):
        with pytest.raises(OptionError) as error:
            TrackConfig.from_settings({"trainer": "trl", **settings})
        assert str(error.value).startswith(message)


def test_who_trains_is_said_twice_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="trainer='trl' needs stages="):
        run_track(TrackConfig(trainer="trl"), tmp_path / "run")
    with pytest.raises(OptionError, match="trainer='rlspec' needs no stages="):
        run_track(TrackConfig(), tmp_path / "run", stages=stages.trl_stages(TrackConfig(trainer="trl")))
    assert not list(tmp_path.iterdir())


def test_on_many_gpus_the_batch_stays_one(tmp_path: Path) -> None:
    """Trainer would put a copy of the model on each, and take as many batches a step."""
    arguments = stages.trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        **{stages._CHECKPOINTING: False},
    )
    arguments._n_gpu = 3
    assert arguments.train_batch_size == 12
    assert stages._one_device(arguments).train_batch_size == 4
