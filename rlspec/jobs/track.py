"""The main job: train segment by segment, measure at each event, and leave a run folder that tells the story."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from rlspec.backend import choose_device
from rlspec.errors import OptionError, RunFolderError
from rlspec.io.jsonl import Row
from rlspec.io.projections import parse_modules
from rlspec.jobs.loading import (
    check_checkpoint,
    conversation_needs,
    evaluation_keys,
    load_model,
    load_tokenizer,
    model_folder,
)
from rlspec.jobs.restoring import Restoration, restore_stage
from rlspec.report.data import read_run
from rlspec.report.html import write_report
from rlspec.report.verdict import verdict
from rlspec.run.alarm import segments_left
from rlspec.run.budget import Pace, parse_budget
from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.run.progress import Progress
from rlspec.run.recorder import Clock, EventRecorder
from rlspec.run.segments import Event, Segment, event_of, segment_of, weights_digest
from rlspec.run.settings import refuse_other_settings, stored_settings
from rlspec.run.summary import summarize, summary_lines
from rlspec.run.tensorboard import MISSING, TensorBoardLog, installed
from rlspec.signals import interrupt
from rlspec.spectra import Rank, SpectralBasis, SpectralTracker
from rlspec.tasks import Task, check_shift, get_task
from rlspec.train import TrainResult, train_ppo, train_sft
from rlspec.train.kl import KLProbe
from rlspec.train.state import remove_resume_point, resume_step


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the run in ``folder`` is saved and can be continued. Its cause tells which it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(f"the run in {folder} was interrupted")


@dataclass
class _Inputs:
    """What a run reads, all checked."""

    folder: Path
    device: torch.device
    model: Any
    tokenizer: Any
    task: Task
    exclude: frozenset[Any]
    stages: Mapping[str, Stage]


#: What does a stage, with the arguments and the result of ``train_sft`` or ``train_ppo``.
Stage = Callable[..., TrainResult]


def run_track(
    config: TrackConfig,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    stages: Mapping[str, Stage] | None = None,
) -> Path:
    """Run the segments of ``config`` and track the model's spectra; returns the run folder.

    Args:
        config: every setting of the run.
        out: the run folder; ``runs/track-<date-time>`` by default. It must not exist unless ``resume``.
        resume: continue the run in ``out``, whose settings must be ``config``. Weights, losses and rows
            become those of a run that was never interrupted.
        stages: who trains each stage, where ``config.trainer`` is not rlspec itself; for trainer='trl' that is
            ``rlspec.integrations.trl.trl_stages(config)``.

    Raises:
        RlspecError: bad input of any kind, before anything is written.
        Interrupted: Ctrl-C or SIGTERM, once the state is saved.
    """
    if (stages is None) != (config.trainer == "rlspec"):
        wanted = (
            "needs no stages="
            if stages
            else f"needs stages=rlspec.integrations.{config.trainer}.trl_stages(config)"
        )
        raise OptionError(f"trainer={config.trainer!r} {wanted}")
    clock = Clock()
    path = Path(out) if out is not None else Path("runs") / time.strftime("track-%Y%m%d-%H%M%S")
    if resume:
        refuse_other_settings(stored_settings(RunFolder(path)), config, RunFolder(path))
    else:
        RunFolder(path).refuse_existing()
    progress = Progress()
    trained = stages or {"sft": train_sft, "ppo": train_ppo}
    inputs = _read_inputs(config, {**trained, "restore": restore_stage})
    folder = RunFolder.open(path) if resume else RunFolder.create(path, config.to_settings())
    try:
        _run(config, folder, inputs, clock, progress)
    except KeyboardInterrupt as stop:
        raise Interrupted(path) from stop
    finally:
        progress.stop()
        folder.close()
    return path


def _read_inputs(config: TrackConfig, stages: Mapping[str, Stage]) -> _Inputs:
    """Load and check everything the run reads, cheap checks first."""
    folder = model_folder(config.model)
    device = choose_device(config.device)
    Rank.parse(config.rank)
    check_checkpoint(folder, parse_modules(config.modules), per_head=config.per_head)
    if config.runs("restore"):
        Rank.parse(config.restore_rank)
        check_checkpoint(folder, parse_modules(config.restore_modules))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(folder)
    task = get_task(config.task, tokenizer=tokenizer, turns=config.turns)
    for shift in config.shifts:
        check_shift(task, shift)
    exclude = evaluation_keys(task, config.shifts, config.deals, config.seed)
    needs = conversation_needs(tokenizer, task, config.shifts, config.deals, config.seed)
    model = load_model(folder, device)
    needs.check(model, folder, tokenizer, examples=config.runs("sft"))
    return _Inputs(folder, device, model, tokenizer, task, exclude, stages)


def _run(config: TrackConfig, folder: RunFolder, inputs: _Inputs, clock: Clock, progress: Progress) -> None:
    complete = {event_of(row) for row in folder.metrics()}
    segments = segments_left(config, folder.metrics(), folder.evals())
    # The last event of a segment is complete, and with it the last checkpoint.
    finished = [segment for segment in segments if segment.end in complete]
    unfinished = [segment for segment in segments if segment not in finished]
    for segment in unfinished:
        if segment.parent and segment.parent[0] in [whole.id for whole in finished]:
            _check_parent(folder, segment)
    interrupted = _interrupted_segment(folder, unfinished)
    folder.rewind([*(segment.end for segment in finished), *interrupted], _paths_to_write(config, folder))
    for segment in finished:
        # The last checkpoint holds its weights; the optimizer's state is of no more use.
        remove_resume_point(folder.resume_dir(segment.id))
    metrics = folder.metrics()
    if metrics:
        clock.restore(metrics[-1])
    if unfinished:
        _run_segments(config, folder, inputs, clock, progress, unfinished)
    progress.stop()
    summary = summarize(config, folder)
    folder.write_summary(summary)
    for line in summary_lines(summary, folder.path):
        click.echo(line)
    click.echo("")
    click.echo(textwrap.fill(verdict(read_run(folder.path)), width=110))
    click.echo("")
    click.echo(f"report  {write_report(folder.path)}")


def _interrupted_segment(folder: RunFolder, unfinished: Sequence[Segment]) -> list[Event]:
    """What the trainer's resume state stands at, if a segment was begun and not finished."""
    for segment in unfinished:
        step = resume_step(folder.resume_dir(segment.id))
        if step is not None:
            return [(segment.id, step)]
    return []


