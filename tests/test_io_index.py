"""The checkpoint index: against the official safetensors library, hostile files, and sharded folders."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from header_faults import BITS
from safetensors import safe_open
from safetensors.torch import save_file

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.index import CheckpointIndex, read_header


def raw_file(path: Path, header: Any, data: int) -> Path:
    """A file with this header (JSON text, or what json.dumps takes) and so many bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def official(path: Path) -> dict[str, tuple[str, list[int]]]:
    """What the official library finds: name -> (dtype, shape)."""
    with safe_open(str(path), framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def test_every_dtype_matches_the_official_library(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(20):
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "é": "\n"}} if trial % 2 else {}
        at = 0
        for dtype, bits in rng.sample(sorted(BITS.items()), len(BITS)):
            for kind, shape in {
                "matrix": [rng.randint(1, 5), 4 * rng.randint(1, 3)],
                "empty": [3, 0, 2],
                "scalar": [] if bits >= 8 else [8],
            }.items():
                size = bits * (shape[0] * shape[1] if kind == "matrix" else int(kind == "scalar"))
                size = bits if kind == "scalar" and bits < 8 else size // 8
                header[f"{dtype} {kind} \U0001f600"] = tensor(dtype, shape, at, at + size)
                at += size
        path = raw_file(tmp_path / "t.safetensors", header, at)
        found = read_header(path)
        assert {e.name: (e.dtype, list(e.shape)) for e in found} == official(path)
        assert len(found) == 3 * len(BITS)
        data_start = path.stat().st_size - at
        for entry in found:
            assert [entry.start - data_start, entry.end - data_start] == header[entry.name]["data_offsets"]


def test_byte_ranges_hold_the_tensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.float64),
        "b": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "f8": torch.randn(6).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    found = CheckpointIndex.open(path).tensors
    assert set(found) == set(tensors)
    for name, entry in found.items():
        expected = tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert content[entry.start : entry.end] == expected
        assert entry.shape == tuple(tensors[name].shape) and entry.shard == path


# Each hostile header with its kind, the bytes of tensors behind it, and the mended twin that must pass.
GOOD = tensor("F32", [2], 0, 8)
HOSTILE: list[tuple[str, Any, int, Any]] = [
    ("invalid_utf8", b'{"\xc0\x80":' + json.dumps(GOOD).encode() + b"}", 8, {"x": GOOD}),
    ("invalid_json", b'{"x":' + json.dumps(GOOD).encode(), 8, {"x": GOOD}),
    ("invalid_json", b"[]", 0, b"{}"),
    ("invalid_json", b"\xef\xbb\xbf{}", 0, b" \n{}"),
    ("invalid_json", b'{"x":{"y":1e309}}', 0, b'{"__metadata__":null}'),
    ("invalid_json", b"{}\x00", 0, b"{}\n"),
    ("too_deep", b'{"x":{"y":' + b"[" * 100000, 0, b"{}"),
    ("duplicate_key", b'{"x":%b,"x":%b}' % ((json.dumps(GOOD).encode(),) * 2), 8, {"x": GOOD}),
    ("duplicate_key", b'{"__metadata__":{"a":"1","a":"2"}}', 0, b'{"__metadata__":{"a":"1","b":"2"}}'),
    ("invalid_entry", {"x": {"dtype": "F32", "shape": [2]}}, 8, {"x": GOOD}),
    ("invalid_entry", {"x": tensor("F32", [2.0], 0, 8)}, 8, {"x": GOOD}),  # type: ignore[list-item]
    ("invalid_entry", {"x": tensor("F32", [-2], 0, 8)}, 8, {"x": GOOD}),
    ("invalid_entry", {"x": tensor("F32", [2], 0, 2**64)}, 8, {"x": GOOD}),
    ("invalid_entry", {"x": [], "y": GOOD}, 8, {"y": GOOD}),
    ("unknown_dtype", {"x": tensor("f32", [2], 0, 8)}, 8, {"x": GOOD}),
    ("size_overflow", {"x": tensor("F32", [2**63, 2], 0, 8)}, 8, {"x": GOOD}),
    ("size_overflow", {"x": tensor("U8", [2**63, 2, 0], 0, 0)}, 0, {"x": tensor("U8", [2**59, 2, 0], 0, 0)}),
    ("invalid_offsets", {"x": tensor("F32", [2], 8, 0)}, 8, {"x": GOOD}),
    ("size_mismatch", {"x": tensor("F32", [3], 0, 8)}, 8, {"x": GOOD}),
    ("size_mismatch", {"x": tensor("F4", [3], 0, 1)}, 1, {"x": tensor("F4", [2], 0, 1)}),
    ("overlap", {"x": GOOD, "y": tensor("U8", [8], 4, 12)}, 12, {"x": GOOD, "y": tensor("U8", [4], 8, 12)}),
    ("overlap", {"x": GOOD, "y": GOOD}, 8, {"x": GOOD, "y": tensor("F32", [0], 8, 8)}),
    ("gap", {"x": GOOD, "y": tensor("U8", [4], 9, 13)}, 13, {"x": GOOD, "y": tensor("U8", [5], 8, 13)}),
    ("gap", {"x": tensor("F32", [2], 1, 9)}, 9, {"x": GOOD, "y": tensor("U8", [1], 8, 9)}),
    ("past_end", {"x": GOOD}, 7, {"x": tensor("U8", [7], 0, 7)}),
    ("past_end", {"x": tensor("U8", [1], 2**64 - 2, 2**64 - 1)}, 1, {"x": tensor("U8", [1], 0, 1)}),
    ("trailing_bytes", {"x": GOOD}, 9, {"x": GOOD, "y": tensor("BOOL", [1], 8, 9)}),
]


