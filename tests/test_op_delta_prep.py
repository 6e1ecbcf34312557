"""The delta_prep kernel in Triton's interpreter (another process), and compiled for GPUs not present."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TESTS = Path(__file__).parent


def test_in_the_interpreter() -> None:
    """In a process of its own: TRITON_INTERPRET decides what a kernel is when its module is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted/delta_prep.py"]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def compiled(target: tuple[str, int | str, int], dtype: str) -> Any:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlspec.kernels.delta import _delta_prep_kernel

    names = _delta_prep_kernel.arg_names
    element = getattr(tl, dtype)
    values = {
        "TUNED": element,
        "BASE": element,
        "OUT": element,
        "ALIGNED": True,
        "INTERP": False,
        "BLOCK": 4096,
    }
    signature = {"table": "*i64", "tiles": "*i32", "partials": "*fp32", "eta": "fp32"}
    signature |= dict.fromkeys(values, "constexpr")
    constexprs = {(names.index(name),): value for name, value in values.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "tiles", "partials")}
    source = ASTSource(_delta_prep_kernel, signature, constexprs, attrs)
    return compile(source, target=GPUTarget(*target), options={"num_warps": 4})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_nvidia_without_spills(capability: int, dtype: str, tmp_path: Path) -> None:
    kernel = compiled(("cuda", capability, 32), dtype)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = resource_usage(cubin)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, usage
    assert usage["REG"] <= 128, usage
    assert kernel.metadata.shared <= 1024  # the reductions between warps, nothing else
    vectors = re.findall(r"ld\.global\.v(\d)\.b32", kernel.asm["ptx"])
    assert vectors and set(vectors) == {"4"}, vectors  # 16 bytes a load: the pointers' alignment got through


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_for_amd_without_spills(dtype: str) -> None:
    listing = compiled(("hip", "gfx942", 64), dtype).asm["amdgcn"]
    # Scalar registers may spill: into lanes of vector registers, not into memory.
    for counter in ("vgpr_spill_count", "private_segment_fixed_size"):
        found = re.findall(rf"\.{counter}:\s+(\d+)", listing)
        assert found == ["0"], (counter, found)


def resource_usage(cubin: Path) -> dict[str, int]:
    """REG, STACK, LOCAL… of the one kernel in a cubin, by the cuobjdump that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run(
        [tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", listing)}
