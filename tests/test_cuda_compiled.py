"""csrc/cuda compiled by nvcc for every target, against limits that no compiler holds; no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("no nvcc", allow_module_level=True)

_STATIC_SHARED = 48 * 1024  # bytes a block has without asking for more, on every target
_REGISTERS, _LANES, _BLOCKS = 65536, 128, 4  # of a multiprocessor; of a block; blocks that are to fit
_KERNEL = re.compile(r"Compiling entry function '(\w+)'.*?(?=Compiling entry function|\Z)", re.DOTALL)


def nvcc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(NVCC), "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def compiled(target: str, out: Path, source: Path = CUDA) -> str:
    """What the assembler says of each kernel."""
    done = nvcc("-cubin", f"-arch={target}", "-Xptxas", "-v", str(source / "jacobi.cu"), "-o", str(out))
    assert done.returncode == 0, done.stderr
    return done.stderr


def problems(told: str) -> list[str]:
    """What breaks a limit, by kernel."""
    found = []
    for match in _KERNEL.finditer(told):
        text = match.group()
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", text)[1])  # type: ignore[index]
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", text)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", text)
        if stack or stores or loads:
            found.append(f"{match[1]}: spills")
        if registers * _LANES * _BLOCKS > _REGISTERS:
            found.append(f"{match[1]}: {registers} registers")
        if shared is not None and int(shared[1]) > _STATIC_SHARED:
            found.append(f"{match[1]}: {shared[1]} bytes of shared memory")
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_compiles_within_limits(target: str, tmp_path: Path) -> None:
    if target.replace("sm", "compute") not in nvcc("--list-gpu-arch").stdout.split():
        pytest.skip("this nvcc is older than the target")
    told = compiled(target, tmp_path / "jacobi.cubin")
    assert problems(told) == []
    steps = re.findall(
        r"^struct (\w+) \{\n  Jacobi<Real> job;", (CUDA / "jacobi.hpp").read_text(), re.MULTILINE
    )
    names = [match[1] for match in _KERNEL.finditer(told)]
    assert len(steps) >= 6 and len(names) == 2 * len(steps)  # in float64 and float32
    assert all(sum(step in name for name in names) == 2 for step in steps)


def test_the_gate_sees_spills_and_shared_memory(tmp_path: Path) -> None:
    shutil.copytree(CUDA, tmp_path / "crowded")
    source = tmp_path / "crowded" / "jacobi.cu"
    source.write_text(source.read_text().replace("(kLanes, 4)", "(kLanes, 16)"))  # 32 registers a lane
    told = compiled("sm_90", tmp_path / "jacobi.cubin", tmp_path / "crowded")
    assert any("Round" in problem and "spills" in problem for problem in problems(told))
    planted = told.replace("25864 bytes smem", "49153 bytes smem").replace(
        "Used 32 registers", "Used 129 registers"
    )
    assert any("49153 bytes of shared memory" in problem for problem in problems(planted))
    assert any("129 registers" in problem for problem in problems(planted))


def test_no_kernel_has_atomics(tmp_path: Path) -> None:
    """What adds up in the order of arrival would not be the same twice."""
    done = nvcc("-ptx", "-arch=sm_80", str(CUDA / "jacobi.cu"), "-o", str(tmp_path / "jacobi.ptx"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "jacobi.ptx").read_text()
    atomic = re.compile(r"^\s*(@\S+\s+)?(atom|red)\.", re.MULTILINE)
    assert "bar.sync" in text and not atomic.search(text)
    assert atomic.search(text + "\tatom.global.add.f64 \t%fd1, [%rd1], %fd2;\n")


def test_cusolver_compiles_where_its_headers_are(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cu"
    probe.write_text("#include <cusolverDn.h>\n")
    if nvcc("-E", str(probe), "-o", str(tmp_path / "probe.ii")).returncode:
        pytest.skip("no headers of cuSOLVER")
    done = nvcc("-c", "-arch=sm_90", str(CUDA / "cusolver.cu"), "-o", str(tmp_path / "cusolver.o"))
    assert done.returncode == 0, done.stderr


def test_a_library_without_a_device_says_so(tmp_path: Path) -> None:
    library = tmp_path / "jacobi.so"
    done = nvcc("-shared", "-arch=sm_80", "-Xcompiler", "-fPIC", str(CUDA / "jacobi.cu"), "-o", str(library))
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, torch; from pathlib import Path; from rlspec.linalg.libraries import JacobiLibrary\n"
        "from rlspec.errors import BackendError\n"
        "try: JacobiLibrary(Path(sys.argv[1])).rotate(torch.eye(40)[None])\n"
        "except BackendError as error: print(error)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-c", code, str(library)]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"one-sided Jacobi on cpu: .*(device|driver).*\n", said), said
