"""What arrives in the trainer's own loggers: numbers, at the trainer's step, a few names an event."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration_toys import plain_trainer

from rlspec.integrations.caller import LOGGED
from rlspec.integrations.transformers import SpectralCallback
from rlspec.run.rows import mean

pytestmark = pytest.mark.usefixtures("own_cache")


def trains(folder: Path, logger: str) -> dict[int, dict[str, float]]:
    """Train with a logger; all that the callback should have told it, by step and the names that the logger gives."""
    callback = SpectralCallback(every=2, evaluate=lambda model: {"ood": [True, False]})
    trainer = plain_trainer(folder, [callback], report_to=logger)
    trainer.train()
    assert callback.disabled is None and callback.unscored is None
    found = {}
    for record in callback.records:
        means = {f"train/{name}": mean(row[column] for row in record.rows) for name, column in LOGGED.items()}
        found[record.step] = means | {"train/spectra/score/ood": 0.5}
    assert list(found) == [0, 2, 4] and found[4]["train/spectra/delta_relative"] > 1e-3
    return found


def ours(lines: list[dict[str, Any]], step: str) -> dict[int, dict[str, float]]:
    """The lines that have names of ours, by step, without what else the logger puts into every line."""
    mine = [line for line in lines if any("spectra" in name for name in line)]
    found = {line[step]: {name: line[name] for name in line if "spectra" in name} for line in mine}
    assert len(found) == len(mine)
    return found


def records(file: Path) -> Iterator[bytes]:
    """What a file of W&B holds, in LevelDB's log format: blocks of 32 KiB, each with whole pieces of records."""
    data, at, record = file.read_bytes(), 7, b""  # after a magic number
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left  # no piece begins there
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    told = trains(tmp_path / "trainer", "wandb")
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    lines = []
    for record in map(Record.FromString, records(file)):
        items = record.history.item
        lines.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    assert ours(lines, "train/global_step") == told
    assert all(isinstance(value, (int, float)) for line in told.values() for value in line.values())
    assert [line["train/global_step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    told = trains(tmp_path / "trainer", "trackio")
    (run,) = SQLiteStorage.get_runs("huggingface")
    lines = SQLiteStorage.get_logs("huggingface", run)
    assert ours(lines, "train/global_step") == told
