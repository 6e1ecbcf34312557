"""The main job on a tiny random model: rows, files, summary, stages and kinds of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file
from track_toys import arguments, invoke
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
)

from rlspec.models.vocabulary import make_tokenizer
from rlspec.run.folder import RunFolder
from rlspec.tasks import mcnemar

pytestmark = pytest.mark.usefixtures("cache")


def test_rows_of_a_run(finished: tuple[RunFolder, Result]) -> None:
    folder, _ = finished
    events = [("sft", 0), ("sft", 5), ("sft", 10), ("sft", 15), ("sft", 20), ("sft", 22)]
    events += [("ppo", 0), ("ppo", 2), ("ppo", 4), ("ppo", 6)]
    metrics = folder.metrics()
    assert [(row["stage"], row["step"]) for row in metrics] == events
    axis = [row["global_step"] for row in metrics]
    assert axis[:7] == [0, 5, 10, 15, 20, 22, 22]
    assert sorted(axis) == axis and len(set(axis)) == len(axis) - 1
    matrices = 2 * 3  # layers, q k v
    assert [(row["stage"], row["step"]) for row in folder.spectra()] == [
        e for e in events for _ in range(matrices)
    ]
    assert [(row["stage"], row["step"], row["shift"]) for row in folder.evals()] == [
        (*event, shift) for event in events for shift in ("none", "both")
    ]
    for row in metrics:
        assert {"id_accuracy", "id_n", "id_low", "id_high", "ood_accuracy", "ood_shift"} <= row.keys()
        assert {"seconds_training", "seconds_tracking", "seconds_evaluating", "seconds_kl"} <= row.keys()
    assert metrics[0]["kl_base_nats_per_token"] == pytest.approx(0, abs=1e-9)
    assert metrics[5]["kl_base_nats_per_token"] > 1e-4
    for name in ("seconds_training", "seconds_tracking", "seconds_evaluating", "seconds_wall"):
        column = [row[name] for row in metrics]
        assert sorted(column) == column
    assert all(len(row["outcomes"]) == row["n"] == 6 for row in folder.evals())


def test_files_of_a_run(finished: tuple[RunFolder, Result], model: Path) -> None:
    folder, result = finished
    settings = yaml.safe_load(folder.config_path.read_text())
    assert (
        settings["model"] == str(model)
        and settings["sft_steps"] == 22
        and settings["modules"] == ["q", "k", "v"]
    )
    assert folder.report_path.stat().st_size > 0
    for segment in ("sft", "ppo"):
        events = folder.tensorboard_dir / segment
        assert next(path.name for path in events.iterdir()).startswith("events.out.tfevents")
    assert not list((folder.path / "resume").rglob("*.pt"))
    checkpoint = folder.checkpoint_dir("ppo", 6)
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == len(make_tokenizer())
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (model, checkpoint))
    assert not torch.equal(base.lm_head.weight, tuned.lm_head.weight)
    assert "of the wall time" in result.stdout and str(folder.report_path) in result.stdout
    share = folder.summary()["tracking_share"]
    assert share == folder.metrics()[-1]["seconds_tracking"] / folder.metrics()[-1]["seconds_wall"]


def test_summary_pairs_the_outcomes(finished: tuple[RunFolder, Result]) -> None:
    folder, _ = finished
    outcomes = {
        (row["stage"], row["step"]): [bit == "1" for bit in row["outcomes"]]
        for row in folder.evals()
        if row["shift"] == "both"
    }
    test = folder.summary()["tests"]["sft_end_to_ppo_end"]["both"]
    wanted = mcnemar(outcomes["sft", 22], outcomes["ppo", 6])
    assert (test["gained"], test["lost"], test["p_value"]) == (wanted.gained, wanted.lost, wanted.p_value)


def test_ppo_from_an_sft_checkpoint(finished: tuple[RunFolder, Result], model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    changes = {"ppo_from": 5, "sft_steps": 10, "ppo_updates": 1, "checkpoint_every": 1000}
    result = invoke(*arguments(model, folder.path, **changes))
    assert result.exit_code == 0, result.output
    rows = {(row["stage"], row["step"]): row for row in folder.metrics()}
    start, origin = rows["ppo", 0], rows["sft", 5]
    same = ("id_accuracy", "ood_accuracy", "kl_base_nats_per_token")
    assert [start[name] for name in same] == [origin[name] for name in same]
    assert start["global_step"] == origin["global_step"] == 5
    checkpoints = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert checkpoints == ["ppo-1", "sft-0", "sft-10", "sft-5"]
    spectra = {
        (row["stage"], row["step"]): row["delta_frobenius"]
        for row in folder.spectra()
        if row["name"] == folder.spectra()[0]["name"]
    }
    assert spectra["ppo", 0] == spectra["sft", 5] != spectra["sft", 10]
    assert set(folder.summary()["tests"]) == {
        "sft_peak_to_sft_end",
        "sft_peak_to_ppo_start",
        "sft_end_to_ppo_end",
        "ppo_start_to_ppo_end",
    }


def test_ppo_alone_and_further_shifts(model: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = tmp_path / "settings.yaml"
    config.write_text("stages: ppo\nshifts: [none, rule, both]\nppo-updates: 3\n")
    flags = {"ppo_updates": 1, "config": config, "engine": "exact"}
    assert invoke(*arguments(model, folder.path, **flags)).exit_code == 0
    rows = folder.metrics()
    assert [(row["stage"], row["step"]) for row in rows] == [("ppo", 0), ("ppo", 1)]
    assert rows[0]["global_step"] == 0 and "rule_accuracy" in rows[1] and rows[1]["ood_shift"] == "both"
    assert {row["engine"] for row in folder.spectra()} == {"exact"}
    assert set(folder.summary()["tests"]) == {"ppo_start_to_ppo_end"}


_ONE_STEP: dict[str, Any] = {
    "stages": "sft",
    "sft_steps": 1,
    "every": 1,
    "deals": 2,
    "turns": 1,
    "shifts": "none",
}


_FUSED = {
    "gpt_neox": lambda sizes: GPTNeoXConfig(**sizes, intermediate_size=24, max_position_embeddings=256),
    "bloom": lambda sizes: BloomConfig(**sizes),
    "falcon": lambda sizes: FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2),
    "falcon of one key": lambda sizes: FalconConfig(**sizes, multi_query=True),
}


def _queries(kind: str, fused: torch.Tensor) -> torch.Tensor:
    """The query rows of a query_key_value (rows, 16) of four heads of four, as each architecture orders them."""
    if kind == "falcon":
        return fused.view(2, 4, 4, 16)[:, :2]  # two groups: two queries, a key, a value
    if kind == "falcon of one key":
        return fused[:16]
    return fused.view(4, 3, 4, 16)[:, 0]


@pytest.mark.parametrize("kind", _FUSED)
def test_models_with_a_fused_query_key_value_are_tracked(kind: str, tmp_path: Path) -> None:
    """Only their config.json says how the heads lie in it; what moved is held against the saved weights."""
    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    for name in ("bos", "eos", "pad"):
        sizes[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(_FUSED[kind](sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = invoke(*arguments(folder, tmp_path / "run", **_ONE_STEP))
    assert result.exit_code == 0, result.output
    run = RunFolder(tmp_path / "run")
    before, after = (
        load_file(where / "model.safetensors") for where in (folder, run.checkpoint_dir("sft", 1))
    )
    (name,) = (name for name in before if name.endswith("query_key_value.weight"))
    change = _queries(kind, after[name].double()) - _queries(kind, before[name].double())
    (row,) = (row for row in run.spectra() if row["step"] == 1 and row["module"] == "q")
    assert change.norm() > 0
    assert row["delta_frobenius"] == pytest.approx(float(change.norm()), rel=1e-5)


def test_layers_that_are_not_tracked_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlspec.spectra.basis.partly_found", lambda *_: "only 1 of 2 layers hold q, k, v: 1")
    result = invoke(*arguments(model, tmp_path / "run", **_ONE_STEP))
    assert (
        "only 1 of 2 layers hold q, k, v: 1; the other layers are not tracked" in result.output.splitlines()
    )


def test_the_factors_wait_on_the_host(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a device's memory would be theirs before the training has asked for any of it."""

    class Seen(Exception):
        pass

    def started(*arguments: Any) -> None:
        raise Seen(arguments[3].factors)

    monkeypatch.setattr("rlspec.jobs.track.EventRecorder", started)
    with pytest.raises(Seen, match="^host$"):
        invoke(*arguments(model, tmp_path / "run", **_ONE_STEP))
