"""Settings: defaults, files, flags, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlspec.errors import OptionError, RunFolderError
from rlspec.run.config import EMBEDDED_LEARNING_RATES, PAPER_LEARNING_RATES, TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.run.segments import Segment
from rlspec.run.settings import resolve_settings, stored_settings
from rlspec.run.values import read_config_file


def test_settings_survive_yaml() -> None:
    config = TrackConfig(modules=("q", "o"), rank="gap:0.2", ppo_from=(100,), learning_rate=1e-6, threads=2)
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
        ({"stages": ("sft", "dpo")}, "stages='sft,dpo': unknown stage 'dpo'; valid: sft, ppo, restore"),
        ({"stages": ("ppo", "restore")}, "stages='ppo,restore': restore needs sft, whose end it repairs"),
        ({"restore_modules": ()}, "restore_modules='' must be one or more names"),
        ({"stages": ()}, "stages='' must be one or more names"),
        ({"shifts": ("none", "none")}, "shifts='none,none' must be names that differ"),
        ({"engine": "fast"}, "engine='fast': unknown value; valid: delta, exact"),
        ({"trainer": "verl"}, "trainer='verl': unknown value; valid: rlspec, trl"),
        ({"dtype": "fp16"}, "dtype='fp16': unknown value; valid: auto, float32, bf16"),
        (
            {"ppo_from": (100, 650)},
            "ppo_from=100,650: 650 is no SFT step; there are those from 0 to sft_steps=300",
        ),
        ({"ppo_from": (-1,)}, "ppo_from=-1: -1 is no SFT step"),
        ({"ppo_from": (50, 50)}, "ppo_from='50,50' must be steps that differ"),
        ({"ppo_from": (50,), "stages": ("ppo",)}, "ppo_from=50 needs both stages"),
    ],
)
def test_values_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(OptionError) as error:
        TrackConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evry": 5}, "file: unknown setting 'evry'; the closest is 'every'"),
        ({"every": "often"}, "file: every must be a whole number, not 'often'"),
        ({"every": 2.5}, "file: every must be a whole number, not 2.5"),
        ({"every": float("nan")}, "file: every must be a whole number"),
        ({"every": None}, "file: every must have a value"),
        ({"every": True}, "file: every must be a whole number"),
        ({"modules": {"q": 1}}, "file: modules must be a list of names"),
        ({"ppo_from": "100,often"}, "file: ppo_from must be a whole number, not 'often'"),
        ({"ppo_from": [10.5]}, "file: ppo_from must be a whole number, not '10.5'"),
        ({"ppo_from": {"a": 1}}, "file: ppo_from must be a list of whole numbers, not {'a': 1}"),
        ({"ppo_from": True}, "file: ppo_from must be a list of whole numbers, not True"),
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
    config = TrackConfig(sft_steps=120, every=50, ppo_updates=7, ppo_every=3, ppo_from=(120,))
    assert [step for step in range(121) if config.is_event("sft", step)] == [0, 50, 100, 120]
    assert [step for step in range(8) if config.is_event("ppo", step)] == [0, 3, 6, 7]


@pytest.mark.parametrize("value", ["300, 100", [300, 100], ["100", "300"]])
def test_branch_points_are_read_as_a_list_and_put_in_order(value: object) -> None:
    assert TrackConfig.from_settings({"ppo_from": value}).ppo_from == (100, 300)
    assert TrackConfig.from_settings({"ppo_from": 0}).ppo_from == (0,)


def test_ppo_starts_from_where_the_model_is_known_to_lose_or_from_the_end() -> None:
    assert TrackConfig().ppo_from == (100, 300)
    assert TrackConfig(sft_steps=80).ppo_from == (80,)
    assert TrackConfig(model="elsewhere").ppo_from == (300,)
    assert TrackConfig(stages=("ppo",)).ppo_from == TrackConfig(stages=("sft",)).ppo_from == ()


def test_a_run_is_a_tree_of_segments() -> None:
    trunk = Segment("sft", "sft", 300)
    both = ("sft", "ppo")
    several = TrackConfig(stages=both, ppo_from=(300, 100), ppo_updates=7).segments
    branches = [Segment(f"ppo-from-{step}", "ppo", 7, ("sft", step)) for step in (100, 300)]
    assert several == (trunk, *branches)
    # A branch that is the only one keeps the name that it has in runs from before there were several.
    one = TrackConfig(stages=both, ppo_from=(100,)).segments
    assert one == (trunk, Segment("ppo", "ppo", 20, ("sft", 100)))
    assert TrackConfig(stages=("ppo",)).segments == (Segment("ppo", "ppo", 20),)
    assert TrackConfig(stages=("sft",)).segments == (trunk,)


def test_the_embedded_model_is_restored_at_the_end_others_if_asked_to() -> None:
    restored = Segment("restore", "restore", 1, ("sft", 300), "restoration")
    assert TrackConfig().stages == ("sft", "ppo", "restore") and TrackConfig().segments[-1] == restored
    assert TrackConfig(model="elsewhere").stages == ("sft", "ppo")
    asked = TrackConfig(model="elsewhere", stages=("restore", "sft"), checkpoint_every=1000)
    assert asked.segments == (Segment("sft", "sft", 300), restored)
    assert asked.is_branch_point("sft", 300) and asked.keeps_checkpoint("restore", 1)
    assert [step for step in range(2) if asked.is_event("restore", step)] == [0, 1]


def test_a_branch_may_start_from_any_step_which_is_then_measured() -> None:
    config = TrackConfig(sft_steps=120, every=50, ppo_from=(30,), ppo_updates=31, ppo_every=10)
    assert [step for step in range(121) if config.is_event("sft", step)] == [0, 30, 50, 100, 120]
    assert [step for step in range(32) if config.is_event("ppo", step)] == [0, 10, 20, 30, 31]


def test_thinned_checkpoints_keep_what_the_run_needs() -> None:
    config = TrackConfig(sft_steps=120, every=10, checkpoint_every=40, ppo_from=(50,))
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
    # Either alone is wrong: there is no such step.
    config = resolve_settings({"sft_steps": 400}, {"ppo_from": 390})
    assert (config.sft_steps, config.ppo_from) == (400, (390,))
    config = resolve_settings({"ppo_from": 390}, {"sft_steps": 400})
    assert (config.sft_steps, config.ppo_from) == (400, (390,))
    with pytest.raises(OptionError, match="ppo_from=390: 390 is no SFT step"):
        resolve_settings({}, {"ppo_from": 390})
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


def test_a_setting_that_differs_is_told_before_that_it_fits_no_longer(tmp_path: Path) -> None:
    """Fewer SFT steps than the run has would leave its branch without a step to start from."""
    out = tmp_path / "run"
    RunFolder.create(out, TrackConfig().to_settings()).close()
    with pytest.raises(RunFolderError, match="other settings: sft_steps=300, not 200$"):
        resolve_settings({"sft_steps": 200}, {}, out=out, resume=True)


@pytest.mark.parametrize(("ppo_from", "found"), [(None, (300,)), (100, (100,))])
def test_settings_from_before_there_were_branches_mean_what_they_meant(
    ppo_from: int | None, found: tuple[int, ...], tmp_path: Path
) -> None:
    folder = RunFolder.create(
        tmp_path / "run", {**TrackConfig(stages=("sft", "ppo")).to_settings(), "ppo_from": ppo_from}
    )
    config = stored_settings(folder)
    assert config.ppo_from == found
    assert [segment.id for segment in config.segments] == ["sft", "ppo"]


def test_a_relative_model_folder_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_settings({"model": "mine"}, {}).model == str(tmp_path / "mine")
