"""The stages of `rlspec track` by TRL's trainers, on the same problems and with the same rewards as by our own.

``run_track(config, stages=trl_stages(config))``. SFT sees the batches of :func:`rlspec.train.train_sft` in their order,
with its optimizer and learning rates, so that the losses are the same up to rounding: each loop is a check of the other.
RL is GRPO on single answers, judged by the task's verifier. :class:`SpectralCallback` follows the spectra, as in any
training with TRL; its rows lie in the run's ``resume/<segment>`` with TRL's own log, trainer_state.json.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from rlspec.errors import CheckpointError, MissingPackageError
from rlspec.integrations.transformers import SpectralCallback
from rlspec.models import EMBEDDED, embedded_model_path
from rlspec.run.config import TrackConfig
from rlspec.tasks import Task, training_problem
from rlspec.train import Callback, PPOConfig, SFTConfig, StepState, TrainResult
from rlspec.train.batch import autocast
from rlspec.train.callbacks import notify
from rlspec.train.encode import decode_answer
from rlspec.train.loop import StopRequest, stoppable
from rlspec.train.optimizer import make_adamw
from rlspec.train.schedule import learning_rate_at
from rlspec.train.sft import sft_batch
from rlspec.train.template import has_template

try:
    import datasets
    import trl
except ModuleNotFoundError as error:
    if error.name not in ("trl", "datasets"):
        raise
    raise MissingPackageError("training with trainer='trl'", "trl") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the bars of data sets, which come between ours, and what TRL and transformers tell each other."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def trl_stages(config: TrackConfig) -> Mapping[str, Callable[..., TrainResult]]:
    """What trains each stage of the run of ``config``: functions with the arguments of ``train_sft`` and ``train_ppo``.

    A stage that is stopped is not resumed in its middle: its ``resume_dir`` is where TRL's files go.
    """
    base = embedded_model_path() if config.model == EMBEDDED else Path(config.model)

    def spectral(every: int, out: Path) -> SpectralCallback:
        return SpectralCallback(every, base=base, modules=config.modules, rank=config.rank, out=out)

    def sft(*args: Any, resume_dir: Path, **options: Any) -> TrainResult:
        return train_sft(*args, spectral=spectral(config.every, resume_dir), out=resume_dir, **options)

    def ppo(*args: Any, resume_dir: Path, **options: Any) -> TrainResult:
        every = config.ppo_every * steps_per_update(config.ppo)
        return train_grpo(*args, spectral=spectral(every, resume_dir), out=resume_dir, **options)

    return {"sft": sft, "ppo": ppo}


@_quiet()
def train_sft(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: SFTConfig,
    *,
    out: Path,
    exclude: frozenset[Any] = frozenset(),
    callbacks: Sequence[Callback] = (),
    spectral: SpectralCallback | None = None,
) -> TrainResult:
    """:func:`rlspec.train.train_sft` by TRL's ``SFTTrainer``.

    Args:
        out: folder for TRL's files.
        spectral: measures inside the trainer.
    """
    steps = range(1, config.steps + 1)
    pairs = [pair for step in steps for pair in sft_batch(tokenizer, task, config, step, exclude)]
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in pairs],
            "completion_mask": [[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs],
        }
    )
    share = [learning_rate_at(step, config.steps, peak=1.0, **_schedule(config)) for step in steps]
    settings = _shared(model, config, config.batch_size, out)
    arguments = trl.SFTConfig(
        **settings, max_steps=config.steps, logging_steps=1, max_length=None, completion_only_loss=True
    )
    trainer = _InOrder(
        model,
        _one_device(arguments),
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=_optimizer(model, config, share, 1),
    )
    return _train(trainer, "sft", config.steps, 1, tokenizer, callbacks, spectral)


@_quiet()
def train_grpo(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: PPOConfig,
    *,
    out: Path,
    exclude: frozenset[Any] = frozenset(),
    callbacks: Sequence[Callback] = (),
    spectral: SpectralCallback | None = None,
    reference: None = None,
) -> TrainResult:
    """GRPO (Shao et al. 2024, arXiv 2402.03300) by TRL's ``GRPOTrainer``, ``config.updates`` batches of answers.

    The problems are those of :func:`rlspec.train.train_ppo`, in its order, as far as single answers need them.

    Args:
        out: folder for TRL's files.
        spectral: measures inside the trainer.
        reference: none; TRL loads its own from the model's folder where ``kl_coef`` asks for one.

    Raises:
        CheckpointError: the tokenizer has no chat template, which TRL writes the prompts with.
    """
    if not has_template(tokenizer):
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, which trainer='trl' needs for its prompts"
        )
    problems: list[Any] = []
    for step in range(1, config.updates + 1):
        rng = random.Random(f"{config.seed}/ppo/{step}")
        count = config.turns_per_update // config.group_size
        problems += [training_problem(task, rng, exclude) for _ in range(count)]
    data = datasets.Dataset.from_dict(
        {"prompt": [task.prompt(problem) for problem in problems], "problem": list(range(len(problems)))}
    )
    mini, each = mini_batch(config), steps_per_update(config)
    share = [
        learning_rate_at(step, config.updates, peak=1.0, floor=config.final_learning_rate_ratio)
        for step in range(1, config.updates + 1)
    ]
    arguments = trl.GRPOConfig(
        **_shared(model, config, mini, out),
        max_steps=each * config.updates,
        logging_steps=each,
        num_generations=config.group_size,
        generation_batch_size=config.turns_per_update,
        num_iterations=config.epochs,
        max_completion_length=task.max_answer_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        epsilon=config.clip,
        beta=config.kl_coef,
        loss_type="grpo",
        shuffle_dataset=False,
    )
    trainer = trl.GRPOTrainer(
        model,
        verdicts(task, tokenizer, problems),
        _one_device(arguments),
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=_optimizer(model, config, share, each),
    )
    return _train(trainer, "ppo", config.updates, each, tokenizer, callbacks, spectral)


def verdicts(task: Task, tokenizer: Any, problems: Sequence[Any]) -> Callable[..., list[float | None]]:
    """A reward function for TRL: the verifier's reward of each answer, of the number of its problem in ``problems``."""

    def reward(completion_ids: list[list[int]], problem: list[int], **_: Any) -> list[float | None]:
        found: list[float | None] = []
        for ids, number in zip(completion_ids, problem):
            verdict = task.verify(problems[number], decode_answer(tokenizer, ids))
            # An episode of one turn: it ends with it.
            found.append(verdict.reward + (0.0 if verdict.solved else task.turn_limit_reward))
        return found

    return reward


