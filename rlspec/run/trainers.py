"""The trainers' own settings under the names that they have in config.yaml and on the command line."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from rlspec.errors import OptionError
from rlspec.settings import Setting, setting_of
from rlspec.train.config import PPOConfig, SFTConfig

TrainerConfig = SFTConfig | PPOConfig
CONFIGS: dict[str, type[SFTConfig] | type[PPOConfig]] = {"sft": SFTConfig, "ppo": PPOConfig}
_HEADINGS = {"sft": "SFT", "ppo": "Reinforcement learning"}

# A trainer's setting -> its name here, where that is not <stage>_<setting>. Both stages share some.
_NAMES = {
    "sft": {
        "batch_size": "batch_size",
        "micro_batch_size": "micro_batch_size",
        "learning_rate": "learning_rate",
        "dtype": "dtype",
        "checkpoint_every": "every",
        "seed": "seed",
    },
    "ppo": {
        "turns_per_update": "turns_per_update",
        "micro_batch_size": "micro_batch_size",
        "advantage": "advantages",
        "group_size": "group_size",
        "dtype": "dtype",
        "checkpoint_every": "ppo_every",
        "seed": "seed",
    },
}


def names(stage: str) -> dict[str, str]:
    """Setting of the stage's trainer -> its name here, for every one of them."""
    return {
        each.name: _NAMES[stage].get(each.name, f"{stage}_{each.name}") for each in fields(CONFIGS[stage])
    }


def further_settings(own: Collection[str]) -> list[Setting]:
    """The trainers' settings that are not among ``own``, which a run declares itself."""
    found = []
    for stage, declared in CONFIGS.items():
        hints, paper = typing.get_type_hints(declared), declared.paper()
        for each in fields(declared):
            if (name := names(stage)[each.name]) in own:
                continue
            offered = replace(setting_of(each, hints[each.name]), name=name, heading=_HEADINGS[stage])
            if (other := getattr(paper, each.name)) != each.default:
                offered = replace(
                    offered, default_told=f"{each.default} for the embedded model, else {other}"
                )
            found.append(offered)
    return found


def trainer_config(stage: str, values: Mapping[str, Any], *, embedded: bool) -> TrainerConfig:
    """The settings of a stage's trainer: the embedded model's, or the paper's for any other, changed as ``values`` say.

    Args:
        values: by their names here; those of None change nothing, those of another stage neither.

    Raises:
        OptionError: A value out of range.
    """
    preset = CONFIGS[stage]() if embedded else CONFIGS[stage].paper()
    known = names(stage)
    changes = {name: values[known[name]] for name in known if values.get(known[name]) is not None}
    try:
        return replace(preset, **changes)
    except OptionError as error:
        name, _, rest = str(error).partition("=")
        raise OptionError(f"{known[name]}={rest}") from None
