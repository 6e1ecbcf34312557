"""What every test shares: no network, a fixed seed, and memory that is never silently zero."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Hooks: pytest finds them here.
from skips import pytest_addoption, pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

# Before transformers is imported: a test that would download something fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported. Workers share the cores: threads that spin at a barrier take them from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

if TYPE_CHECKING:
    from click.testing import Result

    from rlspec.run.folder import RunFolder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama, to be read only; a test that needs one of another kind makes its own."""
    from train_toys import save_toy_model  # transformers, which not every run needs

    return save_toy_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and tuned checkpoint, to be read only: two shards, float32."""
    from restore_toys import pair

    return pair(tmp_path_factory.mktemp("llama"), shard="150KB")


@pytest.fixture(scope="session")
def llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same in one shard, bfloat16."""
    from restore_toys import pair

    return pair(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decompositions of references are kept in a folder of the test file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Result]:
    """A run of `rlspec track`, to be read only, and what the command printed."""
    from track_toys import finished_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return finished_run(model, tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions are kept in the test's own folder, also by the processes that it starts."""
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (integers: the largest): what is left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