def _check_parent(folder: RunFolder, segment: Segment) -> None:
    """Refuse to start a branch from other weights than those that its parent's event measured.

    Raises:
        RunFolderError: The checkpoint is missing, or holds others.
    """
    assert segment.parent is not None
    (parent,) = (row for row in folder.metrics() if event_of(row) == segment.parent)
    checkpoint = folder.checkpoint_dir(*segment.parent)
    found = ""
    if not checkpoint.is_dir():
        found = "it is missing"
    elif parent.get("weights") not in (None, weights_digest(checkpoint)):
        found = "its weights are not those that this run wrote"
    if found:
        raise RunFolderError(
            f"{checkpoint}: {found}; {segment.id} starts from them: put them back to continue"
        )


def _paths_to_write(config: TrackConfig, folder: RunFolder) -> Iterator[Path]:
    """Array file and checkpoint of every event."""
    for segment in config.segments:
        for step in range(segment.steps + 1):
            if config.is_event(segment.stage, step):
                yield folder.arrays_path(segment.id, step)
                if config.stop or config.keeps_checkpoint(segment.stage, step):
                    yield folder.checkpoint_dir(segment.id, step)


def _basis(config: TrackConfig, inputs: _Inputs, progress: Progress) -> SpectralBasis:
    def report(done: int, total: int) -> None:
        if done == 1:
            progress.start("reference", 0, total)
        progress.step(done)

    try:
        return SpectralBasis.from_model(
            inputs.model,
            modules=config.modules,
            rank=config.rank,
            per_head=config.per_head,
            progress=report,
        )
    finally:
        progress.stop()


