"""Checkpoints of torch.distributed.checkpoint from anyone: one line for each fault, and nothing in them is ever run."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from distributed_toys import assert_same, save, tensors_in
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from rlspec.errors import CheckpointError
from rlspec.io import distributed
from rlspec.io.distributed import DistributedIndex
from rlspec.io.pickled import read_pickle
from rlspec.io.tiling import fault_of

NAME = "layers.0.weight"
STATE = {NAME: torch.arange(24.0).reshape(6, 4), "other": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save({"model": STATE, "optimizer": {"lr": 0.1}}, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def refusal(folder: Path) -> str:
    """The one line that reading everything ends with."""
    with pytest.raises(CheckpointError) as caught:
        tensors_in(folder)
    told = str(caught.value)
    assert "\n" not in told and str(folder) in told and len(told) < 500
    return told


class Evil:
    """Runs a command where Python unpickles it."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


@pytest.mark.parametrize("place", ["the whole", "planner_data", "storage_meta", "a size"])
def test_nothing_is_run(place: str, folder: Path) -> None:
    ran = folder.parent / "ran"
    evil = Evil(f"touch {ran}")
    metadata = metadata_of(folder)
    if place == "a size":
        metadata.state_dict_metadata[f"model.{NAME}"].size = evil
    elif place != "the whole":
        setattr(metadata, place, evil)
    content = pickle.dumps(evil if place == "the whole" else metadata)
    (folder / ".metadata").write_bytes(content)
    assert re.search(r"\.metadata: names '(posix|nt)\.system', which is not what torch", refusal(folder))
    assert not ran.exists()
    pickle.loads(content)  # the broken twin
    assert ran.exists()


def test_nothing_is_run_by_the_archive_of_a_tensor(folder: Path) -> None:
    ran = folder.parent / "ran"

    def spoil(members: dict[str, bytes]) -> None:
        members["archive/data.pkl"] = pickle.dumps(Evil(f"touch {ran}"), protocol=2)

    rewrite_archive(folder, spoil)
    assert re.search(r"names '(posix|nt)\.system', which is not what torch.save writes of", refusal(folder))
    assert not ran.exists()


