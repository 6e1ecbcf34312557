"""The checkpoint writer: bytes as they were, changed tensors in their place, and nothing half-done under its name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from restore_toys import save_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from writer_toys import INDEX, QUERIES, TENSORS, content, load, make, new, partial, write

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.index import CheckpointIndex
from rlspec.io.writer import CheckpointWriter
from rlspec.restore.target import Target


@pytest.mark.parametrize("shards", [1, 3])
def test_unchanged_is_byte_identical(shards: int, tmp_path: Path) -> None:
    like = make(tmp_path / "in", shards=shards)
    assert write(tmp_path / "deep" / "er" / "out", like, {}) == tmp_path / "deep" / "er" / "out"
    assert content(tmp_path / "deep" / "er" / "out") == content(tmp_path / "in")
    assert list((tmp_path / "deep" / "er").iterdir()) == [tmp_path / "deep" / "er" / "out"]
    assert (tmp_path / "in" / INDEX).stat().st_ino != (tmp_path / "deep" / "er" / "out" / INDEX).stat().st_ino


def test_changed_tensors(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    before = content(tmp_path / "in")
    out = write(tmp_path / "out", like, QUERIES | {"scalar": torch.bfloat16, "empty": torch.bfloat16})
    there, here = load(tmp_path / "in"), load(out)
    assert list(here) == list(there)
    for name, tensor in here.items():
        changed = name in QUERIES or name in ("scalar", "empty")
        assert torch.equal(tensor, new(name) if changed else there[name]), name
    # Nothing else differs: headers, order, metadata, index, the other files.
    for name, entry in CheckpointIndex.open(out).tensors.items():
        old = like.tensors[name]
        assert (entry.start, entry.end, entry.shard.name) == (old.start, old.end, old.shard.name)
    after = content(out)
    assert {n for n in before if before[n] != after[n]} <= {n for n in before if n.endswith(".safetensors")}
    for name in (n for n in before if n.endswith(".safetensors")):
        start = min(e.start for e in like.tensors.values() if e.shard.name == name)
        assert before[name][:start] == after[name][:start] and before[name] != after[name]
    assert content(tmp_path / "in") == before


def test_put_the_same_gives_the_same_bytes(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    old = load(tmp_path / "in")
    with CheckpointWriter(
        tmp_path / "out", like, changed=dict.fromkeys(TENSORS, torch.bfloat16), fingerprint=""
    ) as writer:
        for name in reversed(writer.pending):
            if TENSORS[name] and TENSORS[name][0] > 10:
                for first in (20, 0, 10):
                    last = {0: 10, 10: 20, 20: None}[first]
                    writer.put_rows(name, first, old[name][first:last])
            else:
                writer.put(name, old[name])
        writer.commit()
    assert content(tmp_path / "out") == content(tmp_path / "in")


def test_another_dtype(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    out = write(tmp_path / "out", like, dict.fromkeys(QUERIES, torch.float32))
    there, here = load(tmp_path / "in"), load(out)
    assert set(here) == set(there)
    for name, tensor in here.items():
        assert torch.equal(tensor, new(name, torch.float32) if name in QUERIES else there[name])
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file, safe_open(tmp_path / "in" / path.name, "pt") as original:
            assert file.metadata() == original.metadata() == {"format": "pt", "é": "ü"}
            assert set(file.keys()) == set(original.keys())
        order = [e.name for e in sorted(CheckpointIndex.open(path).tensors.values(), key=lambda e: e.start)]
        expected = [e for e in like.tensors.values() if e.shard.name == path.name]
        assert order == [e.name for e in sorted(expected, key=lambda e: e.start)]
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == json.loads((tmp_path / "in" / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in here.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in here.values())


def test_transformers_loads_it(tmp_path: Path) -> None:
    save_model(tmp_path / "in", "tied llama", shard="20KB")
    like = CheckpointIndex.open(tmp_path / "in")
    name = "model.layers.1.self_attn.q_proj.weight"
    matrix = torch.randn(64, 64)
    with CheckpointWriter(tmp_path / "out", like, changed={name: torch.float32}, fingerprint="") as writer:
        writer.put(name, matrix)
        writer.commit()
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "in").state_dict()
    assert torch.equal(state[name], matrix)
    assert all(torch.equal(t, original[n]) for n, t in state.items() if n != name)
    assert "lm_head.weight" not in CheckpointIndex.open(tmp_path / "out").tensors  # tied weights stay tied


def test_a_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "diary.txt").write_text("private")
    like = CheckpointIndex.open(tmp_path / "weights.safetensors")
    with CheckpointWriter(tmp_path / "out", like, changed={"b": torch.float32}, fingerprint="") as writer:
        assert writer.pending == ("b",)
        writer.put("b", torch.ones(2))
        writer.commit()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert torch.equal(load(tmp_path / "out")["b"], torch.ones(2))


def test_what_cannot_be_resumed_leaves_nothing(tmp_path: Path) -> None:
    """Nothing finished, or not to be kept; but what someone else put into the folder stays, and the folder then."""
    like = make(tmp_path / "in")
    everything = dict.fromkeys(TENSORS, torch.bfloat16)
    out = tmp_path / "out"
    CheckpointWriter(out, like, changed=everything, fingerprint="f").close()
    assert not partial(out).exists()
    for keep in (True, False):
        scalar = {"scalar": torch.bfloat16}
        writer = CheckpointWriter(out, like, changed=scalar, fingerprint="f", resume=not keep)
        for future in list(writer._copied):
            future.result()
        (partial(out) / "mine.txt").write_text("notes")
        writer.close(keep=keep)
        writer.close(keep=False)  # it is another's by now
        assert (partial(out) / "state.json").exists() == (partial(out) / "checkpoint").exists() == keep
        assert writer.resumable and (partial(out) / "mine.txt").read_text() == "notes"


@pytest.mark.parametrize("links", [False, True])
def test_overwriting(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:  # a file system that cannot swap two names
        monkeypatch.setattr(_C, "exchange", lambda a, b: False)
    like = make(tmp_path / "in")
    old = make(tmp_path / "out", seed=5)
    before = content(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out: exists already"):
        CheckpointWriter(tmp_path / "out", like, changed={}, fingerprint="")
    with (
        pytest.raises(RuntimeError),
        CheckpointWriter(tmp_path / "out", like, changed=QUERIES, fingerprint="", overwrite=True) as writer,
    ):
        writer.put("layers.0.q", new("layers.0.q"))
        raise RuntimeError
    assert content(tmp_path / "out") == before  # until the last moment
    (old.path / "extra").write_text("goes with the old one")
    write(tmp_path / "out", like, {}, overwrite=True)
    assert content(tmp_path / "out") == content(tmp_path / "in")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_dying_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = make(tmp_path / "in")
    make(tmp_path / "out", seed=5)
    before = content(tmp_path / "out")
    monkeypatch.setattr(_C, "exchange", lambda a, b: False)
    rename = os.rename

    def dying(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out", like, {}, overwrite=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="exists already"):  # it was put back
        CheckpointWriter(tmp_path / "out", like, changed={}, fingerprint="f", resume=True)
    assert content(tmp_path / "out") == before


def test_dying_after_the_swap_does_not_swap_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = make(tmp_path / "in")
    make(tmp_path / "out", seed=5)
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out", like, {}, overwrite=True)
    assert content(tmp_path / "out") == content(tmp_path / "in")
    write(tmp_path / "out", like, {}, overwrite=True, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "in")
    assert not partial(tmp_path / "out").exists()


def test_resuming(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    whole = content(write(tmp_path / "whole", like, QUERIES))
    out = tmp_path / "out"
    with (
        pytest.raises(RuntimeError),
        CheckpointWriter(out, like, changed=QUERIES, fingerprint="f") as writer,
    ):
        everything = writer.pending
        shard = like.tensors["layers.0.q"].shard
        for name in everything:
            if like.tensors[name].shard == shard:
                writer.put(name, new(name))
        state = partial(out) / "state.json"
        for _ in range(6000):
            if shard.name in json.loads(state.read_text())["finished"]:
                break
            time.sleep(0.01)
        raise RuntimeError
    assert not out.exists()
    with pytest.raises(CheckpointError, match="other inputs or settings") as caught:
        CheckpointWriter(out, like, changed=QUERIES, fingerprint="g", resume=True)
    assert "\n" not in str(caught.value)
    with CheckpointWriter(out, like, changed=QUERIES, fingerprint="f", resume=True) as writer:
        assert (
            set(writer.pending) == {n for n in everything if like.tensors[n].shard != shard} < set(everything)
        )
        with pytest.raises(ValueError, match="not pending"):
            writer.put("layers.0.q", new("layers.0.q"))
        for name in writer.pending:
            writer.put(name, new(name))
        writer.commit()
    assert content(out) == whole
    assert not partial(out).exists()


def test_a_damaged_shard_is_not_resumed(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    out = tmp_path / "out"
    writer = CheckpointWriter(out, like, changed={"scalar": torch.bfloat16}, fingerprint="f")
    for future in list(writer._copied):
        future.result()
    writer.close()
    finished = sorted((partial(out) / "checkpoint").glob("model*"))
    assert len(finished) == 2
    os.truncate(finished[0], 100)
    assert (
        content(write(out, like, {"scalar": torch.bfloat16}, resume=True)).keys()
        == content(tmp_path / "in").keys()
    )
    assert load(out).keys() == TENSORS.keys()


def test_what_the_input_has_no_more_is_not_taken_over(tmp_path: Path) -> None:
    """An attempt that failed at the last moment has its companions beside the shards, in folders too."""
    like, out = make(tmp_path / "in"), tmp_path / "out"
    for name in ("extra.txt", "templates/tool.jinja"):
        (like.path / name).parent.mkdir(exist_ok=True)
        (like.path / name).write_text("x")
    changed = {"scalar": torch.bfloat16}
    with CheckpointWriter(out, like, changed=changed, fingerprint="f") as writer:
        writer.put("scalar", new("scalar"))
        out.mkdir()
        with pytest.raises(CheckpointError, match="appeared while its content was written"):
            writer.commit()
    out.rmdir()
    assert (partial(out) / "checkpoint" / "templates" / "tool.jinja").exists()
    shards = {path.name: path.stat().st_ino for path in (partial(out) / "checkpoint").glob("model-*")}
    (like.path / "extra.txt").unlink()
    shutil.rmtree(like.path / "templates")
    with CheckpointWriter(out, like, changed=changed, fingerprint="f", resume=True) as writer:
        assert not writer.pending
        writer.commit()
    assert content(out).keys() == content(like.path).keys() and not (out / "templates").exists()
    assert shards == {path.name: path.stat().st_ino for path in out.glob("model-*")} and len(shards) == 3


def test_without_resuming_it_starts_anew(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    CheckpointWriter(tmp_path / "out", like, changed=QUERIES, fingerprint="other").close()
    write(tmp_path / "out", like, QUERIES)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_what_is_finished_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    """The same command once more, without resuming; another one begins anew, as does this one where nothing is done."""
    like, out = make(tmp_path / "in"), tmp_path / "out"
    changed = {"scalar": torch.bfloat16}
    whole = content(write(tmp_path / "whole", like, changed))
    writer = CheckpointWriter(out, like, changed=changed, fingerprint="f")
    for future in list(writer._copied):
        future.result()
    writer.close()
    before = content(partial(out))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"partial: 2 shards of the same .*resume=True .*remove that"
        ):
            write(out, like, changed)
        assert content(partial(out)) == before
    with CheckpointWriter(out, like, changed=changed, fingerprint="f", resume=True) as writer:
        assert len(writer._shards) == 1
    shutil.rmtree(partial(out))
    assert content(write(out, like, changed)) == whole
    shutil.rmtree(out)
    CheckpointWriter(out, like, changed=changed, fingerprint="g").close()
    assert content(write(out, like, changed)) == whole


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rename could give it to the output; resuming would not help."""
    like = make(tmp_path / "in")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    for name in ("disk", "link"):
        with pytest.raises(CheckpointError, match="disk is a mount point, .*give a folder in it"):
            CheckpointWriter(tmp_path / name, like, changed={}, fingerprint="", overwrite=True)
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="disk is a mount point, .*give a folder in it"):
                Target(tmp_path / name, tmp_path / "in", tmp_path / "in", overwrite=overwrite)
    write(tmp_path / "disk" / "out", like, {})
    assert {path.name for path in tmp_path.iterdir()} == {"in", "disk", "link"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    with CheckpointWriter(tmp_path / "out", like, changed={}, fingerprint="") as writer:
        with pytest.raises(CheckpointError, match="another process is writing it"):
            CheckpointWriter(tmp_path / "out", like, changed={}, fingerprint="")
        writer.commit()


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    like = make(tmp_path / "in")
    monkeypatch.setattr(fcntl, "flock", none)
    write(tmp_path / "out", like, {})
    assert content(tmp_path / "out") == content(tmp_path / "in")


def test_what_is_put_is_checked(tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    name = "layers.0.q"
    with pytest.raises(CheckpointError, match="has no tensor 'none'"):
        CheckpointWriter(tmp_path / "out", like, changed={"none": torch.float32}, fingerprint="")
    with pytest.raises(CheckpointError, match=r"cannot hold torch\.complex128"):
        CheckpointWriter(tmp_path / "out", like, changed={name: torch.complex128}, fingerprint="")
    with CheckpointWriter(tmp_path / "out", like, changed={name: torch.bfloat16}, fingerprint="") as writer:
        with pytest.raises(CheckpointError, match=r"torch\.float32, torch\.bfloat16 was announced"):
            writer.put(name, new(name).float())
        with pytest.raises(CheckpointError, match=r"shape \[17, 30\], \[30, 17\] was announced"):
            writer.put(name, new(name).T)
        for first, rows in ((25, 10), (-1, 2), (0, 31)):
            with pytest.raises(CheckpointError, match="rows"):
                writer.put_rows(name, first, torch.zeros(rows, 17, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="were not put"):
            writer.commit()
        writer.put_rows(name, 3, new(name)[3:])
        with pytest.raises(ValueError, match="were not put"):
            writer.commit()
        for again in (3, 29):
            with pytest.raises(ValueError, match="was written already"):
                writer.put_rows(name, again, new(name)[again : again + 1])
        writer.put_rows(name, 0, new(name)[:3])
        with pytest.raises(ValueError, match="was written already"):
            writer.put(name, new(name))
        writer.commit()
    assert torch.equal(load(tmp_path / "out")[name], new(name))


@pytest.mark.parametrize("changed", [{}, QUERIES])
def test_a_full_disk(changed: dict[str, torch.dtype], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it must hold the state file and no shard."""
    like = make(tmp_path / "in")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"model-0000\d-of-00003\.safetensors: cannot be written: File too"
        ):
            write(tmp_path / "out", like, changed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    whole = write(tmp_path / "out", like, changed, resume=True)
    assert load(whole).keys() == TENSORS.keys()


def test_a_disk_without_room_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = make(tmp_path / "in")
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(
        CheckpointError, match=r"out: cannot be written: \d+ bytes are needed, the disk has 0 free"
    ):
        CheckpointWriter(tmp_path / "out", like, changed=QUERIES, fingerprint="")
    (like.path / "pictures").mkdir()
    (like.path / "pictures" / "large.png").write_bytes(bytes(100_000))
    with pytest.raises(CheckpointError, match=r"written: 10\d{4} bytes are needed"):
        CheckpointWriter(tmp_path / "out", like, changed={}, fingerprint="")


@pytest.mark.parametrize("changed", [{}, QUERIES])
def test_a_shard_that_shrinks(changed: dict[str, torch.dtype], tmp_path: Path) -> None:
    like = make(tmp_path / "in")
    shard = tmp_path / "in" / "model-00002-of-00003.safetensors"
    writer = CheckpointWriter(tmp_path / "never", like, changed=changed, fingerprint="")
    writer.close()
    index = CheckpointIndex.open(tmp_path / "in")
    original = _C.OutputFile.copy

    class Shrinking:
        """An output file whose sources are cut before the first copy."""

        def __init__(self, path: bytes) -> None:
            self._file = _C_OutputFile(path)

        def __getattr__(self, name: str) -> Callable[..., object]:
            return getattr(self._file, name)

        def clone(self, path: bytes) -> bool:
            return False

        def copy(self, path: bytes, *rest: int) -> None:
            os.truncate(shard, 300)
            original(self._file, path, *rest)

    _C_OutputFile = _C.OutputFile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "OutputFile", Shrinking)
        with pytest.raises(
            CheckpointError, match=r"in/model-00002-of-00003\.safetensors: cannot be read: .*shorter"
        ):
            write(tmp_path / "out", index, changed)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_permission() -> None:
    with (
        tempfile.TemporaryDirectory() as name
    ):  # not tmp_path, which is closed to the user that root becomes here
        folder = Path(name)
        folder.chmod(0o755)
        like = make(folder / "in")
        (folder / "place").mkdir(mode=0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may write everywhere
            with pytest.raises(CheckpointError) as caught:
                CheckpointWriter(folder / "place" / "out", like, changed={}, fingerprint="")
        finally:
            os.seteuid(user)
        expected = f"{folder}/place/.out.rlspec-partial: cannot be written: Permission denied"
        assert str(caught.value) == expected
