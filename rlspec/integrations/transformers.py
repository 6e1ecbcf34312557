"""Track the spectra of a model inside transformers' Trainer and those built on it, TRL's among them.

``Trainer(..., callbacks=[SpectralCallback(every=50, out="spectra")])``. The training does not notice: random state, modes
and gradients stay as they are, what goes wrong in here is told once and ends the tracking, not the training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from rlspec.errors import OptionError
from rlspec.integrations.caller import calling_trainer, log_event
from rlspec.integrations.hold import belongs_to, new_training, trainings_of
from rlspec.integrations.presence import ask, same_arguments
from rlspec.integrations.reference import kept_start, known_base, make_tracker, refuse_sharded, told_base
from rlspec.integrations.scoring import Evaluate, Scoring
from rlspec.integrations.store import TrackingFolder
from rlspec.integrations.unheard import unheard
from rlspec.io.jsonl import Row
from rlspec.io.projections import parse_modules
from rlspec.linalg.rank import Rank, RankLike
from rlspec.report.data import by_event
from rlspec.run.budget import Pace, parse_budget
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.processes import ProcessError, Processes, told
from rlspec.spectra.tracker import SpectralRecord, SpectralRecords, SpectralTracker
from rlspec.tasks.alarm import Fall, describe_fall
from rlspec.train.callbacks import undisturbed

_LOG = logging.getLogger(__name__)
_STAGE = "train"


class SpectralCallback(TrainerCallback):
    """Measures the weights at step 0, every ``every`` optimizer steps and at the last one.

    The last one is that of a training that is stopped early too. It is missing where the best model is loaded at the end
    and nothing told before of the end, as an evaluation that stops it and is not saved.

    Rows go to ``out/spectra.jsonl`` and :attr:`records`, four means (``caller.LOGGED``) to the trainer's own loggers
    (TensorBoard, W&B, …), some of which put ``train/`` before the names, and its ``state.log_history``; a ``log()`` that
    a subclass of Trainer has of its own is not called. LoRA adapters of PEFT count with their weight, W + s B A. The
    reference is decomposed when the training begins, which takes time once (decompositions are cached, see
    ``$RLSPEC_CACHE``); its factors stay on the host.

    Several processes share the work, whether each has a copy of the model (DDP) or DTensors of it (FSDP2, tensor
    parallelism), see ``DealtTracker``; the first one writes. All must have the callback, with the same arguments: where
    one has none the others wait for it as the training begins, two minutes at most, and then train without tracking.
    ``base``, and ``out`` of a resumed training, must be readable for all of them.

    From there on an error of any kind, in any process, is told in one warning and ends the tracking alone, see
    :attr:`disabled`. Among them are weights spread by FSDP1, ZeRO-3, DeepSpeed's AutoTP or Megatron, and quantised ones
    (QLoRA): measure their saved checkpoints. What raises is wrong arguments, and a process that is gone (GatherError),
    without which the training could not go on either. So does any failure while spread weights are gathered: it looks the
    same from inside one process. Whether there is memory for that is found out before, by all.

    A copy, or what comes of pickling it, has the arguments and what was found so far, and is in no training.

    Args:
        every: optimizer steps between measurements.
        base: the reference: a safetensors checkpoint folder; or a basis, or the folder of a saved one, with the modules,
            rank and per_head given here, of which nothing is decomposed anew; None for the weights when the training
            begins.
        modules: which projections, see ``SpectralBasis.from_model``.
        rank: leading directions to follow, see ``Rank``.
        per_head: each attention head of q, k, v and o is a matrix of its own.
        out: folder for the rows; None keeps them in memory alone. A resumed training goes on in it and measures no step
            twice; with ``base=None`` it is also where the reference is kept, so such a training needs it to be resumed.
            A training that starts anew sets the files of the one before aside, under names with a number. One training
            at a time: a folder that another process uses, or that holds another training than the one that is resumed,
            ends the tracking.
        budget: the share of the training's time that all this may take, such as ``"1%"`` or ``0.01``, the reference
            and scores included. The reference, step 0 and the last step are always measured, and may take more in a
            short training; everything between waits until there is time for it. None: no limit.
        evaluate: called with the model, in eval mode and without gradients, at each measurement; returns named scores:
            numbers, or better lists of one number per problem (True and False for solved or not), always of the same
            problems. Nothing is compiled in it, and what is compiled runs eagerly, as the texts do: the training's graphs
            stay as they are. It may use random numbers and ``trainer.evaluate()``, of which the trainer's callbacks and
            loggers are not told, and must change no weight. Scores go to ``out/scores.jsonl``, the records and the
            loggers, there as ``spectra/score/<name>``. An error in it ends the scores alone. Several processes all call
            it, at the same step, and what the first one's call returns counts. Forward passes of FSDP2, and whatever else
            the processes do together, must be the same in all: one that fails in the middle of them alone leaves the
            others waiting for it.
        texts: a JSONL file with a ``text`` on each line; the score ``text_loss`` is the model's mean token loss on them,
            by the trainer's tokenizer. Several processes share the texts out where each holds the whole model.
        alarm: the score to be kept; see ``rlspec.tasks.alarm`` for when it rings and how often for nothing. The first
            fall is warned of and kept in :attr:`fall`.
        stop: end the training when the alarm rings, in all processes at the same step; one that is resumed after the
            fall ends after the next step.

    Raises:
        OptionError: an argument out of range, an unknown module, no texts, an alarm without its score, or a basis of
            other matrices or of another rank.
        CheckpointError: ``base`` is neither a checkpoint nor a saved basis.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        base: str | Path | SpectralBasis | None = None,
        modules: str | Iterable[str] = "q,k,v",
        rank: RankLike = 0.2,
        per_head: bool = False,
        out: str | Path | None = None,
        budget: str | float | None = None,
        evaluate: Evaluate | None = None,
        texts: str | Path | None = None,
        alarm: str | None = None,
        stop: bool = False,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"every={every!r} must be a whole number of steps, at least 1")
        self.every = every
        self.modules = parse_modules(modules)
        self.rank = Rank.parse(rank)
        self.per_head = per_head
        self.base = known_base(base, self.modules, self.rank, per_head)  # told before the training, not in it
        self.out = None if out is None else Path(out)
        self.budget = budget
        parse_budget(budget)
        #: one per measurement, in order, without arrays; those of a resumed training's earlier parts too, where ``out``
        #: or this same callback has them
        self.records = SpectralRecords()
        #: why tracking ended before the training did; None while all is well
        self.disabled: str | None = None
        if stop and alarm is None:
            raise OptionError("stop=True needs alarm=, the score whose fall ends the training")
        self.stop = stop
        #: what the alarm found; None while it has not rung
        self.fall: Fall | None = None
        #: why scores ended before the training did; None while all is well
        self.unscored: str | None = None
        self._scoring = Scoring(evaluate, texts, alarm)
        compared = {"every": every, "modules": self.modules, "rank": str(self.rank), "per_head": per_head}
        compared |= {"alarm": alarm, "stop": stop}
        given = {"base": base, "evaluate": evaluate, "texts": texts}
        if base is None:  # else the first one alone uses it
            given["out"] = out
        #: what decides what several processes do together; the folders of each may lie elsewhere
        self._alike = {name: repr(value) for name, value in compared.items()}
        self._alike |= {name: "not given" if value is None else "given" for name, value in given.items()}
        self._training: str | None = None  # the first process's, of `hold`
        lasting = set(vars(self))
        self._idle()
        self._passing = frozenset(vars(self).keys() - lasting)

    def _idle(self) -> None:
        """What belongs to the training that it is in: none."""
        self.pace = Pace(parse_budget(self.budget))
        self._processes = self._scorers = Processes()
        self._tracker: SpectralTracker | DealtTracker | None = None
        self._reference: Path | None = None  # where base=None and the training was resumed
        self._folder: TrackingFolder | None = None
        self._trainer: Trainer | None = None
        self._due = self._told = False

    # Copies that Ray Tune and joblib make of a trainer, or of its callbacks, come to other processes.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._idle()

    # What the trainer calls.
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._processes = Processes.of_training()
        if self._processes.count == 1 and not state.is_world_process_zero:
            return
        self._release()  # a training that was interrupted never ended
        goes_on = state.global_step > 0 and self._training in (trainings_of(state) or [])
        kept = [record for record in self.records if goes_on and record.step <= state.global_step]
        self.records, self.disabled, self._due, self._told = SpectralRecords(kept), None, False, False
        self._tracker = self._folder = self._reference = None
        self.fall = self.unscored = None
        self._trainer = calling_trainer(self)
        model: nn.Module = kwargs["model"]
        self.pace.begin()
        step = state.global_step
        with self.pace.spending(once=True):
            ready = (
                self._all_here()
                and self._together(model, lambda: same_arguments(self._processes, self._alike))
                and self._together(model, lambda: self._open(model, args, state))
                and self._together(model, lambda: self._find_reference(model, step))
                and self._together(model, lambda: self._begin(model))
                and self._together(model, lambda: self._begin_scores(args))
            )
        if ready and step == 0:
            self._measure(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._tracker is None:
            return
        self._stop_where_fallen(control)  # a resumed training may know of a fall
        if state.global_step == state.max_steps or getattr(control, "should_training_stop", False):
            self._measure_last(args, state, control, **kwargs)
            return
        if state.global_step % self.every == 0 and not self._has(state.global_step):
            self._due = True
        if not self._due:
            return
        if self._processes.first(self.pace.allows()):  # their clocks differ
            self._measure(args, state, control, **kwargs)
        elif not self._told:
            self._told = True
            self._warn(
                "tracking took %.3g of %.3g s so far: the measurement of step %d waits (budget=%r), later ones may too",
                self.pace.spent,
                self.pace.elapsed,
                state.global_step,
                self.budget,
            )

    # Where a training ends that is stopped: whoever stops it may be called after this, at the step or in an evaluation.
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(control, "should_training_stop", False):
            self._measure_last(args, state, control, **kwargs)

    on_save = on_epoch_end = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # The trainer's last words; later ones may find other weights, and earlier versions have the best loaded by now.
        loaded = getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint is not None
        if logs is not None and "train_runtime" in logs and not loaded:
            self._measure_last(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()
        self._tracker = self._trainer = None  # the factors' memory, and a cycle
        self._scorers.close()
        self._scorers = Processes()

    # What they come to.
    def _has(self, step: int) -> bool:
        return any(record.step == step for record in self.records)

    def _measure_last(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the last step, which waits for no budget: nothing comes after it."""
        if self._tracker is not None and not self._has(state.global_step):
            self._measure(args, state, control, **kwargs)

    def _release(self) -> None:
        if self._folder is not None:
            self._folder.release()

    def _together(self, model: nn.Module, work: Callable[[], None]) -> bool:
        """Do one thing in all processes; False: it failed in one, and the tracking ends in all.

        What talks to the other processes in ``work`` must fail in all alike, or in none.
        """

        def isolated() -> None:
            with undisturbed(model):
                work()

        try:
            self._processes.together(isolated)
        except ProcessError as error:
            self._end(str(error), tells=self._processes.number == 0)
            return False
        return True

    def _end(self, reason: str, *, tells: bool) -> None:
        self.disabled = reason
        self._release()
        self._tracker = self._trainer = None
        if tells:
            _LOG.warning("tracking of the spectra ends here, the training goes on: %s", reason)

    def _all_here(self) -> bool:
        """Whether all processes have the callback; else the others would wait for those that have not."""
        presence = ask(self._processes)
        if not presence.all_here:
            self._end(
                f"only some of the {self._processes.count} processes have the callback; add it in all of them, not in "
                "the first one alone",
                tells=presence.speaks,
            )
        return presence.all_here

    def _open(self, model: nn.Module, args: Any, state: Any) -> None:
        """Know which training this is, and open its folder: the first process, which alone writes there."""
        refuse_sharded(model, max(getattr(args, "world_size", 1), self._processes.count))
        step, known = state.global_step, trainings_of(state)
        if self.out is None:
            if step == 0 or self._training not in (known or []):
                self._training = new_training()
            belongs_to(state, self._training or "")
            return
        settings = {
            "base": told_base(self.base),
            "modules": list(self.modules),
            "rank": str(self.rank),
            "per_head": self.per_head,
        }
        self._folder = TrackingFolder(self.out, settings)
        if self._processes.number > 0:
            return
        self._folder.hold()
        if step == 0:
            aside = self._folder.start()
            if aside:
                self._warn("an earlier training's files are now %s", ", ".join(map(str, aside)))
        else:
            rows = self._folder.resume(step, known)
            events = by_event(rows).items()
            self.records = SpectralRecords(SpectralRecord(s, at, group) for (s, at), group in events)
        self._training = self._folder.training
        if self._training is not None:
            belongs_to(state, self._training)

    def _find_reference(self, model: nn.Module, step: int) -> None:
        """Where the training's start is kept, and all processes' view of what was measured of it."""
        self.records = self._processes.first(self.records)
        if self.base is None and step == 0 and self._folder is not None:
            self._folder.save_reference(model, self.modules, self._processes)
        elif self.base is None and step > 0:
            self._reference = kept_start(self._folder, step)

    def _begin(self, model: nn.Module) -> None:
        """Take the reference's factors."""
        options: dict[str, Any] = {"modules": self.modules, "rank": self.rank, "per_head": self.per_head}
        base = self._reference if self.base is None else self.base
        self._tracker = make_tracker(model, base, self._processes, **options)

    def _begin_scores(self, args: Any) -> None:
        """Show the alarm the scores of a resumed training's earlier parts."""
        if not self._scoring:
            return
        try:
            self._scorers = self._processes.together(self._processes.apart)
            rows = self._scorers.first(self._scorers.together(self._earlier_scores))
            for record in self.records:
                record.scores = {row["score"]: row["value"] for row in rows if row["step"] == record.step}
            self.fall = self._scorers.first(self._scorers.together(lambda: self._scoring.begin(rows)))
            if self.stop and self.fall is not None:
                self._warn(
                    "%s; the training ends after its next step, as stop=True asks; stop=False trains on",
                    self._told_fall(args),
                )
        except ProcessError as error:
            self._end_scores(error)

    def _earlier_scores(self) -> list[Row]:
        """All that were taken: the first process's, which alone writes them."""
        return [] if self._folder is None or self._processes.number > 0 else self._folder.read_scores()

    def _measure(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One event: measured, scored, kept, logged."""
        tracker, model = self._tracker, kwargs["model"]
        if tracker is None:
            return
        self._due = False
        found: list[SpectralRecord] = []
        # One event for the budget: the next one will take as long with its scores. Each step by itself: a process that
        # fails in one must not miss what the others do together in the next.
        with self.pace.spending():
            (
                self._together(
                    model, lambda: found.append(tracker.measure(model, step=state.global_step, stage=_STAGE))
                )
                and self._together(model, lambda: self._keep(found[0]))
                and self._together(model, lambda: self._score(found[0], args, control, **kwargs))
                and self._together(model, lambda: self._log(found[0], control))
            )
        self._stop_where_fallen(control)

    def _stop_where_fallen(self, control: Any) -> None:
        """Called outside of what may fail in one process: else it alone would train on, and wait for the others."""
        if self.stop and self.fall is not None:
            control.should_training_stop = True

    def _keep(self, record: SpectralRecord) -> None:
        if self._folder is not None and self._processes.number == 0:
            self._folder.append(record.rows)
        self.records.append(record)

    def _score(self, record: SpectralRecord, args: Any, control: Any, **kwargs: Any) -> None:
        if not self._scoring or self.unscored is not None:
            return
        try:
            with unheard(control, self._trainer):
                rows, fall = self._scoring.score(
                    kwargs["model"], kwargs.get("processing_class"), record.step, self._scorers
                )
        except ProcessError as error:
            self._end_scores(error)
            return
        record.scores = {row["score"]: row["value"] for row in rows}
        if fall is not None and self.fall is None:  # before what may fail in the first process alone
            self.fall = fall
            self._warn("%s", self._told_fall(args))
        if self._folder is not None and self._processes.number == 0:
            self._folder.append_scores(rows)

    def _told_fall(self, args: Any) -> str:
        assert self.fall is not None
        checkpoint = os.path.join(args.output_dir, f"checkpoint-{self.fall.peak_step}")
        return describe_fall(self.fall, checkpoint=checkpoint if os.path.isdir(checkpoint) else None)

    def _end_scores(self, error: Exception) -> None:
        self.unscored = told(error)
        self._warn("scores end here, the tracking and the training go on: %s", self.unscored)

    def _log(self, record: SpectralRecord, control: Any) -> None:
        if self._trainer is not None:
            log_event(self._trainer, control, record.rows, record.scores)

    def _warn(self, message: str, *values: Any) -> None:
        if self._processes.number == 0:
            _LOG.warning(message, *values)
