"""Settings: defaults, files, flags, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlspec.errors import OptionError, RunFolderError
from rlspec.run.config import EMBEDDED_LEARNING_RATES, PAPER_LEARNING_RATES, TrackConfig, read_config_file
from rlspec.run.folder import RunFolder
from rlspec.run.settings import resolve_settings


def test_settings_survive_yaml() -> None:
    config = TrackConfig(modules=("q", "o"), rank="gap:0.2", ppo_from=100, learning_rate=1e-6, threads=2)
    text = yaml.safe_dump(config.to_settings())
    assert TrackConfig.from_settings(yaml.safe_load(text)) == config


def test_learning_rates_follow_the_model() -> None:
    embedded, other = TrackConfig(), TrackConfig(model="elsewhere")
    assert (embedded.learning_rate, embedded.ppo_learning_rate) == EMBEDDED_LEARNING_RATES
    assert (other.learning_rate, other.ppo_learning_rate) == PAPER_LEARNING_RATES
    assert TrackConfig(model="elsewhere", learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"sft_steps": -1}, "sft_steps=-1 must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be greater than 0"),
        ({"stages": ("sft", "dpo")}, "stages='sft,dpo': unknown stage 'dpo'; valid: sft, ppo"),
        ({"stages": ()}, "stages='' must be one or more names"),
        ({"shifts": ("none", "none")}, "shifts='none,none' must be names that differ"),
        ({"engine": "fast"}, "engine='fast': unknown value; valid: delta, exact"),
        ({"dtype": "fp16"}, "dtype='fp16': unknown value; valid: auto, float32, bf16"),
        ({"ppo_from": 75}, "ppo_from=75 must be a tracked SFT step: a multiple of every=50"),
        ({"ppo_from": 650}, "ppo_from=650 must be a tracked SFT step"),
        ({"ppo_from": 50, "stages": ("ppo",)}, "ppo_from=50 needs both stages"),
    ],
)
def test_values_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        TrackConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evry": 5}, "file: unknown setting 'evry'; valid: model, task, stages, every"),
        ({"every": "often"}, "file: every must be a whole number, not 'often'"),
        ({"every": 2.5}, "file: every must be a whole number, not 2.5"),
        ({"every": float("nan")}, "file: every must be a whole number"),
        ({"every": None}, "file: every must have a value"),
        ({"every": True}, "file: every must be a whole number"),
        ({"modules": {"q": 1}}, "file: modules must be a list of names"),
        ({"ppo-from": 10, "ppo_from": 20}, "file: ppo_from is given twice"),
    ],
)
def test_wrong_settings_in_a_file(settings: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        TrackConfig.from_settings(settings, source="file")
    assert message in str(error.value)


def test_file_values_are_converted() -> None:
    settings = {"sft-steps": "7", "learning_rate": "1e-6", "modules": "q, k", "rank": 0.25, "threads": None}
    config = TrackConfig.from_settings(settings)
    assert (config.sft_steps, config.learning_rate, config.modules) == (7, 1e-6, ("q", "k"))
    assert (config.rank, config.threads) == ("0.25", None)


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2]", "must be a mapping"), ("a: [", "not YAML"), (None, "No such")]
)
def test_unreadable_config_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_config_file(path)


def test_events_are_the_start_the_multiples_and_the_end() -> None:
    config = TrackConfig(sft_steps=120, every=50, ppo_updates=7, ppo_every=3)
    assert [step for step in range(121) if config.is_event("sft", step)] == [0, 50, 100, 120]
    assert [step for step in range(8) if config.is_event("ppo", step)] == [0, 3, 6, 7]


def test_thinned_checkpoints_keep_what_the_run_needs() -> None:
    config = TrackConfig(sft_steps=120, every=10, checkpoint_every=40, ppo_from=50)
    events = [step for step in range(121) if config.is_event("sft", step)]
    assert [step for step in events if config.keeps_checkpoint("sft", step)] == [0, 40, 50, 80, 120]


@pytest.mark.parametrize(
    ("shifts", "ood"),
    [
        (("none", "both"), "both"),
        (("none", "rule", "both"), "both"),
        (("rule", "none"), "rule"),
        (("none",), None),
    ],
)
def test_ood_shift(shifts: tuple[str, ...], ood: str | None) -> None:
    assert TrackConfig(shifts=shifts).ood_shift == ood


def test_flags_win_over_the_file_and_the_file_over_defaults() -> None:
    config = resolve_settings({"every": 10}, {"every": 20, "sft-steps": 30})
    assert (config.every, config.sft_steps, config.deals) == (10, 30, TrackConfig().deals)


def test_flags_and_file_are_merged_before_they_are_checked() -> None:
    # Either alone is wrong: with the default of 50 between measurements, or with no step to start from.
    config = resolve_settings({"every": 30}, {"ppo_from": 90})
    assert (config.every, config.ppo_from) == (30, 90)
    config = resolve_settings({"ppo_from": 90}, {"every": 30})
    assert (config.every, config.ppo_from) == (30, 90)
    with pytest.raises(OptionError, match="ppo_from=90 must be a tracked SFT step: a multiple of every=50"):
        resolve_settings({}, {"ppo_from": 90})
    # What the file leaves to the model goes by the model that the flags name.
    config = resolve_settings({"model": "elsewhere"}, {"model": "embedded", "learning_rate": None})
    assert config.learning_rate == PAPER_LEARNING_RATES[0]


@pytest.mark.parametrize(
    ("flags", "from_file", "source"),
    [({}, {"evry": 5}, "settings.yaml"), ({"every": "often"}, {"every": 5}, "command line")],
)
def test_a_wrong_setting_is_told_with_where_it_comes_from(flags: dict, from_file: dict, source: str) -> None:
    with pytest.raises(OptionError, match=f"^{source}: "):
        resolve_settings(flags, from_file, config_file=Path("settings.yaml"))


def test_resume_takes_the_run_s_own_settings_and_refuses_others(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", TrackConfig(sft_steps=10, every=5).to_settings())
    resumed = resolve_settings({"every": 5}, {}, out=folder.path, resume=True)
    assert (resumed.sft_steps, resumed.every) == (10, 5)
    with pytest.raises(RunFolderError) as error:
        resolve_settings({"every": 7}, {"modules": "q"}, out=folder.path, resume=True)
    assert "every=5, not 7" in str(error.value)
    assert "modules='q,k,v', not 'q'" in str(error.value)


def test_resume_needs_out() -> None:
    with pytest.raises(OptionError, match="resume=True needs out="):
        resolve_settings({}, {}, resume=True)


def test_a_relative_model_folder_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_settings({"model": "mine"}, {}).model == str(tmp_path / "mine")
