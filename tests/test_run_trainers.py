"""Every setting of the trainers is a flag and a key of config.yaml, and each arrives."""

from __future__ import annotations

import typing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from rlspec.cli.flags import as_flags, flag
from rlspec.cli.main import main
from rlspec.errors import OptionError
from rlspec.jobs import track
from rlspec.run.config import FURTHER, OWN, TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.run.settings import stored_settings
from rlspec.run.trainers import CONFIGS, names
from rlspec.train import PPOConfig, SFTConfig

SETTINGS = [(stage, field.name) for stage, declared in CONFIGS.items() for field in fields(declared)]


def other_value(stage: str, name: str) -> Any:
    """A valid value that is not what a run without settings has."""
    hint = typing.get_type_hints(CONFIGS[stage])[name]
    before = getattr(getattr(TrackConfig(), stage), name)
    if typing.get_origin(hint) is typing.Literal:
        return next(value for value in typing.get_args(hint) if value != before)
    return before + 1 if hint is int else before / 2 or 0.25


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> TrackConfig:
    """The config that `rlspec track` would run."""
    seen: list[TrackConfig] = []
    monkeypatch.setattr(track, "run_track", lambda config, out, **_: seen.append(config))
    result = CliRunner().invoke(main, ["track", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (config,) = seen
    return config


@pytest.mark.parametrize(("stage", "name"), SETTINGS)
def test_each_setting_arrives_by_flag_and_by_file(
    stage: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = names(stage)[name], other_value(stage, name)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({key: value}))
    plain = asdict(getattr(TrackConfig(), stage))
    assert plain[name] != value
    for arguments in ((flag(key), str(value)), ("--config", str(file))):
        config = asked(monkeypatch, *arguments)
        assert asdict(getattr(config, stage)) == plain | {name: value}
        # And into the run's folder, from which it comes back.
        assert TrackConfig.from_settings(yaml.safe_load(yaml.safe_dump(config.to_settings()))) == config


def test_names_are_one_setting_s_each_but_for_what_both_stages_share() -> None:
    both = set(names("sft").values()) & set(names("ppo").values())
    assert both == {"micro_batch_size", "dtype", "seed"}
    for stage in CONFIGS:
        assert len(set(names(stage).values())) == len(fields(CONFIGS[stage]))


@pytest.mark.parametrize("model", ["embedded", "elsewhere"])
def test_what_is_not_given_is_the_preset_of_the_model(model: str) -> None:
    config = TrackConfig(model=model)
    for stage, declared in CONFIGS.items():
        preset = declared() if model == "embedded" else declared.paper()
        for each in FURTHER:
            for own, name in names(stage).items():
                if name == each.name:
                    assert getattr(getattr(config, stage), own) == getattr(preset, own)
    assert config.sft.micro_batch_size == (64 if model == "embedded" else 4)
    assert config.ppo.micro_batch_size == (64 if model == "embedded" else 2)


def test_settings_from_before_these_could_be_set_mean_what_they_meant(tmp_path: Path) -> None:
    settings = TrackConfig(model="/elsewhere", every=7, seed=3).to_settings()
    old = {each.name: settings[each.name] for each in OWN if each.name in settings}
    config = stored_settings(RunFolder.create(tmp_path / "run", old))
    shared: dict[str, Any] = {"learning_rate": 1e-6, "dtype": "auto", "seed": 3}
    assert config.sft == SFTConfig.paper(
        steps=300, batch_size=32, micro_batch_size=4, checkpoint_every=7, **shared
    )
    assert config.ppo == PPOConfig.paper(
        updates=20, turns_per_update=256, micro_batch_size=2, checkpoint_every=5, **shared
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("ppo_clip", 0.0), ("sft_warmup_ratio", 2.0), ("advantages", "best"), ("group_size", 1)],
)
def test_a_wrong_value_is_told_by_the_name_that_the_user_gave(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as error:
        TrackConfig.from_settings({name: value})
    assert str(error.value).startswith(f"{name}={value!r} must be ")
    command = main.get_command(click.Context(main), "track")
    assert command is not None
    assert as_flags(str(error.value), command).startswith(f"{flag(name)} {value!r} must be ")


@pytest.mark.parametrize(
    ("key", "closest"),
    [("ppo_epoch", "ppo_epochs"), ("advantage", "advantages"), ("learn_rate", "learning_rate")],
)
def test_an_unknown_key_is_told_with_the_closest_name(key: str, closest: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"{key}: 1\n")
    result = CliRunner().invoke(main, ["track", "--config", str(file)])
    assert result.exit_code == 2
    assert result.stderr == f"Error: {file}: unknown setting '{key}'; the closest is '{closest}'\n"
    with pytest.raises(OptionError, match=f"unknown setting '{key}'; the closest is "):
        TrackConfig(further={key: 1})


def test_a_changed_config_keeps_the_rest() -> None:
    config = TrackConfig.of({"ppo_clip": 0.3, "every": 7}).changed({"ppo_lam": 0.5, "deals": 9})
    assert (config.ppo.clip, config.ppo.lam, config.every, config.deals) == (0.3, 0.5, 7, 9)
    assert replace(config) == config


def test_help_begins_with_what_matters_first_and_leaves_the_finest_to_help_all() -> None:
    short, full = (CliRunner().invoke(main, ["track", option]).output for option in ("--help", "--help-all"))
    for each in (*OWN, *FURTHER):
        assert f"  {flag(each.name)} " in full or f"  {flag(each.name)}\n" in full, each.name
        assert (flag(each.name) + " " in short) != each.fine, each.name
        assert f"{each.heading}:\n" in short
    first = short.partition("Options:\n")[2].partition("\n\n")[0]
    shown = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert 8 <= len(shown) <= 13 and {"--model", "--out", "--config"} <= set(shown)
    assert short.index("Options:") < short.index("What is measured:") < short.index("SFT:")


def test_the_example_file_in_help_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = CliRunner().invoke(main, ["track", "--help"]).output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  A file for --config"))
    file = tmp_path / "settings.yaml"
    file.write_text("\n".join(lines[start + 1 :]) + "\n")
    config = asked(monkeypatch, "--config", str(file))
    assert (config.sft_steps, config.ppo_from, config.ppo.advantage) == (1000, (100, 1000), "grpo")