def mini_batch(config: PPOConfig) -> int:
    """Answers of one optimizer step."""
    return min(config.mini_batch_size, config.turns_per_update)


def steps_per_update(config: PPOConfig) -> int:
    """Optimizer steps on the answers of one update."""
    return config.epochs * math.ceil(config.turns_per_update / mini_batch(config))


# What recomputing activations is called, which TRL does unless told not to.
_CHECKPOINTING = next(
    field.name
    for field in dataclasses.fields(trl.SFTConfig)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


class _InOrder(trl.SFTTrainer):
    """Takes the examples in the order of the data: the batches are drawn already."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        data: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(data)


class _Events(TrainerCallback):
    """Tells our callbacks what TRL's trainer does, each ``every`` optimizer steps, and stops it when asked to."""

    def __init__(
        self,
        stage: str,
        total: int,
        every: int,
        tokenizer: Any,
        callbacks: Sequence[Callback],
        stop: StopRequest,
        spectral: SpectralCallback | None,
    ) -> None:
        self.stage, self.total, self.every = stage, total, every
        self.tokenizer, self.callbacks, self.stop, self.spectral = tokenizer, callbacks, stop, spectral
        self.losses: list[float] = []
        self.ended = False  # by a callback
        self.seconds = 0.0  # of training, without the callbacks
        self._since = self._spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(0, {}, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not between the steps of an update, which are told together.
        if self.stop.signal is not None and state.global_step % self.every == 0:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:  # spectra, or the trainer's last words
            return
        self.losses.append(logs["loss"])
        names = {
            "loss": "loss",
            "grad_norm": "grad_norm",
            "learning_rate": "learning_rate",
            "reward": "mean_reward",
        }
        shown = {ours: float(logs[theirs]) for theirs, ours in names.items() if theirs in logs}
        self._tell(state.global_step // self.every, shown, kwargs["model"])
        self.ended = any(callback.ends() for callback in self.callbacks)
        if self.ended:
            control.should_training_stop = True

    def _tell(self, step: int, logs: dict[str, float], model: Any) -> None:
        spent = 0.0 if self.spectral is None else self.spectral.pace.spent
        if step:
            self.seconds += time.perf_counter() - self._since - (spent - self._spent)
        state = StepState(self.stage, step, self.total, model, self.tokenizer, logs, self.seconds)
        notify(self.callbacks, state)
        self._since, self._spent = time.perf_counter(), spent


def _train(
    trainer: Trainer,
    stage: str,
    total: int,
    every: int,
    tokenizer: Any,
    callbacks: Sequence[Callback],
    spectral: SpectralCallback | None,
) -> TrainResult:
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if spectral is not None:
        trainer.add_callback(spectral)
    with stoppable() as stop:
        events = _Events(stage, total, every, tokenizer, callbacks, stop, spectral)
        trainer.add_callback(events)
        trainer.train()
    trainer.save_state()
    done = len(events.losses)
    stopped = done < total and not events.ended
    return TrainResult(events.losses, done, events.seconds, stopped=stopped, signal=stop.signal)


def _shared(model: Any, config: SFTConfig | PPOConfig, batch_size: int, out: Path) -> dict[str, Any]:
    """Arguments of both trainers: ``batch_size`` rows a step, in passes that fit the micro-batch."""
    device = next(model.parameters()).device
    most = min(config.micro_batch_size, batch_size)
    rows = next(rows for rows in range(most, 0, -1) if batch_size % rows == 0)
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch_size // rows,
        "max_grad_norm": config.max_grad_norm,
        "bf16": autocast(device, config.dtype)._enabled,
        "use_cpu": device.type == "cpu",
        "seed": config.seed,
        _CHECKPOINTING: False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _one_device(arguments: Any) -> Any:
    """The arguments without a copy of the model on every GPU that is seen, which would multiply the batch."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _optimizer(
    model: Any, config: SFTConfig | PPOConfig, shares: Sequence[float], each: int
) -> tuple[Any, Any]:
    """Our optimizer, at our learning rates: the share of the peak of each ``each`` steps."""
    optimizer = make_adamw([(model, config.learning_rate)], config.weight_decay)

    def share(step: int) -> float:
        return shares[min(step // each, len(shares) - 1)]  # one is asked for after the last step

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _schedule(config: SFTConfig) -> dict[str, Any]:
    return {"warmup_ratio": config.warmup_ratio, "schedule": config.schedule}