def rewrite_archive(
    folder: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED
) -> None:
    """Put another archive in place of a tensor's, at the end of the file."""
    metadata = metadata_of(folder)
    (info,) = (i for place, i in metadata.storage_data.items() if place.fqn == f"model.{NAME}")
    file = folder / info.relative_path
    content = file.read_bytes()
    work = folder.parent / "archive.zip"
    work.write_bytes(content[info.offset : info.offset + info.length])
    with zipfile.ZipFile(work) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(work, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    info.offset, info.length = len(content), work.stat().st_size
    file.write_bytes(content + work.read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_archive_that_python_wrote_is_read(folder: Path) -> None:
    """So that the refusals below are of what was changed in it."""
    rewrite_archive(folder, lambda members: None)
    assert_same(tensors_in(folder), STATE)


def replaced(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        assert old in members[name]
        members[name] = members[name].replace(old, new)

    return change


ARCHIVES: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "another byte order": (
        replaced("archive/byteorder", b"little", b"big"),
        "byte order b'big', this machine's",
    ),
    "another dtype": (
        replaced("archive/data.pkl", b"FloatStorage", b"IntStorage"),
        r"torch.int32 \[6, 4\] in the file, torch.float32 \[6, 4\] wanted",
    ),
    "another shape": (
        replaced("archive/data.pkl", b"K\x06K\x04\x86", b"K\x04K\x06\x86"),
        "holds no plain tensor",
    ),
    "strides past the end": (
        replaced("archive/data.pkl", b"K\x04K\x01\x86", b"K\x05K\x01\x86"),
        "holds no plain tensor",
    ),
    "fewer bytes": (
        lambda m: m.update({"archive/data/0": bytes(92)}),
        r"92 bytes for torch.float32 \(6, 4\), 96 wanted",
    ),
    "no bytes": (lambda m: m.pop("archive/data/0") and None, "an archive of torch.save without 'data/0'"),
    "no pickle": (lambda m: m.pop("archive/data.pkl") and None, "an archive without data.pkl"),
    "a huge pickle": (
        lambda m: m.update({"archive/data.pkl": bytes(1 << 21)}),
        "'data.pkl' is larger than such",
    ),
    "a parameter": (
        replaced("archive/data.pkl", b"_rebuild_tensor_v2", b"_rebuild_parameter"),
        "names 'torch._utils._",
    ),
}


@pytest.mark.parametrize("fault", ARCHIVES)
def test_archives_that_hold_no_such_tensor_are_refused(fault: str, folder: Path) -> None:
    change, told = ARCHIVES[fault]
    rewrite_archive(folder, change)
    assert re.search(told, refusal(folder))


def test_a_compressed_archive_is_refused(folder: Path) -> None:
    """Which may become a thousand times as large."""
    rewrite_archive(folder, lambda members: None, zipfile.ZIP_DEFLATED)
    assert "is compressed or lies outside its archive" in refusal(folder)


PICKLES: dict[str, tuple[bytes, str]] = {
    "nested lists": (b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".", "not what torch.distributed"),
    "a nested key": (b"\x80\x04})" + b"\x85" * 300_000 + b"Ns.", "has a tuple as the key of a dictionary"),
    "a nested argument": (
        b"\x80\x04ctorch\nSize\n)" + b"\x85" * 300_000 + b"R.",
        "not what torch.distributed",
    ),
    "a far place in the memo": (b"\x80\x04Nr\xff\xff\xff\x7f.", "not what torch.distributed"),
    "a place without anything": (b"\x80\x04h\x07.", "is malformed: 7 at byte"),
    "a long text": (b"\x80\x04X\xff\xff\xff\xffabc.", "is cut off or malformed at byte 7 of 11"),
    "no end": (b"\x80\x04N", "is cut off or malformed"),
    "nothing": (b"", "is cut off or malformed"),
    "two values": (b"\x80\x04NN.", "is cut off or malformed"),
    "a mark that is missing": (b"\x80\x04Nt.", "is cut off or malformed"),
    "a list's state": (b"\x80\x04]}b.", "is cut off or malformed"),
    "text that is none": (b"\x80\x04\x8c\x01\xff.", "is cut off or malformed"),
    "a key without a value": (b"\x80\x04}(Nu.", "is cut off or malformed"),
    "an old protocol": (b"I1\n.", "has the opcode b'I' at byte 0"),
    "an extension": (b"\x80\x04\x82\x01.", r"has the opcode b'\\x82' at byte 2"),
    "an instance": (b"\x80\x04(c__main__\nX\no.", "names '__main__.X'"),
    "another object": (pickle.dumps({"a": [1, (2, None, True)]}), "not what torch.distributed"),
    "Megatron's": (
        b"\x80\x04cmegatron.core.dist_checkpointing\nMCoreMetadata\n.",
        "Megatron's layout.*Megatron Bridge",
    ),
}


@pytest.mark.parametrize("fault", PICKLES)
def test_metadata_that_torch_does_not_write_is_refused(fault: str, folder: Path) -> None:
    content, told = PICKLES[fault]
    (folder / ".metadata").write_bytes(content)
    assert re.search(told, refusal(folder))


def test_pickles_are_read_as_pythons_own_reads_them() -> None:
    shared = ["x", 3]
    value = {
        "a": shared,
        "b": (shared, None, True, -5, 1 << 40, "é" * 300, 7**5),
        2: {"c": ((),)},
        "d": list(range(999)),
    }
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(value, protocol)
        found = read_pickle(content, allowed=lambda name: False, where="here", what="it")
        assert found == value and found["a"] is found["b"][0]


def test_metadata_cut_off_anywhere_is_refused(folder: Path) -> None:
    content = (folder / ".metadata").read_bytes()
    for length in range(0, len(content), 7):
        (folder / ".metadata").write_bytes(content[:length])
        refusal(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_whatever_bytes_are_changed_either_something_is_read_or_one_line_is_told(
    name: str, folder: Path
) -> None:
    draw = random.Random(0)
    content = (folder / name).read_bytes()
    refused = 0
    for _ in range(400):
        spoilt = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        (folder / name).write_bytes(spoilt)
        try:
            tensors_in(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_a_huge_metadata_file_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / ".metadata").open("r+b") as file:
        file.truncate(1 << 40)
    assert "1099511627776 bytes, at most 268435456 are read of it" in refusal(folder)


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def with_chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        key = f"model.{NAME}"
        described: Any = metadata.state_dict_metadata[key]
        described.chunks = [chunk(*box) for box in boxes]
        storage: Any = metadata.storage_data
        info = storage[MetadataIndex(key, (0, 0))]
        storage.update({MetadataIndex(key, offsets): info for offsets, _ in boxes})

    return change


def with_info(**changes: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        storage: Any = metadata.storage_data
        for name, value in changes.items():
            setattr(storage[MetadataIndex(f"model.{NAME}", (0, 0))], name, value)

    return change


def with_size(*size: int) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        described: Any = metadata.state_dict_metadata[f"model.{NAME}"]
        described.size = torch.Size(size)

    return change


def renamed(key: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata.pop(f"model.{NAME}")

    return change


OUTSIDE = "names .* which is not a file below its folder"
FAULTS: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a hole": (
        with_chunks(((0, 0), (3, 4)), ((4, 0), (2, 4))),
        r"of shape \[6, 4\]: its parts hold 20 of 24 elements",
    ),
    "no part": (with_chunks(), "its parts hold 0 of 24 elements"),
    "an overlap": (
        with_chunks(((0, 0), (4, 4)), ((3, 0), (3, 4))),
        r"its parts at \[0, 0\] and \[3, 0\] overlap",
    ),
    "an overlap and a hole": (with_chunks(((0, 0), (4, 4)), ((3, 0), (2, 4))), "overlap"),
    "a part twice": (with_chunks(((0, 0), (6, 4)), ((0, 0), (6, 4))), "overlap"),
    "a part outside": (with_chunks(((0, 0), (6, 5))), r"its part at \[0, 0\] of shape \[6, 5\] lies outside"),
    "a part with other axes": (with_chunks(((0, 0), (24,))), "has other axes"),
    "another shape": (with_size(7, 4), "its parts hold 24 of 28 elements"),
    "a shape beyond all": (with_size(1 << 62, 1 << 62), "its parts hold 24 of"),
    "a part in no file": (
        lambda m: m.storage_data.pop(MetadataIndex(f"model.{NAME}", (0, 0))) and None,
        r"its part at \[0, 0\]: in no file",
    ),
    "a part of another shape in the file": (
        with_chunks(((0, 0), (3, 4)), ((3, 0), (3, 4))),
        r"torch.float32 \[6, 4\] in the file, torch.float32 \[3, 4\] wanted",
    ),
    "a file above": (with_info(relative_path="../__0_0.distcp"), OUTSIDE),
    "a file elsewhere": (with_info(relative_path="/etc/passwd"), OUTSIDE),
    "a drive": (with_info(relative_path="C:\\x"), OUTSIDE),
    "a NUL byte": (with_info(relative_path="a\0b"), "names a file with a NUL byte"),
    "a file that is missing": (
        with_info(relative_path="__1_0.distcp"),
        r"__1_0.distcp: missing; .metadata names it",
    ),
    "the folder": (with_info(relative_path="."), "missing; .metadata names it"),
    "past the end of the file": (
        with_info(offset=1 << 40),
        r"__0_0.distcp: cut off: \d+ bytes, .metadata places",
    ),
    "a negative place": (with_info(offset=-8), "not what torch.distributed"),
    "no archive there": (with_info(offset=1), "'data.pkl' is compressed or lies outside its archive"),
    "half an archive": (with_info(length=700), "no archive of torch.save, or one that is cut off"),
    "an empty archive": (with_info(length=0), "no archive of torch.save, or one that is cut off"),
    "a long name of a file": (with_info(relative_path="a/" * 2500), "not what torch.distributed"),
    "a name too long for a file": (
        with_info(relative_path="a" * 300),
        "names a file 'aaaa.* of 300 characters",
    ),
    "a long key": (renamed("a" * 5000), "not what torch.distributed"),
    "a long name of a tensor": (
        lambda m: setattr(m, "planner_data", {f"model.{NAME}": ("model", "a" * 5000)}),
        "not what torch.distributed",
    ),
    "an extension": (with_info(transform_descriptors=["zstd"]), "saved with an extension"),
    "a name that is none": (with_info(relative_path=3), "not what torch.distributed"),
    "no storage": (lambda m: setattr(m, "storage_data", None), "in no file"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", {}), "no tensor of a model in it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_make_no_tensor_are_refused(fault: str, folder: Path) -> None:
    change, told = FAULTS[fault]
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert re.search(told, refusal(folder))


def test_faults_of_parts_are_told_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_MOST_PARTS", 0)
    with pytest.raises(CheckpointError, match="not what torch.distributed"):
        DistributedIndex.open(folder)
    monkeypatch.undo()
    (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off"):
        DistributedIndex.open(folder)


def test_one_list_of_parts_for_all_tensors_does_not_take_hours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of a tensor takes a few bytes of the file, and the list that it shares none."""
    monkeypatch.setattr(distributed, "_MOST_PARTS_IN_ALL", 1000)
    metadata = metadata_of(folder)
    described = copy.copy(metadata.state_dict_metadata[f"model.{NAME}"])
    described.size, described.chunks = torch.Size((0,)), [chunk((0,), (0,))] * 100
    metadata.state_dict_metadata |= {f"model.{i}": described for i in range(9)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert len(DistributedIndex.open(folder).tensors) == 2 + 9
    metadata.state_dict_metadata |= {f"model.{i}": described for i in range(10)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "more than 1000 parts" in refusal(folder)


def test_without_its_last_file_a_checkpoint_is_not_whole(folder: Path) -> None:
    (folder / ".metadata").unlink()
    assert "writes it last, so the checkpoint is not whole" in refusal(folder)


def test_other_formats_of_its_files_are_refused(folder: Path) -> None:
    """Newer versions of torch can write safetensors under the same names."""
    size = (folder / "__0_0.distcp").stat().st_size
    (folder / "__0_0.distcp").write_bytes(safetensors.torch.save({"model": torch.ones(size)}))
    assert "no archive of torch.save" in refusal(folder)


LAYER = "model.layers.0."
OTHERS = {
    "torchtune": ("layers.0.attn.output_proj.weight", "torchtune's layout.*FullModelHFCheckpointer"),
    "torchtune's LoRA": ("layers.0.attn.q_proj.lora_a.weight", "torchtune's layout.*FullModelHFCheckpointer"),
    "torchtitan": ("layers.0.attention.wq.weight", r"Meta's layout.*convert_to_hf\.py"),
    "Megatron": ("decoder.layers.self_attention.linear_qkv.weight", "Megatron's layout.*Megatron Bridge"),
    "LoRA": (
        f"base_model.model.{LAYER}self_attn.q_proj.lora_A.default.weight",
        "LoRA adapter.*save_pretrained of PEFT",
    ),
    "LoRA's base": (
        f"base_model.model.{LAYER}self_attn.q_proj.base_layer.weight",
        "LoRA adapter.*save_pretrained",
    ),
    "optimizer": ("optimizer.state.x.exp_avg", "no tensor of a model in it"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_in_other_layouts_are_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    name, told = OTHERS[kind]
    save({name: torch.ones(4, 4)}, tmp_path)
    assert re.search(told, refusal(tmp_path))


def test_tilings_are_judged_as_by_counting() -> None:
    draw = random.Random(0)
    seen = {None: 0, "overlap": 0, "elements": 0}
    for _ in range(3000):
        shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 3)))
        boxes = cut(shape, draw)
        if boxes and draw.random() < 0.3:
            boxes.pop(draw.randrange(len(boxes)))
        if draw.random() < 0.3:
            offsets = tuple(draw.randrange(n) for n in shape)
            boxes.append(
                (offsets, tuple(draw.randint(0, n - a) for a, n in zip(offsets, shape, strict=True)))
            )
        draw.shuffle(boxes)
        counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        for offsets, sizes in boxes:
            for place in itertools.product(*(range(a, a + n) for a, n in zip(offsets, sizes, strict=True))):
                counts[place] += 1
        told = fault_of(shape, boxes)
        kind = None if told is None else told.rpartition(" ")[2]
        assert kind == (
            "overlap" if max(counts.values()) > 1 else "elements" if 0 in counts.values() else None
        )
        seen[kind] += 1
    assert min(seen.values()) > 100


def test_parts_that_lie_across_one_another_are_refused_before_all_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = 1500
    # Columns, each of three parts, cut at another row than its neighbours: whichever axis is swept, n are open at once.
    ends = [(0, i, i + n, 2 * n) for i in range(n)]
    boxes = [((a, i), (b - a, 1)) for i, rows in enumerate(ends) for a, b in itertools.pairwise(rows)]
    monkeypatch.setattr("rlspec.io.tiling._MOST_COMPARISONS", 1 << 18)
    told = fault_of((2 * n, n), boxes)  # all of them would take two million and more
    assert told is not None and "lie across one another" in told


def test_a_grid_of_thousands_of_processes_is_read() -> None:
    grid = [((16 * i, 8 * j), (16, 8)) for i in range(100) for j in range(100)]
    assert fault_of((1600, 800), grid) is None


def cut(shape: tuple[int, ...], draw: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A shape in boxes, each of them halved somewhere or not."""
    boxes = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw.randint(0, 4) if shape else 0):
        offsets, sizes = boxes.pop(draw.randrange(len(boxes)))
        axis = draw.randrange(len(shape))
        at = draw.randint(0, sizes[axis])
        first = (*sizes[:axis], at, *sizes[axis + 1 :])
        rest = (*sizes[:axis], sizes[axis] - at, *sizes[axis + 1 :])
        boxes += [(offsets, first), ((*offsets[:axis], offsets[axis] + at, *offsets[axis + 1 :]), rest)]
    return boxes
