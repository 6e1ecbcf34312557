"""Who may read what is written: whoever the user's umask lets, as with any file; safetensors' own are 0600."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from restore_toys import pair
from safetensors.torch import save_file
from train_toys import toy_model, toy_tokenizer

import rlspec
from rlspec.io.files import replacing, write_atomically
from rlspec.spectra.cache import cached_factors
from rlspec.train import save_checkpoint


@pytest.fixture(params=[0o022, 0o007], ids=["022", "007"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    """Of all files below a folder."""
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_every_file_has_the_mode_of_a_plain_one(umask: int, tmp_path: Path) -> None:
    plain = {0o666 & ~umask}
    save_file({"x": torch.ones(1)}, tmp_path / "theirs")
    there = modes(tmp_path)  # the library's own: what this test is about
    for folder in ("written", "trained"):
        (tmp_path / folder).mkdir()
    write_atomically(tmp_path / "written" / "rows", b"{}")
    with replacing(tmp_path / "written" / "arrays") as temporary:
        save_file({"x": torch.ones(1)}, temporary)
    save_checkpoint(toy_model(), toy_tokenizer(), tmp_path / "trained" / "step-1")
    base, tuned = pair(tmp_path)
    for path in (*base.rglob("*"), *tuned.rglob("*")):
        path.chmod(0o400)  # as found on a shared disk
    report = rlspec.restore_checkpoint(base, tuned, tmp_path / "out")
    cached_factors(torch.randn(512, 512), tmp_path / "cache")
    report.write(tmp_path / "written" / "report.json")
    for folder in ("written", "trained", "out", "cache"):
        assert modes(tmp_path / folder) == plain, folder
    assert there == {0o600} or there == plain


def test_an_old_file_is_replaced_whoever_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), replacing(path):
        raise KeyError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]
