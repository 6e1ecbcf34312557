"""Faults that were found in loaders of safetensors files, one test each, whatever ours did before."""

from __future__ import annotations

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from header_faults import file_of
from header_fuzz import official
from restore_toys import pair
from safetensors.torch import save_file

from rlspec import _C
from rlspec.errors import CheckpointError, RunFolderError
from rlspec.io.files import read_json_object
from rlspec.io.index import CheckpointIndex, read_header
from rlspec.io.stream import read_tensor, stream_rows
from rlspec.jobs.loading import model_folder
from rlspec.restore import restore_checkpoint

TOP = 2**64
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4976698672\n"


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FIRST = {"a": entry("F32", [2], 0, 8)}
FAULTS: dict[str, list[tuple[dict[str, Any] | str, str]]] = {
    "an offset that overflows where the start of the data is added": [
        ({"a": entry("U8", [8], TOP - 16, TOP - 8)}, "past_end"),
        ({**FIRST, "b": entry("U8", [2**60], 8, 2**60 + 8)}, "past_end"),
        ({**FIRST, "b": entry("U8", [TOP - 9], 8, TOP - 1)}, "size_overflow"),  # in bits
    ],
    "a shape larger than its span": [
        ({"a": entry("F32", [3], 0, 8)}, "size_mismatch"),
        ({"a": entry("F32", [2, 2**40], 0, 8)}, "size_mismatch"),
    ],
    "a shape whose size wraps to that of its span": [
        ({"a": entry("F32", [2**62 + 2], 0, 8)}, "size_overflow"),
        ({"a": entry("U8", [2**32, 2**32, 8], 0, 0)}, "size_overflow"),
        ({"a": entry("F64", [2**61], 0, 0), "b": FIRST["a"]}, "size_overflow"),
    ],
    "an unknown dtype whose offsets nobody checks": [
        ({"a": entry("F128", [1], 0, 8)}, "unknown_dtype"),
        ({"a": entry("F128", [1], 2**40, 2**41)}, "unknown_dtype"),
        ({**FIRST, "b": entry("I4", [TOP - 1], 0, TOP - 1)}, "unknown_dtype"),
    ],
    "two tensors on the same bytes": [
        ({**FIRST, "b": FIRST["a"]}, "overlap"),
        ({**FIRST, "b": entry("U8", [1], 7, 8)}, "overlap"),
        ({**FIRST, "b": entry("U8", [6], 1, 7)}, "overlap"),
    ],
    "a negative offset": [
        ({"a": entry("F32", [2], -8, 0)}, "invalid_entry"),
        ({"a": entry("F32", [2], 0, -8)}, "invalid_entry"),
        ({"a": entry("F32", [-2], 0, 8)}, "invalid_entry"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', "invalid_entry"),
    ],
    "a huge offset": [
        ({"a": entry("F32", [2], 0, TOP)}, "invalid_entry"),
        ({"a": entry("F32", [2], TOP, TOP + 8)}, "invalid_entry"),
        ({"a": entry("F32", [2], 2**63, 2**63 + 8)}, "past_end"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}', "invalid_entry"),
    ],
}


def kind(content: bytes) -> str:
    with pytest.raises(_C.FileError) as caught:
        _C.parse_file(content)
    assert "\n" not in str(caught.value)
    return caught.value.kind


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_other_loaders_is_refused_here(fault: str) -> None:
    for header, wanted in FAULTS[fault]:
        text = header if isinstance(header, str) else json.dumps(header)
        content = file_of(text, bytes(8))
        assert kind(content) == wanted, text
        assert official(content) is None, text


@pytest.mark.parametrize("length", [TOP - 1, TOP - 7, TOP - 8, TOP - 9, 2**63, 2**63 - 1, 2**32])
def test_a_length_of_the_header_that_wraps_is_refused(length: int, tmp_path: Path) -> None:
    content = struct.pack("<Q", length) + file_of("{}", b"")
    assert kind(content) == "header_too_large" and official(content) is None
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"larger than is read: {length} bytes, at most 100000000"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("twice", ["tensor", "member", "metadata"])
def test_no_key_wins_silently(twice: str) -> None:
    one, two = json.dumps(FIRST["a"]), json.dumps(entry("U8", [8], 0, 8))
    header = {
        "tensor": f'{{"a":{one},"a":{two}}}',
        "member": f'{{"a":{one[:-1]},"data_offsets":[0,8]}}}}',
        "metadata": f'{{"__metadata__":{{"a":"1","\\u0061":"2"}},"a":{one}}}',
    }[twice]
    assert kind(file_of(header, bytes(8))) == "duplicate_key"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_header_past_the_cap_is_not_read(name: str, tmp_path: Path) -> None:
    """Sparse files: what was read of them would be gigabytes of zeros."""
    path = tmp_path / name
    path.write_bytes(struct.pack("<Q", 2**40))
    os.truncate(path, 2**41)
    with pytest.raises(CheckpointError, match=rf"{name}: larger than is read: \d+ bytes, at most 100000000"):
        CheckpointIndex.open(tmp_path)


def test_what_the_library_reads_before_a_header_and_for_metadata_is_read(tmp_path: Path) -> None:
    for text in (' \t\r\n{"a":%s}', '{"__metadata__":null,"a":%s}', '{"__metadata__" : null , "a":%s}'):
        content = file_of(text % json.dumps(FIRST["a"]), bytes(range(8)))
        (tmp_path / "model.safetensors").write_bytes(content)
        found = official(content)
        assert found is not None
        (tensor,) = read_header(tmp_path / "model.safetensors")
        assert found == {tensor.name: (tensor.dtype, tensor.shape, content[tensor.start : tensor.end])}


def test_a_checkpoint_with_blanks_and_null_metadata_is_restored(tmp_path: Path) -> None:
    """To another dtype, so that its headers are written anew."""
    base, tuned = pair(tmp_path, "llama", dtype=torch.bfloat16)
    for folder in (base, tuned):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start]) | {"__metadata__": None}
        path.write_bytes(file_of("\n " + json.dumps(header), content[start:]))
    restore_checkpoint(base, tuned, tmp_path / "out", dtype="float32", cache_dir=tmp_path / "cache")
    assert official((tmp_path / "out" / "model.safetensors").read_bytes()) is not None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
)
def test_a_pointer_of_git_lfs_says_what_to_do(name: str, tmp_path: Path) -> None:
    wanted = rf'{name}: a Git LFS pointer instead of the file: run "git lfs pull" in'
    base, tuned = pair(tmp_path, "llama")
    if name.endswith("index.json"):
        (tuned / "model.safetensors").unlink()
    (tuned / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        restore_checkpoint(base, tuned, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    if "safetensors" not in name:
        with pytest.raises(CheckpointError, match=wanted):
            model_folder(str(tuned))


def test_text_about_git_lfs_is_no_pointer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"about": POINTER}))
    assert read_json_object(path) == {"about": POINTER}
    path.write_text(POINTER.replace("https", "http"))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json_object(path)
    for broken in ("{", "[]", POINTER):
        path.write_text(broken)
        with pytest.raises(RunFolderError, match=f"^{path}: "):  # the kind that the caller asked for
            read_json_object(path, RunFolderError)
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_json_object(tmp_path / "none.json", RunFolderError)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"about": POINTER})
    assert list(CheckpointIndex.open(tmp_path).tensors) == ["a"]
    path.write_text("{}")
    (tmp_path / "picture.png").write_text(POINTER)  # which no loader reads
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("shape", [[1 << 62, 0], [0, 1 << 62], [1 << 63, 0], [0, 1 << 63]])
def test_empty_tensors_with_endless_axes_cost_nothing(tmp_path: Path, shape: list[int]) -> None:
    """Zero bytes fit their shape, whatever the other axis says: read at once, or refused in one line."""
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    index = CheckpointIndex.open(path)
    if max(shape) == 1 << 63:
        for read in (read_tensor, partial(stream_rows, memory_bytes=1 << 20)):
            with pytest.raises(CheckpointError, match="'x' has shape .*torch has axes of at most"):
                read(index, "x")
        return
    assert list(read_tensor(index, "x").shape) == shape
    rows = list(stream_rows(index, "x", memory_bytes=1 << 20))
    assert [list(block.shape) for _, block in rows] == ([shape] if shape[0] else [])
