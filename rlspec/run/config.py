"""Every setting of `rlspec track`: one frozen dataclass, with the names of config.yaml and of the flags."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from rlspec.errors import OptionError
from rlspec.run.budget import parse_budget
from rlspec.run.segments import STAGES, Segment, accuracy_prefix, branch_id, method_of
from rlspec.run.trainers import further_settings, names, trainer_config
from rlspec.run.values import checked, closest
from rlspec.settings import Setting, setting, setting_of
from rlspec.train.config import PPOConfig, SFTConfig

EMBEDDED = "embedded"
TRAINED = ("sft", "ppo")  # by a trainer, whose settings are among a run's

# Learning rates where none is given: (SFT, PPO). The paper's are for models of 7 to 11 billion parameters.
EMBEDDED_LEARNING_RATES = (1.25e-4, 1e-4)
PAPER_LEARNING_RATES = (1e-6, 1e-6)

# Where PPO starts from if not told, beside the end of SFT: soon after the embedded model has lost its OOD accuracy.
EMBEDDED_BRANCH = 100

# PPO updates where none are given. TRL samples by transformers' generate, which takes longer.
PPO_UPDATES = {"rlspec": 20, "trl": 5}

# What TRL's trainers do of what our own do; nothing else can be asked of them.
_OF_TRL = {"advantages": "grpo", "ppo_level": "token", "sft_loss": "cross_entropy", "sft_kl_coef": 0.0}

# Headings of --help.
_MEASURED = "What is measured"
_RL = "Reinforcement learning"
_RESTORED = "Restoration"
_MACHINE = "The machine"

# Settings that are counts: at least 1 where they are given.
_COUNTS = (
    "every",
    "ppo_every",
    "checkpoint_every",
    "sft_steps",
    "batch_size",
    "micro_batch_size",
    "ppo_updates",
    "turns_per_update",
    "deals",
    "turns",
    "threads",
)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """The settings of one run. The defaults are those of the embedded model.

    Steps are optimizer steps in the SFT stage and updates (one batch of rollouts each) in the PPO stage.
    A learning rate left at None becomes the embedded model's or, for any other model, the paper's 1e-6.
    `stages` left at None are all for the embedded model, those that train for any other: restoring holds a second
    copy of the matrices that it restores in memory, which `rlspec restore` does not.
    `ppo_from` are the SFT steps that a branch of PPO starts from, one branch each; left at None they become step
    100 and the last for the embedded model, the last for any other.
    `micro_batch_size` is the rows of one forward pass while training; it changes speed and memory only.
    `further` are the trainers' other settings by their names in config.yaml (:mod:`rlspec.run.trainers`), such as
    `ppo_clip`; those that are not given become the embedded model's or, for any other model, the paper's.

    With ``trainer="trl"`` PPO is TRL's GRPO: no value head and single answers, so that `ppo_value_*`, `ppo_gamma`,
    `ppo_lam` and `ppo_rollout_batch_size` say nothing.

    Raises:
        OptionError: A value out of range; the message names it, as in ``every=0``.
    """

    model: str = setting(EMBEDDED, "A Hugging Face folder, or the model that comes with rlspec.")
    every: int = setting(50, "Measure each N SFT steps, and at the first and the last.")
    sft_steps: int = setting(300, "SFT optimizer steps.")
    ppo_updates: int | None = setting(
        None,
        "PPO updates, one batch of rollouts each.",
        default_told=f"{PPO_UPDATES['rlspec']}, or {PPO_UPDATES['trl']} by trl",
    )
    ppo_from: tuple[int, ...] | None = setting(
        None,
        "SFT steps to start PPO from, a branch each, as in 100,300.",
        default_told=f"{EMBEDDED_BRANCH} and the last for the embedded model, else the last",
    )
    stages: tuple[str, ...] | None = setting(
        None,
        "Stages to run: sft (fine-tuning), ppo (reinforcement learning), restore (of the model that SFT started from "
        "into the one it ended with).",
        default_told=f"{','.join(STAGES)} for the embedded model, else {','.join(TRAINED)}",
    )
    trainer: Literal["rlspec", "trl"] = setting(
        "rlspec", "Who trains: rlspec itself, or TRL's SFTTrainer, then GRPOTrainer on single answers."
    )
    seed: int = setting(0, "Seed of data, sampling and evaluation.")
    device: str = setting("auto", "cpu, cuda, cuda:1, …", default_told="cuda if there is one")
    task: str = setting("general_points", "Task to train on.", heading=_MEASURED)
    shifts: tuple[str, ...] = setting(
        ("none", "both"),
        "Evaluations, separated by commas: none (in distribution), rule, cards, both, target.",
        heading=_MEASURED,
    )
    deals: int = setting(234, "Evaluation problems per shift.", heading=_MEASURED)
    turns: int = setting(5, "Verification turns per evaluation episode.", heading=_MEASURED)
    modules: tuple[str, ...] = setting(
        ("q", "k", "v"), "Matrices tracked: q, k, v, o, mlp, embed, lm_head.", heading=_MEASURED
    )
    rank: str = setting(
        "0.2",
        "Directions tracked: a share of each matrix's smaller side (1.0 is all), or a count (1 is one).",
        heading=_MEASURED,
    )
    per_head: bool = setting(
        False, "Measure each attention head of q, k, v and o by itself.", heading=_MEASURED
    )
    engine: Literal["delta", "exact"] = setting(
        "delta", "How spectra are computed: delta (fast) or exact (full decompositions).", heading=_MEASURED
    )
    ppo_every: int = setting(5, "Measure each N PPO updates.", heading=_MEASURED)
    track_budget: str | None = setting(
        None,
        "Share of the run's time that tracking may take, as in 1%; where an event's spectra would exceed it, they are "
        "left out, but for the first and the last of a stage and those that PPO starts from.",
        default_told="no limit",
        heading=_MEASURED,
    )
    checkpoint_every: int | None = setting(
        None,
        "Keep a checkpoint each N steps or updates only.",
        default_told="at each measurement",
        heading=_MEASURED,
    )
    alarm: str | None = setting(
        None,
        "Tell the checkpoint to go back to once this fell from its peak in a stage: id_accuracy, ood_accuracy, or "
        "rule_accuracy and the like of other shifts.",
        heading=_MEASURED,
    )
    stop: bool = setting(False, "End a stage where the alarm rings.", heading=_MEASURED)
    learning_rate: float | None = setting(
        None,
        "SFT learning rate.",
        default_told=f"{EMBEDDED_LEARNING_RATES[0]} for the embedded model, else {PAPER_LEARNING_RATES[0]}",
        heading="SFT",
    )
    batch_size: int = setting(32, "SFT examples per step.", heading="SFT")
    ppo_learning_rate: float | None = setting(
        None,
        "PPO learning rate.",
        default_told=f"{EMBEDDED_LEARNING_RATES[1]} for the embedded model, else {PAPER_LEARNING_RATES[1]}",
        heading=_RL,
    )
    turns_per_update: int = setting(256, "Answers sampled per PPO update.", heading=_RL)
    restore_modules: tuple[str, ...] = setting(
        ("mlp",), "Matrices that the stage restore puts the start's directions back into.", heading=_RESTORED
    )
    restore_rank: str = setting("0.5", "How many of their directions, as in rank.", heading=_RESTORED)
    micro_batch_size: int | None = setting(
        None,
        "Rows of one training forward pass (memory).",
        default_told="64 for the embedded model, else 4; PPO 2",
        heading=_MACHINE,
    )
    dtype: Literal["auto", "float32", "bf16"] = setting(
        "auto",
        "float32, or bf16 for autocast.",
        default_told="bf16 on CUDA, float32 on CPU",
        heading=_MACHINE,
    )
    threads: int | None = setting(None, "CPU threads.", default_told="torch's choice", heading=_MACHINE)
    further: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        sft_rate, ppo_rate = EMBEDDED_LEARNING_RATES if self.model == EMBEDDED else PAPER_LEARNING_RATES
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", sft_rate)
        if self.ppo_learning_rate is None:
            object.__setattr__(self, "ppo_learning_rate", ppo_rate)
        self._check_choice("trainer")
        stages = self.stages
        if stages is None:
            stages = STAGES if self.model == EMBEDDED else TRAINED
            object.__setattr__(self, "stages", stages)
        if self.ppo_updates is None:
            object.__setattr__(self, "ppo_updates", PPO_UPDATES[self.trainer])
        for name in _COUNTS:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("learning_rate", "ppo_learning_rate"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        self._require("seed", self.seed >= 0, "at least 0")
        for name in ("stages", "modules", "restore_modules", "shifts"):
            values = getattr(self, name)
            self._require(name, len(values) > 0, "one or more names, separated by commas")
            self._require(name, len(set(values)) == len(values), "names that differ from each other")
        for stage in stages:
            if stage not in STAGES:
                raise OptionError(
                    f"stages={','.join(stages)!r}: unknown stage {stage!r}; valid: {', '.join(STAGES)}"
                )
        if "restore" in stages and "sft" not in stages:
            raise OptionError(f"stages={','.join(stages)!r}: restore needs sft, whose end it repairs")
        # The order is fixed: PPO and restoration start from where SFT ends.
        object.__setattr__(self, "stages", tuple(stage for stage in STAGES if stage in stages))
        self._check_choice("engine")
        self._check_choice("dtype")
        parse_budget(self.track_budget, "track_budget")
        if self.alarm is not None and self.alarm not in self.accuracies:
            known = ", ".join(self.accuracies)
            raise OptionError(
                f"alarm={self.alarm!r}: no such score of shifts={','.join(self.shifts)}; there are {known}"
            )
        if self.stop and self.alarm is None:
            raise OptionError("stop=True needs alarm=, the score whose fall ends a stage")
        if self.ppo_from:
            self._check_ppo_from(self.ppo_from)
        object.__setattr__(self, "ppo_from", self._branch_points())
        if self.trainer == "trl":
            object.__setattr__(self, "further", {**_OF_TRL, **self.further})
        object.__setattr__(self, "further", self._all_further())
        if self.trainer == "trl":
            self._check_trl()

    def _check_trl(self) -> None:
        if self.device.startswith("cuda:") and self.device != "cuda:0":
            raise OptionError(
                f"device={self.device!r}: trainer='trl' takes the first GPU; choose which by CUDA_VISIBLE_DEVICES"
            )
        for name, wanted in _OF_TRL.items():
            if (found := self.further[name]) != wanted:
                raise OptionError(f"{name}={found!r}: trainer='trl' has {wanted!r} alone")
        # A mini-batch is never more than the update; a group may not be.
        parts = {"group_size": self.further["group_size"]}
        parts["ppo_mini_batch_size"] = min(self.further["ppo_mini_batch_size"], self.turns_per_update)
        for name, part in parts.items():
            if self.turns_per_update % part or part < 2:
                raise OptionError(
                    f"turns_per_update={self.turns_per_update} must be a multiple of {name}={self.further[name]} with "
                    "trainer='trl'"
                )

    def _all_further(self) -> dict[str, Any]:
        """The value of every one of the trainers' other settings."""
        known = {each.name: each for each in FURTHER}
        for name in self.further:
            if name not in known:
                raise OptionError(f"unknown setting {name!r}; the closest is {closest(name, known)!r}")
        complete: dict[str, Any] = {}
        for stage in TRAINED:
            found = self._trainer(stage)
            complete |= {name: getattr(found, own) for own, name in names(stage).items() if name in known}
        return complete

    def _trainer(self, stage: str) -> SFTConfig | PPOConfig:
        values = {**self.further, **{each.name: getattr(self, each.name) for each in OWN}}
        return trainer_config(stage, values, embedded=self.model == EMBEDDED)

    @property
    def sft(self) -> SFTConfig:
        """The settings of the SFT stage's trainer."""
        found = self._trainer("sft")
        assert isinstance(found, SFTConfig)
        return found

    @property
    def ppo(self) -> PPOConfig:
        """The settings of the PPO stage's trainer."""
        found = self._trainer("ppo")
        assert isinstance(found, PPOConfig)
        return found

    def _check_choice(self, name: str) -> None:
        valid = typing.get_args(typing.get_type_hints(type(self))[name])
        if getattr(self, name) not in valid:
            raise OptionError(f"{name}={getattr(self, name)!r}: unknown value; valid: {', '.join(valid)}")

    def _check_ppo_from(self, steps: tuple[int, ...]) -> None:
        shown = ",".join(map(str, steps))
        if not self.runs(*TRAINED):
            raise OptionError(f"ppo_from={shown} needs both stages, stages='sft,ppo'")
        self._require("ppo_from", len(set(steps)) == len(steps), "steps that differ from each other")
        for step in steps:
            if not 0 <= step <= self.sft_steps:
                raise OptionError(
                    f"ppo_from={shown}: {step} is no SFT step; there are those from 0 to sft_steps={self.sft_steps}"
                )

    def _branch_points(self) -> tuple[int, ...]:
        """The SFT steps that PPO starts from, in order."""
        if not self.runs(*TRAINED):
            return ()
        if self.ppo_from:
            return tuple(sorted(self.ppo_from))
        early = self.model == EMBEDDED and self.sft_steps > EMBEDDED_BRANCH
        return (EMBEDDED_BRANCH, self.sft_steps) if early else (self.sft_steps,)

    def runs(self, *stages: str) -> bool:
        """Whether all of ``stages`` are among the run's."""
        assert self.stages is not None  # __post_init__ has put some there
        return set(stages) <= set(self.stages)

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            value = getattr(self, name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise OptionError(f"{name}={shown!r} must be {wanted}")

    @property
    def ood_shift(self) -> str | None:
        """The shift that `ood_accuracy` means: the paper's `both`, or the first that is not ID."""
        others = [shift for shift in self.shifts if shift != "none"]
        return "both" if "both" in others else next(iter(others), None)

    @property
    def accuracies(self) -> dict[str, str]:
        """Column of the metrics -> the shift whose accuracy it is."""
        return {f"{accuracy_prefix(shift, self.ood_shift)}_accuracy": shift for shift in self.shifts}

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The run's tree, parents first: SFT, PPO from each of its steps that `ppo_from` names, and the restoration of
        its end.

        A branch that is the only one is called by its stage, as in runs that could have no other.
        """
        method = method_of("ppo", {"trainer": self.trainer, "advantages": self.ppo.advantage})
        first = next(stage for stage in STAGES if self.runs(stage))
        trunk = Segment(first, first, self.steps(first), None, method if first == "ppo" else "")
        points = self.ppo_from or ()
        names = [branch_id(point) for point in points] if len(points) > 1 else ["ppo"]
        branches = (
            Segment(name, "ppo", self.steps("ppo"), ("sft", point), method)
            for name, point in zip(names, points)
        )
        restored = Segment("restore", "restore", self.steps("restore"), trunk.end, method_of("restore", {}))
        return (trunk, *branches, *([restored] if self.runs("restore") else []))

    def steps(self, stage: str) -> int:
        """The number of steps of ``stage``; restoring is one."""
        if stage == "restore":
            return 1
        if stage == "sft":
            return self.sft_steps
        assert self.ppo_updates is not None  # __post_init__ has put a number there
        return self.ppo_updates

    def is_event(self, stage: str, step: int) -> bool:
        """Whether ``step`` is measured: step 0, each multiple of the stage's interval, the last step, and those
        that a branch starts from."""
        every = self.every if stage == "sft" else self.ppo_every
        return step % every == 0 or step == self.steps(stage) or self.is_branch_point(stage, step)

    def keeps_checkpoint(self, stage: str, step: int) -> bool:
        """Whether the event at ``step`` leaves a checkpoint: every one, or those `checkpoint_every` names and
        the ones that the run itself needs (a stage's last step, the steps that a branch starts from)."""
        if self.checkpoint_every is None or step == self.steps(stage):
            return True
        return step % self.checkpoint_every == 0 or self.is_branch_point(stage, step)

    def is_branch_point(self, stage: str, step: int) -> bool:
        """Whether a branch starts from ``step``."""
        # Asked at every step, and the tree takes the trainers' settings to make.
        restored = self.runs("restore") and step == self.sft_steps
        return stage == "sft" and (restored or step in (self.ppo_from or ()))

    def values(self) -> dict[str, Any]:
        """Every setting by its name in config.yaml."""
        return {each.name: getattr(self, each.name) for each in OWN} | dict(self.further)

    def to_settings(self) -> dict[str, Any]:
        """The settings as config.yaml holds them: tuples become lists, and a limit that there is not is not told."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self.values().items()
            if (key, value) != ("track_budget", None)
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, source: str = "config") -> TrackConfig:
        """A config of settings read from YAML or the command line; the rest keeps its default.

        Raises:
            OptionError: An unknown key (the closest valid one is named), a value of the wrong type or range.
        """
        return cls.of(checked_types(settings, source=source))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrackConfig:
        """A config of values by their names in config.yaml; the rest keeps its default."""
        own, further = _split(values)
        return cls(**own, further=further)

    def changed(self, values: Mapping[str, Any]) -> TrackConfig:
        """This config with other values, by their names in config.yaml."""
        own, further = _split(values)
        return replace(self, **own, further={**self.further, **further})


def _own() -> list[Setting]:
    hints = typing.get_type_hints(TrackConfig)
    return [setting_of(each, hints[each.name]) for each in fields(TrackConfig) if each.name != "further"]


#: The settings that TrackConfig declares itself, and the trainers' others: together every setting of a run.
OWN = _own()
FURTHER = further_settings([each.name for each in OWN])
_BY_NAME = {each.name: each for each in (*OWN, *FURTHER)}


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {each.name for each in OWN}
    return (
        {name: value for name, value in values.items() if name in own},
        {name: value for name, value in values.items() if name not in own},
    )


def checked_types(settings: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Settings read from YAML or the command line under the names and with the types of :class:`TrackConfig`, see
    :func:`rlspec.run.values.checked`."""
    return checked(settings, {name: each.hint for name, each in _BY_NAME.items()}, source)