def _run_segments(
    config: TrackConfig,
    folder: RunFolder,
    inputs: _Inputs,
    clock: Clock,
    progress: Progress,
    segments: Sequence[Segment],
) -> None:
    """Run ``segments``, of which the first may have been begun."""
    ppo = config.ppo
    pace = Pace(parse_budget(config.track_budget, "track_budget"), clock.wall)
    metrics = folder.metrics()
    last = metrics[-1].get("seconds_last_measurement") if metrics else None
    pace.begin(elapsed=clock.wall(), spent=clock.seconds["tracking"], last=last or 0.0)
    # The reference of every measurement is the model that the run started from, in a continued run as well.
    with clock.timed("tracking"), pace.spending(once=True):
        basis = _basis(config, inputs, progress)
        # On a device every byte is the training's, which has allocated next to nothing of its own by now.
        tracker = SpectralTracker(basis, engine=config.engine, factors="host")
    if basis.note:
        progress.say(f"{basis.note}; the other layers are not tracked")
    with clock.timed("kl"):
        probe = KLProbe(inputs.model, inputs.tokenizer, inputs.task, seed=config.seed)
    if not installed():
        progress.say(MISSING)
    tensorboard = TensorBoardLog(folder.tensorboard_dir, metrics, folder.spectra(), folder.manifest)
    recorder = EventRecorder(
        config,
        folder,
        inputs.task,
        tracker,
        probe,
        clock,
        pace,
        tensorboard,
        progress,
        ppo.epochs * math.ceil(ppo.turns_per_update / ppo.mini_batch_size),
    )
    try:
        for segment in segments:
            left = {each.id: each for each in segments_left(config, folder.metrics(), folder.evals())}
            if segment.parent is not None:
                parent, step = segment.parent
                if segment.id not in left:
                    ended = f"{parent} ended at step {left[parent].steps}, before step {step}"
                    progress.say(f"{segment.id} is not run: {ended}")
                    continue
                _check_parent(folder, segment)
                inputs.model = None  # two models in memory would be one too many
                inputs.model = load_model(folder.checkpoint_dir(*segment.parent), inputs.device)
            recorder.begin(segment, seconds_training=_seconds_before(folder.metrics(), segment))
            progress.start(segment.id, resume_step(folder.resume_dir(segment.id)) or 0, segment.steps)
            result = _train(segment, config, inputs, recorder, folder)
            if result.signal is not None:
                raise interrupt(result.signal)
            remove_resume_point(folder.resume_dir(segment.id))
    finally:
        tensorboard.close()


def _seconds_before(metrics: Sequence[Row], segment: Segment) -> float:
    """Spent training on the segments before this one; the trainer knows what it has spent on this one."""
    others = [row["seconds_training"] for row in metrics if segment_of(row) != segment.id]
    return others[-1] if others else 0.0


def _train(
    segment: Segment,
    config: TrackConfig,
    inputs: _Inputs,
    recorder: EventRecorder,
    folder: RunFolder,
) -> TrainResult:
    shared: dict[str, Any] = {
        "exclude": inputs.exclude,
        "callbacks": [recorder],
        "resume_dir": folder.resume_dir(segment.id),
    }
    train = inputs.stages[segment.stage]
    if segment.stage == "restore":
        restoration = Restoration(inputs.folder, config.restore_modules, config.restore_rank)
        return train(inputs.model, inputs.tokenizer, inputs.task, restoration, **shared)
    settings = config.sft if segment.stage == "sft" else config.ppo
    if config.trainer == "rlspec" and settings.kl_coef > 0:
        shared["reference"] = _reference(segment, inputs, folder)
    return train(inputs.model, inputs.tokenizer, inputs.task, settings, **shared)


def _reference(segment: Segment, inputs: _Inputs, folder: RunFolder) -> Any:
    """The model that the segment starts from, to be held near it; also in a segment that goes on."""
    start = inputs.folder if segment.parent is None else folder.checkpoint_dir(*segment.parent)
    return load_model(start, inputs.device).eval()
