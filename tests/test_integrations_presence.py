"""Processes of which not all have the callback, or not the same one: told, and the training goes on."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from integration_toys import loop, losses, plain_trainer
from process_toys import held, listening, together, toy_with_uneven_layers
from torch.distributed import distributed_c10d

from rlspec.integrations import presence
from rlspec.integrations.presence import Presence
from rlspec.integrations.transformers import SpectralCallback
from rlspec.spectra.processes import Processes

ABSENT = "only some of the 2 processes have the callback; add it in all of them, not in the first one alone"


def trains(number: int, out: Path, trainings: list[list[int]], asked: bool) -> None:
    """One training after the other, with the callback in those processes alone that it names."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RLSPEC_CACHE=str(out / "cache"))
    presence.PATIENCE_S = 4.0
    told = listening()
    if not asked:
        presence._store = lambda: None
    found = []
    for at, those in enumerate(trainings):
        callback = SpectralCallback(every=2, out=out / str(at))
        called = [callback] if number in those else []
        trainer = plain_trainer(out / "t", called, ddp_backend="gloo")
        trainer.train()
        lines = [line["loss"] for line in losses(trainer) if "loss" in line]
        found.append([callback.disabled, [record.step for record in callback.records], lines, told[:]])
        told.clear()
    (out / f"{number}.json").write_text(json.dumps(found))


def test_a_callback_in_some_processes_alone_is_disabled_and_one_in_all_is_not(tmp_path: Path) -> None:
    trainings = [[0, 1], [0], [1], [0, 1], []]
    assert together(2, trains, tmp_path, trainings, True) == [0, 0]
    ran = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    for number in range(2):
        for those, (disabled, steps, lines, told) in zip(trainings, ran[number], strict=True):
            some = number in those and len(those) == 1
            assert disabled == (ABSENT if some else None)
            assert steps == ([0, 2, 4] if those == [0, 1] else [])
            assert len(set(lines)) == 4 and lines == ran[number][-1][2]  # as without any
            assert told == (
                [f"tracking of the spectra ends here, the training goes on: {ABSENT}"] if some else []
            )


def test_without_asking_the_training_would_not_end(tmp_path: Path) -> None:
    assert together(2, trains, tmp_path, [[0]], False, timeout=10.0) != [0, 0]


def comes_late(number: int, out: Path) -> None:
    processes, found = Processes.of_training(), []
    if number == 2:
        distributed_c10d._get_default_store().wait(["closed"])
    for patience in (0.5, 10.0):
        presence.PATIENCE_S = patience
        found.append(presence.ask(processes).all_here)
        distributed_c10d._get_default_store().set("closed", "")
        dist.barrier()
    (out / f"{number}.json").write_text(json.dumps(found))


def test_one_that_comes_late_is_told_what_the_others_were(tmp_path: Path) -> None:
    """Else it would wait for them at a gather; the next time all find each other again."""
    assert together(4, comes_late, tmp_path) == [0] * 4
    for number in range(4):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == [False, True]


@pytest.mark.parametrize("kind", ["file", "hash", "tcp"])
def test_any_store_will_do(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {
        "file": lambda: dist.FileStore(str(tmp_path / "store"), 2),
        "hash": dist.HashStore,
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    }
    store = dist.PrefixStore("default_pg", made[kind]())
    store.set_timeout(datetime.timedelta(seconds=0.2))  # half of which one waits
    monkeypatch.setattr(presence, "_store", lambda: store)
    monkeypatch.setattr(presence, "_last", 0)
    assert presence.ask(Processes(0, 2)) == Presence(all_here=False, speaks=True)
    store.add("rlspec/callback/2/signed", 1)  # the other one
    assert presence.ask(Processes(1, 2)) == Presence(all_here=True, speaks=False)
    monkeypatch.setattr(
        presence, "_last", 0
    )  # as torchrun starts a process again, at a store that it may keep
    assert presence.ask(Processes(0, 2)).all_here
    monkeypatch.setattr(presence, "_last", 0)  # of a process that was not there at first, and comes late now
    store.set("rlspec/callback/2", "absent")
    store.add("rlspec/callback/3/signed", 1)
    assert presence.ask(Processes(1, 2)) == Presence(all_here=True, speaks=False)
    store.add("rlspec/callback/4/signed", 2)  # of processes that were killed before the decision
    assert presence.ask(Processes(1, 2)) == Presence(all_here=True, speaks=False)


GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "every": ({"every": 2}, {"every": 3}, "every= is 2 in process 0 and 3 in process 1"),
    "rank": ({"rank": 0.2}, {"rank": 3}, "rank= is '0.2' in process 0 and '3' in process 1"),
    "modules": (
        {"modules": "q,k"},
        {"modules": "q"},
        "modules= is ('q', 'k') in process 0 and ('q',) in process 1",
    ),
    "evaluate": (
        {"evaluate": lambda model: {}},
        {},
        "evaluate= is given in process 0 and not given in process 1",
    ),
    "out": ({"out": "out"}, {}, "out= is given in process 0 and not given in process 1"),
}


def differ(number: int, out: Path, name: str) -> None:
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    os.chdir(out)
    told = listening()
    callback = SpectralCallback(**{"every": 2, **GIVEN[name][number]})  # type: ignore[arg-type]
    loop(held(toy_with_uneven_layers(), "fsdp2", 2), callback)
    dist.barrier()
    assert callback.records == []
    (out / f"{number}.json").write_text(json.dumps([callback.disabled, told]))


@pytest.mark.parametrize("name", GIVEN)
def test_different_arguments_are_told_by_name(name: str, tmp_path: Path) -> None:
    assert together(2, differ, tmp_path, name) == [0, 0]
    reason = f"{GIVEN[name][2]}; give all the same"
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == [reason, [f"tracking of the spectra ends here, the training goes on: {reason}"]]
    assert second == [reason, []]