@pytest.mark.parametrize(("kind", "header", "data", "twin"), HOSTILE)
def test_hostile_headers(kind: str, header: Any, data: int, twin: Any, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "h.safetensors", header, data)
    with pytest.raises(_C.FileError) as caught:
        _C.read_header(os.fsencode(path))
    assert caught.value.kind == kind
    with pytest.raises(CheckpointError, match=r"h\.safetensors: ") as shown:
        read_header(path)
    assert "\n" not in str(shown.value) and len(str(shown.value)) < 400
    read_header(raw_file(tmp_path / "twin.safetensors", twin, data))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("file_too_short", b""),
        ("file_too_short", b"\x02\0\0\0\0\0\0"),
        ("header_too_large", struct.pack("<Q", 100_000_001) + b"{}"),
        ("header_too_large", b"\xff" * 8 + b"{}"),
        ("header_truncated", struct.pack("<Q", 3) + b"{}"),
    ],
)
def test_hostile_prefixes(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(_C.FileError) as caught:
        _C.read_header(os.fsencode(path))
    assert caught.value.kind == kind


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """Where both are there, transformers loads ``model.safetensors``."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert CheckpointIndex.open(tmp_path).tensors["a"].shard.name == "model.safetensors"


def test_every_kind_of_error_is_tested_here() -> None:
    by_files = {"open_failed", "file_too_short", "header_too_large", "header_truncated", "lfs_pointer"}
    by_races = {"read_failed"}  # a disk error, or a file cut while it is read
    elsewhere = {"write_failed", "tensor_too_large", "buffers_held", "forked"}  # not of headers
    assert {kind for kind, *_ in HOSTILE} | by_files | by_races | elsewhere == set(_C.ERROR_KINDS)


def test_a_reader_without_the_checks_lets_hostile_headers_pass() -> None:
    """The broken twin: json.loads and nothing else accepts these, so the checks are what refuses them."""
    passed = set()
    for kind, header, _, _ in HOSTILE:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        try:
            for name, entry in json.loads(text).items():
                if name != "__metadata__":
                    _ = (entry["dtype"], entry["shape"], *entry["data_offsets"])
            passed.add(kind)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
    assert passed >= {"duplicate_key", "unknown_dtype", "size_overflow", "invalid_offsets", "size_mismatch"}
    assert passed >= {"overlap", "gap", "past_end", "trailing_bytes"}


def test_not_a_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, tmp_path / "none", fifo):
        with pytest.raises(_C.FileError) as caught:
            _C.read_header(os.fsencode(path))
        assert caught.value.kind == "open_failed"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards of two tensors each."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weight_map = {}
    for shard in (1, 2):
        name = f"model-0000{shard}-of-00002.safetensors"
        tensors = {f"layers.{shard}.{part}": torch.randn(2, 3) for part in "ab"}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map})
    )
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def test_sharded(sharded: Path) -> None:
    index = CheckpointIndex.open(sharded)
    assert list(index.tensors) == ["layers.1.a", "layers.1.b", "layers.2.a", "layers.2.b"]
    assert index.tensors["layers.2.b"].shard == sharded / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x", "/etc/passwd", "C:\\x", "", "a\0b", "é" * 200]
)
def test_index_may_not_leave_its_folder(sharded: Path, name: str) -> None:
    save_file({"layers.1.a": torch.zeros(1)}, sharded.parent / "x.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update({"layers.1.a": name}))
    with pytest.raises(CheckpointError, match=r"index\.json: names"):
        CheckpointIndex.open(sharded)


def test_weights_may_be_links_to_anywhere(sharded: Path, tmp_path: Path) -> None:
    """As for the loaders of the field: shards of an index, a single file, a folder of shards."""
    shard = sharded / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    assert len(CheckpointIndex.open(sharded).tensors) == 4
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.safetensors").symlink_to(outside)
    assert list(CheckpointIndex.open(alone).tensors) == ["layers.1.a", "layers.1.b"]
    outside.rename(sharded / "inside.safetensors")
    with pytest.raises(
        CheckpointError, match=r"00001-of.*a symbolic link to .*outside.*not there; model.*names it"
    ):
        CheckpointIndex.open(sharded)
    with pytest.raises(CheckpointError, match=r"alone/model\.safetensors: a symbolic link to .* not there"):
        CheckpointIndex.open(alone)
    shard.unlink()
    shard.symlink_to("inside.safetensors")
    assert len(CheckpointIndex.open(sharded).tensors) == 4


def test_a_snapshot_in_the_download_cache_opens(sharded: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--model"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sharded.iterdir()):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert len(CheckpointIndex.open(snapshot).tensors) == 4


def test_index_and_shards_must_agree(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("layers.1.a"))
    with pytest.raises(CheckpointError, match=r"holds 'layers\.1\.a', not placed there"):
        CheckpointIndex.open(sharded)
    edit_index(sharded, lambda m: m.update({"layers.1.a": m["layers.1.b"], "layers.1.c": m["layers.1.b"]}))
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.1\.c'"):
        CheckpointIndex.open(sharded)


def test_a_tied_head_that_is_listed_and_left_out_is_no_tensor(sharded: Path) -> None:
    """As some writers leave it: transformers ties the head then, and nothing is missing."""
    names = list(CheckpointIndex.open(sharded).tensors)
    edit_index(sharded, lambda m: m.update({"lm_head.weight": m["layers.2.a"]}))

    def says(**config: object) -> None:
        (sharded / "config.json").write_text(json.dumps(config))

    says(tie_word_embeddings=True)
    assert list(CheckpointIndex.open(sharded).tensors) == names
    says(text_config={"tie_word_embeddings": True})
    assert list(CheckpointIndex.open(sharded).tensors) == names
    for config in ({}, {"tie_word_embeddings": False}):
        says(**config)
        with pytest.raises(CheckpointError, match=r"lacks 'lm_head\.weight'"):
            CheckpointIndex.open(sharded)
    says(tie_word_embeddings=True)
    edit_index(sharded, lambda m: m.update({"layers.1.c": m["layers.1.b"]}))
    with pytest.raises(CheckpointError, match="lacks 'l"):
        CheckpointIndex.open(sharded)


def test_missing_and_truncated_shards(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: the file is truncated"):
        CheckpointIndex.open(sharded)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: missing"):
        CheckpointIndex.open(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"a":' + "[" * 100000, "nested too deeply"),
        ("[]", "expected a weight_map"),
        ('{"weight_map": {"a": 1}}', "expected a weight_map"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "given twice"),
        ('{"weight_map": {}, "weight_map": {}}', "given twice"),
        ('{"metadata": {"total_size": 01}, "weight_map": {}}', "not valid JSON"),
        ('{"weight_map": {}} trailing', "not valid JSON"),
        ('{"weight_map": {"\\ud800": "x"}}', "not valid JSON"),
        (b'{"weight_map": {"\xff": "x"}}', "not UTF-8"),
    ],
)
def test_malformed_index(sharded: Path, content: str | bytes, message: str) -> None:
    text = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (sharded / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointIndex.open(sharded)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        CheckpointIndex.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        CheckpointIndex.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin .*save_pretrained"):
        CheckpointIndex.open(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(CheckpointIndex.open(tmp_path).tensors) == ["a"]
