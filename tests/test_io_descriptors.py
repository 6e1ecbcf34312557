"""Checkpoints of more shards than a process may have open files: read, written, restored and resumed."""

from __future__ import annotations

import itertools
import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from restore_toys import tensors_of
from safetensors.torch import save_file

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io import outputs
from rlspec.io.index import CheckpointIndex
from rlspec.io.outputs import OutputFiles
from rlspec.io.stream import TensorStream, stream_pairs
from rlspec.io.writer import CheckpointWriter
from rlspec.restore import restore_checkpoint

SHARDS = 120
LIMIT = 48  # files beside those open before
NAME = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What the test runner holds open already is not the reader's or the writer's.
    held = {int(name) for name in os.listdir("/proc/self/fd")}
    free = (number for number in itertools.count() if number not in held)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, LIMIT, None)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def save(folder: Path, *, seed: int, shards: int = SHARDS) -> CheckpointIndex:
    """A matrix and a vector a layer, a layer a shard; or all of them in one file."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)
    layers = []
    for i in range(SHARDS):
        matrix = torch.randn(8, 8, generator=base) + 0.01 * torch.randn(8, 8, generator=generator)
        vector = torch.randn(8, generator=generator)
        layers.append({NAME.format(i): matrix, f"model.layers.{i}.input_layernorm.weight": vector})
    if shards == 1:
        save_file({n: t for layer in layers for n, t in layer.items()}, folder / "model.safetensors")
    else:
        weight_map = {}
        for i, layer in enumerate(layers):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file(layer, folder / file)
            weight_map |= dict.fromkeys(layer, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return CheckpointIndex.open(folder)


def restore(folder: Path, out: str, *, resume: bool = False) -> None:
    cache = folder / "cache"
    base, tuned = folder / "base", folder / "tuned"
    restore_checkpoint(base, tuned, folder / out, modules="q", cache_dir=cache, resume=resume)


@pytest.mark.usefixtures("few_descriptors")
def test_many_shards_are_read_and_held(tmp_path: Path) -> None:
    base, tuned = save(tmp_path / "base", seed=1), save(tmp_path / "tuned", seed=2)
    truth = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "tuned")
    held = [(s.entry.name, s.tensor) for s in TensorStream(base, workers=8)]
    assert len(held) == 2 * SHARDS and all(torch.equal(t, truth[0][name]) for name, t in held)
    for name, there, here in stream_pairs(base, tuned, list(truth[0])[::-1]):
        assert torch.equal(there, truth[0][name]) and torch.equal(here, truth[1][name])


@pytest.mark.usefixtures("few_descriptors")
def test_many_shards_are_restored_as_one_is(tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("tuned", 2)):
        save(tmp_path / name, seed=seed)
    restore(tmp_path, "out")
    for name, seed in (("base", 1), ("tuned", 2)):
        (tmp_path / name).rename(tmp_path / f"many {name}")
        save(tmp_path / name, seed=seed, shards=1)
    restore(tmp_path, "one")
    expected, found = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "out")
    assert expected.keys() == found.keys() and len(found) == 2 * SHARDS
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == SHARDS


@pytest.mark.usefixtures("few_descriptors")
def test_shards_are_written_in_turns_and_resumed(tmp_path: Path) -> None:
    """Rows of one shard after the other, so that every file is closed and opened again."""
    like = save(tmp_path / "in", seed=1)
    new = tensors_of(tmp_path / "in") | {NAME.format(i): torch.full((8, 8), float(i)) for i in range(SHARDS)}
    changed = {NAME.format(i): torch.float32 for i in range(SHARDS)}
    for stops in (True, False):
        with CheckpointWriter(
            tmp_path / "out", like, changed=changed, fingerprint="f", resume=True
        ) as writer:
            assert len(writer.pending) == (SHARDS if stops else SHARDS // 2)
            for first in (4, 0):
                for name in writer.pending[: SHARDS // 2 if stops else None]:
                    writer.put_rows(name, first, new[name][first : first + 4])
            if stops:
                while sum(1 for _ in (tmp_path / ".out.rlspec-partial/checkpoint").glob("m*")) < SHARDS // 2:
                    time.sleep(0.01)  # the copier is behind
            else:
                writer.commit()
    found = tensors_of(tmp_path / "out")
    assert found.keys() == new.keys() and all(torch.equal(found[name], new[name]) for name in new)


@pytest.mark.usefixtures("few_descriptors")
def test_files_that_stay_open_would_be_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(outputs, "_OPEN", 1000)
    for name, seed in (("base", 1), ("tuned", 2)):
        save(tmp_path / name, seed=seed)
    with pytest.raises(CheckpointError, match="Too many open files"):
        restore(tmp_path, "out")
    monkeypatch.undo()
    restore(tmp_path, "out", resume=True)
    assert len(tensors_of(tmp_path / "out")) == 2 * SHARDS


def test_threads_write_to_few_open_files(tmp_path: Path) -> None:
    """Bytes of every file from several threads; each file is exact though it is opened again and again."""
    files = OutputFiles()
    paths = [tmp_path / str(i) for i in range(30)]

    def write(worker: int) -> None:
        for number in range(20):
            for path in paths:
                with files.opened(path) as file:
                    file.write(4 * number + worker, bytes([16 * (worker + 1) + number % 16]))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(_descriptors(tmp_path)) <= 2 * (outputs._OPEN + len(threads))  # of 30 files
    for path in paths:
        files.finish(path)
        assert path.read_bytes() == bytes(
            16 * (worker + 1) + number % 16 for number in range(20) for worker in range(4)
        )
    assert not _descriptors(tmp_path) and len(list(tmp_path.iterdir())) == 30


def _descriptors(folder: Path) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder)):
                found.append(fd)
        except FileNotFoundError:  # the one that lists them
            pass
    return found


def test_a_file_closed_for_another_tells_what_the_disk_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_OPEN", 1)
    real = _C.OutputFile

    class Failing:
        def __init__(self, path: bytes, fresh: bool = True) -> None:
            self._file = real(path, fresh)

        def write(self, offset: int, data: bytes) -> None:
            self._file.write(offset, data)

        def sync(self) -> None:
            real(b"/nowhere/at/all")

    monkeypatch.setattr(_C, "OutputFile", Failing)
    files = OutputFiles()
    with files.opened(tmp_path / "first") as file:
        file.write(0, b"x")
    with pytest.raises(CheckpointError, match="first: cannot be written"), files.opened(tmp_path / "second"):
        pass
