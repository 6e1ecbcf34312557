"""The choice of a backend: defaults, the environment's override, and refusals that say why."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from subprocess import CalledProcessError
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rlspec import backend
from rlspec.errors import BackendError, OptionError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice of another test's, nor one left to the next."""
    monkeypatch.delenv("RLSPEC_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for kept in (backend._decide, backend._launch_problem):
        kept.cache_clear()
    yield
    for kept in (backend._decide, backend._launch_problem):
        kept.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, driver: object, capability: tuple[int, int] = (9, 0)) -> None:
    """A GPU, and a Triton whose driver is this."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    runtime = ModuleType("triton.runtime")
    runtime.driver = SimpleNamespace(active=driver)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)


class Broken:
    """A driver that cannot build the module it launches kernels with; counts the attempts."""

    def __init__(self, error: Exception) -> None:
        self.error, self.attempts = error, 0

    @property
    def utils(self) -> object:
        self.attempts += 1
        raise self.error


def test_the_cpu_computes_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.backend_for("cpu") == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.backend_for("cpu") == "torch"


def test_asking_for_triton_fails_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"RLSPEC_BACKEND=triton, but "):
        backend.backend_for(CPU)
    with pytest.raises(BackendError, match=r"not meta|not installed"):
        backend.backend_for("meta")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreter_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.backend_for(CPU) == "triton"


def test_without_triton_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.triton_problem(CPU) == "triton is not installed"
    assert backend.backend_for("meta") == "torch"


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "torch"), ((8, 0), "triton"), ((9, 0), "triton")]
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    gpu(monkeypatch, SimpleNamespace(utils=object()), capability)
    assert backend.backend_for("cuda:0") == expected


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Failed to find C compiler.\nMore."), r"\(RuntimeError: Failed to find C compiler\.\)"),
        (CalledProcessError(1, ["gcc", "main.c", "-O3"]), r"\(CalledProcessError: gcc failed\)"),
        (PermissionError(13, "Permission denied", "/.triton"), r"\(PermissionError: .*/\.triton'\)"),
    ],
)
def test_a_triton_that_cannot_launch_is_not_taken(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked before a job begins, once for all devices and operations; who insists on it is refused."""
    driver = Broken(error)
    gpu(monkeypatch, driver)
    with pytest.warns(RuntimeWarning, match=rf"{told}.*; PyTorch computes instead") as warned:
        assert [backend.backend_for(f"cuda:{i}") for i in range(2)] == ["torch", "torch"]
    assert "C compiler" in (backend.triton_refusal(torch.device("cuda:0")) or "")
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    with pytest.raises(BackendError, match=f"RLSPEC_BACKEND=triton, but Triton cannot launch .*{told}"):
        backend.backend_for("cuda:0")
    assert len(warned) == 1 and driver.attempts == 1


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="for Triton without a GPU"
)
def test_triton_itself_is_asked() -> None:
    """Without a GPU it has no driver, and says so where it would build one."""
    with pytest.warns(RuntimeWarning, match="0 active drivers"):
        assert "0 active drivers" in (backend._launch_problem() or "")


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "cuda")
    with pytest.raises(OptionError, match="RLSPEC_BACKEND=cuda: unknown backend; valid: auto, torch, triton"):
        backend.backend_for(CPU)


def test_cpu_capabilities() -> None:
    found = backend.cpu_capabilities()
    assert found["vector"] == torch.backends.cpu.get_cpu_capability()
    assert isinstance(found["bfloat16"], bool) and found["threads"] == torch.get_num_threads()
