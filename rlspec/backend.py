"""Which backend computes on a device, decided once per device; and what this CPU can do.

``RLSPEC_BACKEND`` overrides the choice: ``torch`` runs plain PyTorch everywhere, ``triton`` insists on the
kernels and fails where they cannot run, ``auto`` (the default) takes Triton on a GPU that has it and PyTorch
elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from subprocess import CalledProcessError
from typing import Literal

import torch
from torch import Tensor

from rlspec.errors import BackendError, OptionError

Backend = Literal["torch", "triton"]
CHOICES = ("auto", "torch", "triton")
VARIABLE = "RLSPEC_BACKEND"
# Where we compute; ROCm's devices are "cuda" to torch. Others lack float64 (MPS), or nothing here was made for them.
_KINDS = ("cpu", "cuda")


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "the CPU runs Triton kernels only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"the kernels are for CUDA and ROCm devices, not {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"the kernels want compute capability 8.0 or later, {device} has {major}.{minor}"
    return _launch_problem()


@functools.cache
def _launch_problem() -> str | None:
    """Why Triton cannot launch kernels in this process, told once by a warning too; None if it can.

    It compiles a module in C that launches them, which it otherwise does at the first launch, amid a job: that needs a
    compiler, Python's headers and a folder to keep it in, and slim images lack one or the other.
    """
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018  made where it is first asked for
    except Exception as error:  # whatever it is, PyTorch computes the same
        told = (
            f"{error.cmd[0]} failed" if isinstance(error, CalledProcessError) else str(error).split("\n")[0]
        )
        problem = (
            f"Triton cannot launch kernels here ({type(error).__name__}: {told}); it needs a C compiler (gcc, clang or "
            "what CC names), Python's headers (python3-dev) and a cache that it can write (TRITON_CACHE_DIR)"
        )
        warnings.warn(f"{problem}; PyTorch computes instead, more slowly", RuntimeWarning, stacklevel=2)
        return problem
    return None


def triton_refusal(device: torch.device) -> str | None:
    """Why the Triton kernels are not taken on a device, be it that they cannot run; None if they are."""
    if backend_for(device) == "triton":
        return None
    choice = os.environ.get(VARIABLE, "auto")
    return (
        f"{VARIABLE}={choice}" if choice == "torch" else triton_problem(device) or f"{VARIABLE} is not triton"
    )


def interpreting() -> bool:
    """Triton runs kernels in its interpreter, on the CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def backend_for(device: torch.device | str) -> Backend:
    """The backend for tensors on a device.

    Raises:
        OptionError: ``RLSPEC_BACKEND`` holds an unknown name.
        BackendError: it asks for Triton where Triton cannot run.
    """
    return _decide(torch.device(device), os.environ.get(VARIABLE, "auto"))


@functools.cache
def _decide(device: torch.device, choice: str) -> Backend:
    if choice not in CHOICES:
        raise OptionError(f"{VARIABLE}={choice}: unknown backend; valid: {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and device.type == "cpu"):
        return "torch"
    problem = triton_problem(device)
    if problem is None:
        return "triton"
    if choice == "triton":
        raise BackendError(f"{VARIABLE}=triton, but {problem}")
    return "torch"


def cpu_capabilities() -> dict[str, str | bool | int]:
    """What torch can use of this CPU: vector instructions, hardware bfloat16, threads."""
    return {
        "vector": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": _cpu_has("_is_avx512_bf16_supported"),
        "amx": _cpu_has("_is_amx_tile_supported"),
        "threads": torch.get_num_threads(),
    }


def _cpu_has(probe: str) -> bool:
    function = getattr(torch.cpu, probe, None)  # private, and not in every release of torch
    return bool(function is not None and function())


def choose_device(name: str | torch.device) -> torch.device:
    """``auto`` is CUDA where there is some, else the CPU. Whether a ``torch.device`` is there is not asked.

    Raises:
        OptionError: A name that torch does not know, a device of another kind than CPU and CUDA, or a CUDA device that
            is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"device={name!r}: unknown device; valid: auto, cpu, cuda, cuda:<index>") from None
    if device.type not in _KINDS:
        raise OptionError(f"device={str(name)!r}: unsupported device; valid: auto, cpu, cuda, cuda:<index>")
    if isinstance(name, torch.device):
        return name
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def device_problem(device: torch.device) -> str | None:
    """What a message says of tensors on a device where we do not compute; None where we do."""
    if device.type in _KINDS:
        return None
    return (
        f"runs on the CPU and on CUDA and ROCm devices, found a tensor on {device}; move it to the CPU first"
    )


def where_computed(tensor: Tensor) -> Tensor:
    """The tensor itself where we compute, or without values; a copy on the CPU of one on any other device."""
    return tensor if tensor.is_meta or tensor.device.type in _KINDS else tensor.cpu()


def row_blocks(rows: int, width: int, most: int) -> Iterator[slice]:
    """Rows some at a time, so that temporaries stay in a processor's cache, or keep a device busy.

    Slices of ``rows`` rows of ``width`` entries each, in order: up to ``most`` entries at once, but a row at least.
    """
    step = max(1, most // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
