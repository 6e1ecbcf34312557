"""The cache's size: what goes and what stays when it is full, and `rlspec cache`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from rlspec.cli.main import main
from rlspec.errors import OptionError
from rlspec.io import cache_folder
from rlspec.io.cache_folder import GIB, entries, entry_path, prune
from rlspec.spectra import cache

DAY = 24 * 3600.0
FILE = (
    1250  # bytes of a decomposition of a 9 x 7 matrix, and not much less: 9·7 + 7 + 7·7 float64 and a header
)
WEIGHTS = [torch.full((9, 7), 1.0) + torch.eye(9, 7) * (i + 1) for i in range(8)]
KEYS = [cache.content_key(weight) for weight in WEIGHTS]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "MIN_ENTRIES", 1)
    monkeypatch.setattr(cache_folder, "_mine", {})
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def limited(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    monkeypatch.setenv("RLSPEC_CACHE_GIB", repr((files * FILE + cache._HEADER_BYTES) / GIB if files else 0.0))


def fill(folder: Path, *numbers: int, days: float = 1.0) -> None:
    """Decompositions of an earlier process, last used some days ago, the first longest ago."""
    for place, i in enumerate(numbers):
        cache.cached_factors(WEIGHTS[i])
        used = time.time() - days * DAY + place
        os.utime(entry_path(folder, KEYS[i]), (used, used))
    end_use()


def end_use() -> None:
    """What the end of the process does."""
    for descriptor in cache_folder._mine.values():
        os.close(descriptor)
    cache_folder._mine.clear()


def kept(folder: Path) -> set[int]:
    return {KEYS.index(entry.path.stem) for entry in entries(folder)}


def test_the_least_recently_used_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(folder, 0, 1, 2, 3)
    assert all(FILE - 100 < entry.size <= FILE for entry in entries(folder))
    limited(monkeypatch, 4)
    cache.cached_factors(WEIGHTS[0])  # used again
    for i in (4, 5):
        cache.cached_factors(WEIGHTS[i])
    assert kept(folder) == {0, 3, 4, 5}


def test_a_run_larger_than_the_limit_keeps_what_fits_and_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 3)
    for _ in range(2):
        for weight in WEIGHTS:
            u, s, vh = cache.cached_factors(weight)
            torch.testing.assert_close(((u * s) @ vh).float(), weight)
        # The first are kept through both runs: making room for each next one would leave none that is used again.
        assert kept(folder) == {0, 1, 2}
        end_use()


def test_no_room_at_all_keeps_nothing_and_removes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 0)
    limited(monkeypatch, 0)
    cache.cached_factors(WEIGHTS[1])
    assert kept(folder) == {0}


def test_threads_that_keep_something_at_once_do_not_pass_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(first: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            found = first(*arguments)
            time.sleep(0.1)  # for the others to get as far
            return found

        return called

    monkeypatch.setattr(cache, "make_room", slowly(cache.make_room))
    monkeypatch.setattr(cache_folder, "_in_use_since", slowly(cache_folder._in_use_since))
    limited(monkeypatch, 1)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(cache.cached_factors, WEIGHTS[:3]))
    assert len(kept(folder)) == 1
    assert len(list((folder / "users").iterdir())) == 1  # one file a process, which its end unlocks
    end_use()
    prune(folder, GIB)
    assert not list((folder / "users").iterdir())


USER = """
import sys, torch
from pathlib import Path
from rlspec.io.cache_folder import begin_use, mark_used
begin_use(Path(sys.argv[1]))
mark_used(Path(sys.argv[2]))
print("using", flush=True)
sys.stdin.read()
"""


def test_what_a_running_process_uses_is_never_removed(folder: Path) -> None:
    fill(folder, 0, 1)
    command = [sys.executable, "-c", USER, str(folder), str(entry_path(folder, KEYS[0]))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "using\n"
        pruned = prune(folder, 0)
        assert [entry.path.stem for entry in pruned.removed] == [KEYS[1]]
        assert [entry.path.stem for entry in pruned.in_use] == [KEYS[0]]
        process.communicate()
    assert [entry.path.stem for entry in prune(folder, 0).removed] == [KEYS[0]]  # it has ended
    assert not list((folder / "users").iterdir())


def test_without_its_lock_it_would_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(cache, "begin_use", lambda folder: None)
    cache.cached_factors(WEIGHTS[0])
    assert prune(folder, 0).removed


def test_only_what_we_wrote_is_removed(folder: Path, tmp_path: Path) -> None:
    fill(folder, 0)
    place = entry_path(folder, KEYS[1])
    place.parent.mkdir(exist_ok=True)
    save_file({"mine": torch.ones(3)}, place)  # the right name, another content
    save_file({"mine": torch.ones(3)}, place.with_name("model.safetensors"))
    (tmp_path / "elsewhere.safetensors").write_text("precious")
    link = entry_path(folder, KEYS[3])
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    (folder / "notes.txt").write_text("mine")
    assert [entry.path.stem for entry in prune(folder, 0).removed] == [KEYS[0]]
    assert place.exists() and link.exists() and (folder / "notes.txt").exists()
    assert (tmp_path / "elsewhere.safetensors").read_text() == "precious"


def test_files_that_a_kill_left_half_written_go_after_a_day(folder: Path) -> None:
    fill(folder, 0)
    old, new = (folder / KEYS[0][:2] / f".{KEYS[0]}.safetensors.{pid}-1.tmp" for pid in (7, 8))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * DAY,) * 2)
    prune(folder, GIB)
    assert kept(folder) == {0} and new.exists() and not old.exists()


@pytest.mark.parametrize("limit", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_told_before_the_work(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_CACHE_GIB", limit)
    with pytest.raises(OptionError, match=f"RLSPEC_CACHE_GIB is '{limit}'"):
        cache.cached_factors(WEIGHTS[0])


def test_the_command_lists_sizes_and_prunes(folder: Path) -> None:
    fill(folder, 0, 1, 2)
    listed = CliRunner().invoke(main, ["cache"]).output.splitlines()
    assert [line.split()[-1] for line in listed[:3]] == [f"{KEYS[i]}.safetensors" for i in (2, 1, 0)]
    assert listed[3] == f"{folder}: 3 decompositions, 0.00 GiB, limit 50 GiB"
    room = 2 * FILE / GIB
    result = CliRunner().invoke(main, ["cache", "--prune", repr(room)])
    assert result.output.splitlines()[0] == "removed 1 decomposition, 0.00 GiB"
    assert kept(folder) == {1, 2}
    assert CliRunner().invoke(main, ["cache", "--prune", "0"]).output.splitlines()[1:] == [
        f"{folder}: 0 decompositions, 0.00 GiB, limit 50 GiB"
    ]


def test_the_command_where_there_is_no_cache(folder: Path) -> None:
    result = CliRunner().invoke(main, ["cache", "--prune", "0"])
    assert result.exit_code == 0 and not folder.exists()
    assert CliRunner().invoke(main, ["cache", "--prune", "-1"]).exit_code == 2
