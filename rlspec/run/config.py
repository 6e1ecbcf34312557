"""Every setting of `rlspec track`: one frozen dataclass, with the names of config.yaml and of the flags."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from rlspec.errors import OptionError
from rlspec.run.segments import Segment

EMBEDDED = "embedded"
STAGES = ("sft", "ppo")

# Learning rates where none is given: (SFT, PPO). The paper's are for models of 7 to 11 billion parameters.
EMBEDDED_LEARNING_RATES = (1.25e-4, 1e-4)
PAPER_LEARNING_RATES = (1e-6, 1e-6)

# Where PPO starts from if not told, beside the end of SFT: soon after the embedded model has lost its OOD accuracy.
EMBEDDED_BRANCH = 100

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
    `ppo_from` are the SFT steps that a branch of PPO starts from, one branch each; left at None they become step
    100 and the last for the embedded model, the last for any other.
    `micro_batch_size` is the rows of one forward pass while training; it changes speed and memory only.

    Raises:
        OptionError: A value out of range; the message names it, as in ``every=0``.
    """

    model: str = EMBEDDED
    task: str = "general_points"
    stages: tuple[str, ...] = STAGES
    every: int = 50
    ppo_every: int = 5
    checkpoint_every: int | None = None
    sft_steps: int = 300
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    ppo_updates: int = 20
    turns_per_update: int = 256
    ppo_learning_rate: float | None = None
    ppo_from: tuple[int, ...] | None = None
    rank: str = "0.2"
    modules: tuple[str, ...] = ("q", "k", "v")
    engine: Literal["delta", "exact"] = "delta"
    shifts: tuple[str, ...] = ("none", "both")
    deals: int = 234
    turns: int = 5
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        sft_rate, ppo_rate = EMBEDDED_LEARNING_RATES if self.model == EMBEDDED else PAPER_LEARNING_RATES
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", sft_rate)
        if self.ppo_learning_rate is None:
            object.__setattr__(self, "ppo_learning_rate", ppo_rate)
        for name in _COUNTS:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("learning_rate", "ppo_learning_rate"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        self._require("seed", self.seed >= 0, "at least 0")
        for name, values in (("stages", self.stages), ("modules", self.modules), ("shifts", self.shifts)):
            self._require(name, len(values) > 0, "one or more names, separated by commas")
            self._require(name, len(set(values)) == len(values), "names that differ from each other")
        for stage in self.stages:
            if stage not in STAGES:
                raise OptionError(
                    f"stages={','.join(self.stages)!r}: unknown stage {stage!r}; valid: {', '.join(STAGES)}"
                )
        # The order is fixed: PPO starts from where SFT ends.
        object.__setattr__(self, "stages", tuple(stage for stage in STAGES if stage in self.stages))
        self._check_choice("engine")
        self._check_choice("dtype")
        if self.ppo_from:
            self._check_ppo_from(self.ppo_from)
        object.__setattr__(self, "ppo_from", self._branch_points())

    def _check_choice(self, name: str) -> None:
        valid = typing.get_args(typing.get_type_hints(type(self))[name])
        if getattr(self, name) not in valid:
            raise OptionError(f"{name}={getattr(self, name)!r}: unknown value; valid: {', '.join(valid)}")

    def _check_ppo_from(self, steps: tuple[int, ...]) -> None:
        shown = ",".join(map(str, steps))
        if self.stages != STAGES:
            raise OptionError(f"ppo_from={shown} needs both stages, stages='sft,ppo'")
        self._require("ppo_from", len(set(steps)) == len(steps), "steps that differ from each other")
        for step in steps:
            if not 0 <= step <= self.sft_steps:
                raise OptionError(
                    f"ppo_from={shown}: {step} is no SFT step; there are those from 0 to sft_steps={self.sft_steps}"
                )

    def _branch_points(self) -> tuple[int, ...]:
        """The SFT steps that PPO starts from, in order."""
        if self.stages != STAGES:
            return ()
        if self.ppo_from:
            return tuple(sorted(self.ppo_from))
        early = self.model == EMBEDDED and self.sft_steps > EMBEDDED_BRANCH
        return (EMBEDDED_BRANCH, self.sft_steps) if early else (self.sft_steps,)

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
    def segments(self) -> tuple[Segment, ...]:
        """The run's tree, parents first: SFT, and PPO from each of its steps that `ppo_from` names.

        A branch that is the only one is called by its stage, as in runs that could have no other.
        """
        trunk = tuple(Segment(stage, stage, self.steps(stage)) for stage in self.stages[:1])
        points = self.ppo_from or ()
        names = [f"ppo-from-{point}" for point in points] if len(points) > 1 else ["ppo"]
        branches = (
            Segment(name, "ppo", self.ppo_updates, ("sft", point)) for name, point in zip(names, points)
        )
        return (*trunk, *branches)

    def steps(self, stage: str) -> int:
        """The number of steps of ``stage``."""
        return self.sft_steps if stage == "sft" else self.ppo_updates

    def is_event(self, stage: str, step: int) -> bool:
        """Whether ``step`` is measured: step 0, each multiple of the stage's interval, the last step, and those
        that PPO starts from."""
        every = self.every if stage == "sft" else self.ppo_every
        return step % every == 0 or step == self.steps(stage) or self.is_branch_point(stage, step)

    def keeps_checkpoint(self, stage: str, step: int) -> bool:
        """Whether the event at ``step`` leaves a checkpoint: every one, or those `checkpoint_every` names and
        the ones that the run itself needs (a stage's last step, the steps that PPO starts from)."""
        if self.checkpoint_every is None or step == self.steps(stage):
            return True
        return step % self.checkpoint_every == 0 or self.is_branch_point(stage, step)

    def is_branch_point(self, stage: str, step: int) -> bool:
        """Whether a branch of PPO starts from ``step``."""
        return stage == "sft" and step in (self.ppo_from or ())

    def to_settings(self) -> dict[str, Any]:
        """The settings as config.yaml holds them: tuples become lists."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, source: str = "config") -> TrackConfig:
        """A config of settings read from YAML or the command line; the rest keeps its default.

        Raises:
            OptionError: An unknown key (the valid ones are listed), a value of the wrong type or range.
        """
        return cls(**checked_types(settings, source=source))


def checked_types(settings: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Settings read from YAML or the command line under the names and with the types of :class:`TrackConfig`.

    Whether the values go together is not looked at: further settings may come from elsewhere.

    Raises:
        OptionError: An unknown key (the valid ones are listed), one given twice, a value of the wrong type.
    """
    known = [field.name for field in fields(TrackConfig)]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(f"{source}: unknown setting {key!r}; valid: {', '.join(known)}")
        if name in values:
            raise OptionError(f"{source}: {name} is given twice, with - and with _")
        values[name] = _convert(name, value, source)
    return values


def split_names(value: str | Iterable[Any]) -> tuple[str, ...]:
    """``"q, k,v"`` or ``["q", "k", "v"]`` as ``("q", "k", "v")``."""
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    return tuple(part.strip() for part in parts if part.strip())


def _convert(name: str, value: Any, source: str) -> Any:
    """``value`` as the type of the setting ``name``; YAML has 1e-6 as a string and a rank as a number."""
    hint = typing.get_type_hints(TrackConfig)[name]
    if value is None:
        if type(None) in typing.get_args(hint):
            return None
        raise OptionError(f"{source}: {name} must have a value")
    kinds = (hint, *typing.get_args(hint))
    if (names := tuple[str, ...]) in kinds or tuple[int, ...] in kinds:
        parts = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(parts, (str, list, tuple)):
            wanted = "names" if names in kinds else "whole numbers"
            raise OptionError(f"{source}: {name} must be a list of {wanted}, not {value!r}")
        texts = split_names(parts)
        return texts if names in kinds else tuple(_number(name, text, int, source) for text in texts)
    wanted_kind = next((kind for kind in (int, float) if kind in kinds), str)
    return _number(name, value, wanted_kind, source)


def _number(name: str, value: Any, wanted: type, source: str) -> Any:
    """``value`` as a number of type ``wanted``, or as a word where that is str."""
    fraction = wanted is int and isinstance(value, float) and not value.is_integer()
    if not isinstance(value, (bool, list, dict)) and not fraction:
        try:
            return wanted(value)
        except ValueError:
            pass
    kind_name = {int: "a whole number", float: "a number", str: "a word"}[wanted]
    raise OptionError(f"{source}: {name} must be {kind_name}, not {value!r}")


def read_config_file(path: Path | str) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        OptionError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise OptionError(f"{path}: must be a mapping of settings to values")
    return settings
