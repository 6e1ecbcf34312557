"""What happens at each event: spectra, evaluations and KL are measured and become the run folder's rows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from rlspec.io.files import replacing
from rlspec.io.jsonl import Row
from rlspec.run.alarm import first_fall
from rlspec.run.budget import Pace
from rlspec.run.config import TrackConfig
from rlspec.run.evaluation import eval_row, metrics_columns
from rlspec.run.folder import RunFolder
from rlspec.run.progress import Progress
from rlspec.run.rows import mean, rotation
from rlspec.run.segments import Event, Segment, event_of, segment_of, weights_digest
from rlspec.run.tensorboard import TensorBoardLog
from rlspec.spectra import SpectralRecord, SpectralTracker
from rlspec.tasks import Task
from rlspec.tasks.alarm import Fall, describe_fall
from rlspec.train import Callback, StepState, evaluate, save_checkpoint
from rlspec.train.kl import KLProbe

#: Random updates per matrix that the rotation at the end of a stage is compared with.
NULL_DRAWS = 8


@dataclass
class Clock:
    """Cumulative seconds by kind of work, and wall time, over all attempts of a run (see :meth:`restore`).

    ``now`` tells seconds from any moment on.
    """

    now: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(
        default_factory=lambda: {"tracking": 0.0, "evaluating": 0.0, "kl": 0.0, "saving": 0.0}
    )
    wall_before: float = 0.0

    def __post_init__(self) -> None:
        self.began = self.now()

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[kind] += self.now() - began

    def wall(self) -> float:
        return self.wall_before + self.now() - self.began

    def columns(self) -> Row:
        """The `seconds_*` columns of a metrics row, training excepted."""
        return {
            **{f"seconds_{kind}": value for kind, value in self.seconds.items()},
            "seconds_wall": self.wall(),
        }

    def restore(self, row: Row) -> None:
        """Add what an earlier attempt had spent at its last complete event."""
        for kind in self.seconds:
            self.seconds[kind] += row[f"seconds_{kind}"]
        self.wall_before = row["seconds_wall"]


@dataclass
class EventRecorder(Callback):
    """Measures the model at each event of a segment and commits the event to the run folder.

    Events that the folder already holds are skipped, so a continued run writes none twice. `global_step`, the axis that
    all segments share, counts the optimizer steps from the run's first weights to the event's, on the path through
    the tree; a PPO update counts as `ppo_steps_per_update` of them, a restoration as none.

    Where `pace` leaves no time for an event's spectra, they are missing: the event has its other rows, but no spectra
    and no array file. Those of a segment's first and last step are always there, and so those of the steps that a
    branch starts from.
    """

    config: TrackConfig
    folder: RunFolder
    task: Task
    tracker: SpectralTracker
    probe: KLProbe
    clock: Clock
    pace: Pace
    tensorboard: TensorBoardLog
    progress: Progress
    ppo_steps_per_update: int

    def __post_init__(self) -> None:
        self._told = False
        self._done = {event_of(row) for row in self.folder.metrics()}
        self._run_id = self.folder.run_id
        self._segment: Segment
        self._seconds_before = 0.0

    def begin(self, segment: Segment, *, seconds_training: float) -> None:
        """Prepare for a segment; step 0 of one that has a parent repeats the parent's figures.

        Args:
            seconds_training: spent on the segments before it.
        """
        self._segment = segment
        self._origin: Row = {}
        if segment.parent is not None:
            (parent,) = (row for row in self.folder.metrics() if event_of(row) == segment.parent)
            self._origin = dict(zip(("parent_segment", "parent_step"), segment.parent))
            self._origin["parent_weights"] = parent.get("weights")
        self._seconds_before = seconds_training
        self._evals = [row for row in self.folder.evals() if segment_of(row) == segment.id]
        self._fall = first_fall(self.config, segment.id, self._evals)

    def ends(self) -> bool:
        return self.config.stop and self._fall is not None

    def on_start(self, state: StepState) -> None:
        if (self._segment.id, 0) in self._done:
            return
        if self._segment.parent is not None:
            self._repeat(state, self._segment.parent)
        else:
            self._record(state)

    def on_step(self, state: StepState) -> None:
        logs = {name: state.logs[name] for name in ("loss", "mean_reward") if name in state.logs}
        self.progress.step(state.step, **logs)
        event = self._segment.id, state.step
        if self.config.is_event(state.stage, state.step) and event not in self._done:
            self._record(state)

    def _record(self, state: StepState) -> None:
        config, clock = self.config, self.clock
        place = self._place(state)
        evals: list[Row] = []
        with clock.timed("evaluating"):
            for shift in config.shifts:
                result = evaluate(
                    state.model,
                    state.tokenizer,
                    self.task,
                    shift=shift,
                    deals=config.deals,
                    turns=config.turns,
                    seed=config.seed,
                    dtype=config.dtype,
                )
                evals.append({**place, **eval_row(result, turns=config.turns, seed=config.seed)})
        fall = self._fall or first_fall(config, self._segment.id, [*self._evals, *evals])
        last = state.step == config.steps(state.stage) or (config.stop and fall is not None)
        record = self._measured(state, last=last)
        with clock.timed("kl"):
            kl = self.probe.measure(state.model)
        weights: Row = {}
        with clock.timed("saving"):
            if record is not None:
                with self._writing_arrays(state) as temporary:
                    save_file(record.arrays, temporary)
            if last or config.keeps_checkpoint(state.stage, state.step):
                checkpoint = self.folder.checkpoint_dir(self._segment.id, state.step)
                record_it = partial(self.folder.manifest.record, checkpoint)
                save_checkpoint(state.model, state.tokenizer, checkpoint, on_complete=record_it)
                if config.is_branch_point(state.stage, state.step):
                    weights = {"weights": weights_digest(checkpoint)}
        spectra = [] if record is None else [{**self._belongs(), **row} for row in record.rows]
        self._commit(state, {**self._figures(state, evals, kl), **weights}, spectra, evals)
        if fall is not None and self._fall is None:
            self._fall = fall
            self.progress.say(self._alarm_line(fall))

    def _alarm_line(self, fall: Fall) -> str:
        """What the alarm found, with the checkpoint to go back to where there is one."""
        peak = self.folder.checkpoint_dir(self._segment.id, fall.peak_step)
        line = describe_fall(fall, checkpoint=str(peak) if peak.is_dir() else None)
        return f"{self._segment.id}: {line}" + ("; the stage ends here" if self.config.stop else "")

    def _measured(self, state: StepState, *, last: bool) -> SpectralRecord | None:
        """The event's spectra; None where there is no time for them. ``last``: of its segment."""
        needed = state.step == 0 or last or self.config.is_branch_point(state.stage, state.step)
        if not (needed or self.pace.allows()):
            self._tell_left_out(state)
            return None
        # What a rotation means is told where it counts, at the end of a stage. No other measurement takes as long.
        with self.clock.timed("tracking"), self.pace.spending(once=last):
            draws = NULL_DRAWS if last and state.stage != "restore" else 0
            return self.tracker.measure(state.model, stage=state.stage, step=state.step, null_draws=draws)

    def _tell_left_out(self, state: StepState) -> None:
        if not self._told:
            self._told = True
            self.progress.say(
                f"tracking took {self.pace.spent:.3g} of {self.pace.elapsed:.3g} s so far: the spectra of "
                f"{self._segment.id} {state.step} are left out (track_budget={self.config.track_budget!r}), later ones "
                "may be too"
            )

    def _repeat(self, state: StepState, parent: Event) -> None:
        """Commit the segment's step 0 with the figures of the event whose weights it starts from."""
        here = self._place(state)

        def moved(rows: Sequence[Row]) -> list[Row]:
            return [{**row, **here} for row in rows if event_of(row) == parent]

        ids = {**self._belongs(), "stage": state.stage, "step": 0}
        spectra = [{**row, **ids} for row in self.folder.spectra() if event_of(row) == parent]
        with self._writing_arrays(state) as temporary:
            shutil.copyfile(self.folder.arrays_path(*parent), temporary)
        (source,) = moved(self.folder.metrics())
        evals = moved(self.folder.evals())
        figures = self._figures(state, evals, source["kl_base_nats_per_token"])
        self._commit(state, figures, spectra, evals)

    @contextmanager
    def _writing_arrays(self, state: StepState) -> Iterator[Path]:
        """Context for writing an event's array file, there whole or not at all: yields where to."""
        path = self.folder.arrays_path(self._segment.id, state.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
            self.folder.manifest.record(path, temporary)

    def _figures(self, state: StepState, evals: list[Row], kl: float) -> Row:
        # The row's seconds are cumulative; those of a single step would not fit among them.
        logs = {name: value for name, value in state.logs.items() if not name.startswith("seconds")}
        accuracies = metrics_columns(evals, self.config.ood_shift)
        return {**self._place(state), **self._origin, **logs, **accuracies, "kl_base_nats_per_token": kl}

    def _belongs(self) -> Row:
        """Which run and which segment a row belongs to."""
        return {"run": self._run_id, "segment": self._segment.id}

    def _place(self, state: StepState) -> Row:
        start = 0 if self._segment.parent is None else self._segment.parent[1]
        pace = {"sft": 1, "ppo": self.ppo_steps_per_update, "restore": 0}[state.stage]
        global_step = start + pace * state.step
        return {**self._belongs(), "stage": state.stage, "step": state.step, "global_step": global_step}

    def _commit(self, state: StepState, figures: Row, spectra: list[Row], evals: list[Row]) -> None:
        training = self._seconds_before + state.seconds_training
        metrics = {**figures, "seconds_training": training, **self.clock.columns()}
        if self.pace.share is not None:
            metrics["seconds_last_measurement"] = self.pace.last  # a resumed run goes by it
        self.folder.commit(metrics, spectra=spectra, evals=evals)
        self._evals += evals
        self._done.add(event_of(metrics))
        self.tensorboard.add(metrics, spectra)
        line = event_line(metrics, spectra, state.total, self.config.ood_shift)
        self.progress.say(f"{line}  {self.progress.eta(state.step)}".rstrip())


def event_line(metrics: Row, spectra: Sequence[Row], total: int, ood_shift: str | None) -> str:
    """An event's main figures in one line."""
    parts = [f"{segment_of(metrics)} {metrics['step']:>{len(str(total))}}/{total}"]
    for label, key, form in (
        ("loss", "loss", "{:.3f}"),
        ("reward", "mean_reward", "{:+.2f}"),
        ("ID", "id_accuracy", "{:.1%}"),
        (f"OOD ({ood_shift})", "ood_accuracy", "{:.1%}"),
        ("KL", "kl_base_nats_per_token", "{:.3f}"),
    ):
        if metrics.get(key) is not None:
            parts.append(f"{label} {form.format(metrics[key])}")
    turned = mean(rotation(row) for row in spectra)
    if turned is not None:
        parts.append(f"rotation {turned:.4f} rad")
    return "  ".join(parts)
