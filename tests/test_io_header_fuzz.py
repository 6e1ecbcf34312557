"""Which headers are accepted: our reader and the official safetensors library, side by side on mutated ones."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import header_fuzz
import pytest
from header_faults import file_of, random_file
from header_fuzz import LISTED, Tensors, compare, official, ours

from rlspec import _C

OF_HEADERS = {
    *("file_too_short", "header_too_large", "header_truncated", "invalid_utf8", "invalid_json", "too_deep"),
    *("duplicate_key", "invalid_entry", "unknown_dtype", "size_overflow", "invalid_offsets", "size_mismatch"),
    *("overlap", "gap", "past_end", "trailing_bytes"),
}


def test_mutated_files_are_judged_as_the_official_library_judges_them() -> None:
    outcomes = compare(seed=0, count=30_000)
    assert outcomes["accepted by both"] > 5000
    # Every check is met, and every listed disagreement.
    assert {name.removeprefix("refused by both: ") for name in outcomes if "both: " in name} == OF_HEADERS
    assert {name.removeprefix("refused by us: ") for name in outcomes if "us: " in name} == LISTED.keys()


@pytest.mark.parametrize("name", LISTED)
def test_listed_disagreements_are_real_and_have_a_reason(name: str) -> None:
    content = file_of(LISTED[name]["example"], b"\7")
    found = official(content)
    assert found is not None and isinstance(ours(content), str)
    assert header_fuzz.excuses(content, found) == {name}
    assert LISTED[name]["why"].endswith(".")


@pytest.mark.parametrize("name", LISTED)
def test_a_disagreement_that_is_not_listed_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LISTED, name)
    with pytest.raises(AssertionError, match="the library"):
        compare(seed=0, count=30_000)


def _no_leading_blanks(content: bytes) -> Tensors | str:
    return "invalid_json" if content[8:9] in (b" ", b"\n") else ours(content)


def _no_null_metadata(content: bytes) -> Tensors | str:
    return "invalid_entry" if b'__metadata__":null' in content else ours(content)


def _length_wraps(content: bytes) -> Tensors | str:
    length = (int.from_bytes(content[:8], "little") + 8) % 2**64 - 8
    return ours(length.to_bytes(8, "little") + content[8:]) if length >= 0 else {}


def _twice_is_fine(content: bytes) -> Tensors | str:
    found = ours(content)
    return {} if found == "duplicate_key" else found


def _no_end(content: bytes) -> Tensors | str:
    found = ours(content)
    return ours(content + bytes(8)) if found == "past_end" else found


@pytest.mark.parametrize(
    "broken", [_no_leading_blanks, _no_null_metadata, _length_wraps, _twice_is_fine, _no_end]
)
def test_a_reader_with_a_fault_is_found_out(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_fuzz, "ours", broken)
    with pytest.raises(AssertionError, match="the library"):
        compare(seed=0, count=30_000)


def test_every_fuzz_target_has_seeds_and_words() -> None:
    """What OSS-Fuzz asks for, as ``csrc/fuzz/build.sh`` takes it from there."""
    folder = Path(__file__).parents[1] / "csrc" / "fuzz"
    targets = {path.stem for path in folder.glob("*_fuzzer.cpp")}
    assert targets == {path.name for path in (folder / "corpus").iterdir()} and len(targets) == 3
    assert os.access(folder / "build.sh", os.X_OK)
    for target in targets:
        assert "LLVMFuzzerTestOneInput" in (folder / f"{target}.cpp").read_text()
    words = [line for line in (folder / "safetensors.dict").read_text().splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r'"(\\(["\\]|x[0-9A-F]{2})|[^"\\])+"', word) for word in words), words
    for seed in (folder / "corpus" / "file_fuzzer").iterdir():
        assert isinstance(ours(seed.read_bytes()), str) == (official(seed.read_bytes()) is None), seed


def test_a_file_on_disk_is_judged_as_one_at_hand(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "f.safetensors"
    for _ in range(500):
        content = random_file(rng)
        path.write_bytes(content)
        try:
            found, _ = _C.read_header(os.fsencode(path))
            assert found == _C.parse_file(content)[0]
        except _C.FileError as error:
            assert error.kind == ours(content)
