"""The choice of a backend: defaults, the environment's override, and refusals that say why."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rlspec import backend
from rlspec.errors import BackendError, OptionError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLSPEC_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._decide.cache_clear()


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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backend.backend_for("cuda:0") == expected


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "cuda")
    with pytest.raises(OptionError, match="RLSPEC_BACKEND=cuda: unknown backend; valid: auto, torch, triton"):
        backend.backend_for(CPU)


def test_cpu_capabilities() -> None:
    found = backend.cpu_capabilities()
    assert found["vector"] == torch.backends.cpu.get_cpu_capability()
    assert isinstance(found["bfloat16"], bool) and found["threads"] == torch.get_num_threads()
