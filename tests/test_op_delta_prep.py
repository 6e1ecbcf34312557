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
# Atomic additions: NVIDIA's PTX has atom and red, AMD's listings an instruction whose name holds "atomic".
ATOMIC = re.compile(r"^\s*(@\S+\s+)?(atom|red)\.|_atomic_", re.MULTILINE)


def test_in_the_interpreter() -> None:
    """In a process of its own: TRITON_INTERPRET decides what a kernel is when its module is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted/delta_prep.py"]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def compiled(
    target: tuple[str, int | str, int], kernel: Any, signature: dict[str, str], **values: Any
) -> Any:
    """A kernel for one kind of GPU; ``signature`` is of its tensors and numbers, ``values`` are its constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    constexprs = {(names.index(name),): value for name, value in values.items()}
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature | dict.fromkeys(values, "constexpr"), constexprs, attrs)
    return compile(source, target=GPUTarget(*target), options={"num_warps": 4})


def prepared(target: tuple[str, int | str, int], dtype: str) -> Any:
    import triton.language as tl

    from rlspec.kernels.delta import _delta_prep_kernel

    signature = {"table": "*i64", "tiles": "*i32", "partials": "*fp32", "eta": "fp32"}
    element = getattr(tl, dtype)
    values = {"TUNED": element, "BASE": element, "OUT": element, "ALIGNED": True, "INTERP": False}
    return compiled(target, _delta_prep_kernel, signature, **values, BLOCK=4096)


def summed(target: tuple[str, int | str, int]) -> Any:
    from rlspec.kernels.delta import _SUMMED, _sum_tiles_kernel

    signature = {"partials": "*fp32", "starts": "*i64", "sums": "*fp64"}
    return compiled(target, _sum_tiles_kernel, signature, BLOCK=_SUMMED)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_nvidia_without_spills(capability: int, dtype: str, tmp_path: Path) -> None:
    kernel = prepared(("cuda", capability, 32), dtype)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = resource_usage(cubin)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, usage
    assert usage["REG"] <= 128, usage
    assert kernel.metadata.shared <= 1024  # the reductions between warps, nothing else
    assert not ATOMIC.search(kernel.asm["ptx"])
    vectors = re.findall(r"ld\.global\.v(\d)\.b32", kernel.asm["ptx"])
    assert vectors and set(vectors) == {"4"}, vectors  # 16 bytes a load: the pointers' alignment got through


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_for_amd_without_spills(dtype: str) -> None:
    listing = prepared(("hip", "gfx942", 64), dtype).asm["amdgcn"]
    assert not ATOMIC.search(listing)
    # Scalar registers may spill: into lanes of vector registers, not into memory.
    for counter in ("vgpr_spill_count", "private_segment_fixed_size"):
        found = re.findall(rf"\.{counter}:\s+(\d+)", listing)
        assert found == ["0"], (counter, found)


def test_the_sum_of_tiles_compiles_without_atomics(tmp_path: Path) -> None:
    kernel = summed(("cuda", 90, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = resource_usage(cubin)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, usage
    for listing in (kernel.asm["ptx"], summed(("hip", "gfx942", 64)).asm["amdgcn"]):
        assert not ATOMIC.search(listing)


def test_the_search_for_atomics_finds_them() -> None:
    for line in ("\tatom.global.gpu.acq_rel.add.f32 ", "\tred.global.add.f32 ", "\tglobal_atomic_add_f32 v0"):
        assert ATOMIC.search(line)


def resource_usage(cubin: Path) -> dict[str, int]:
    """REG, STACK, LOCAL… of the one kernel in a cubin, by the cuobjdump that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run(
        [tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", listing)}
