"""The table of implementations: what is chosen where, and that nothing is passed over without a reason."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlspec import backend
from rlspec.ops.gram import product_eps
from rlspec.ops.table import TABLE, choose, passed_over, summary

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
B16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SHAPE = (4, 64, 48, 16)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RLSPEC_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._decide.cache_clear()
    yield
    backend._decide.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice can see, there is an H100 with a Triton that launches."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "_launch_problem", lambda: None)


def test_a_cpu_computes_with_the_last_of_each_row() -> None:
    plain = {"gram": "halves", "chebyshev_step": "in place", "residual_norms": "stored"}
    plain |= {"sylvester_rotation": "elementwise"}
    for op in TABLE:
        assert choose(op, CPU, (B16, B16, F32), SHAPE) == plain.get(op, "row blocks") == TABLE[op][-1].name


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_kernels_where_they_fit() -> None:
    assert choose("delta_stats", GPU, (B16, B16), SHAPE[:3]) == "triton"
    assert choose("delta_stats", GPU, (B16, F64), SHAPE[:3]) == "whole"
    assert choose("delta_matmul", GPU, (B16, F32, F32), SHAPE) == "triton"
    for dtypes, shape, why in (
        ((B16, B16, F64), SHAPE, "the kernel multiplies float32 blocks, not float64"),
        ((F64, B16, F32), SHAPE, "the kernel takes float32, bfloat16 and float16, not float64"),
        ((B16, B16, F32), (70000, 8, 8, 1), "the kernel takes up to 65535 matrices, not 70000"),
        ((B16, B16, F32), (0, 8, 8, 1), "nothing to compute"),
    ):
        assert choose("delta_matmul", GPU, dtypes, shape) == "row blocks"
        assert list(passed_over("delta_matmul", GPU, dtypes, shape)) == [("triton", why)]


@pytest.mark.usefixtures("gpu")
def test_a_gpu_decomposes_and_turns_float32_by_kernels() -> None:
    for op in ("gram", "chebyshev_step", "residual_norms", "sylvester_rotation"):
        for dtype, shape, why in (
            (F32, SHAPE, None),
            (F64, SHAPE, "the kernel takes float32, not float64"),
            (F32, (70000, 8, 8, 1), "the kernel takes up to 65535 matrices, not 70000"),
            (F32, (1, 8, 0, 0), "nothing to compute"),
        ):
            found = dict(passed_over(op, GPU, (dtype,), shape))
            assert found == ({} if why is None else {"triton": why})


@pytest.mark.usefixtures("gpu")
def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "torch")
    assert choose("delta_stats", GPU, (B16, B16), SHAPE[:3]) == "whole"
    assert summary("delta_matmul", GPU) == "row blocks (triton: RLSPEC_BACKEND=torch)"


@pytest.mark.parametrize("device", [CPU, GPU, torch.device("meta")])
@pytest.mark.parametrize("dtypes", [(B16, B16, F32), (F64, F64, F64), (torch.complex64,) * 3])
def test_nothing_is_passed_over_without_a_reason(
    device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    for op, implementations in TABLE.items():
        for shape in (SHAPE, (0, 1, 1, 1)):
            chosen, reasons = choose(op, device, dtypes, shape), dict(passed_over(op, device, dtypes, shape))
            names = [implementation.name for implementation in implementations]
            assert list(reasons) == names[: names.index(chosen)]
            assert all(reasons.values())


def test_a_line_says_what_runs_for_which_weights(gpu: None) -> None:
    assert summary("delta_matmul", GPU) == (
        "triton for bfloat16 float16 float32, row blocks for float64 "
        "(triton: the kernel multiplies float32 blocks, not float64)"
    )
    assert summary("delta_matmul", CPU).startswith("row blocks (triton: ")
    assert summary("add_low_rank", GPU).startswith(
        "triton for bfloat16 float16 float32, row blocks for float64 ("
    )
    assert summary("add_rounded", CPU).startswith("row blocks (triton: ")


def test_every_operation_has_a_file_and_runs_what_the_table_names() -> None:
    files = {path.stem for path in (ROOT / "rlspec" / "ops").glob("*.py")}
    assert files - {"__init__", "table", "reference", "draws"} == set(TABLE)
    for op, implementations in TABLE.items():
        module = importlib.import_module(f"rlspec.ops.{op}")
        run = getattr(module, "_IMPLEMENTATIONS", None)
        assert run is None or set(run) == {implementation.name for implementation in implementations}
        kernel = ROOT / "kernels" / "triton" / f"{op}.py"
        assert kernel.exists() == any(i.backend == "triton" for i in implementations)


def imported(path: Path) -> set[str]:
    """Names of modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_tests_import_the_twins(tmp_path: Path) -> None:
    files = [path for room in ("rlspec", "kernels") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    users = [path for path in files if "rlspec.ops.reference" in imported(path)]
    assert users == []
    for text in ("from rlspec.ops import reference", "def f():\n    import rlspec.ops.reference"):
        (tmp_path / "user.py").write_text(text)
        assert "rlspec.ops.reference" in imported(tmp_path / "user.py")  # the broken twin is seen


def test_operations_know_nothing_of_the_rooms_above() -> None:
    allowed = {"rlspec.backend", "rlspec.errors", "rlspec.ops", "rlspec.kernels"}
    for path in (ROOT / "rlspec" / "ops").glob("*.py"):
        rooms = {".".join(name.split(".")[:2]) for name in imported(path) if name.startswith("rlspec.")}
        assert rooms <= allowed, path.name


def test_the_table_is_cheap_to_ask() -> None:
    """`rlspec env` and every product ask it: no kernel is imported for an answer."""
    before = set(sys.modules)
    choose("delta_matmul", CPU, (B16, B16, F32), SHAPE)
    assert not any(name.startswith(("triton", "rlspec.kernels")) for name in set(sys.modules) - before)


def test_bounds_count_the_products_that_a_device_really_takes(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split factors on NVIDIA's tensor cores round more coarsely than float32; plain products, and AMD's, do not."""
    eps = torch.finfo(F32).eps
    assert product_eps(CPU, F32) == eps and product_eps(GPU, F32) == 2.0**-20 > 4 * eps
    assert product_eps(GPU, torch.float64) == torch.finfo(torch.float64).eps
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert product_eps(GPU, F32) == eps
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("RLSPEC_BACKEND", "torch")
    assert product_eps(GPU, F32) == eps
