"""Libraries of small dense solves for a device: compiled where they run, at their first use, called by addresses.

The sources lie in csrc/cuda (`rlspec.kernels.cuda`). torch's extension loader compiles them with the nvcc that is there,
and keeps what it made for the next process. They know nothing of torch: tensors are passed as addresses.

Axes: ``b`` matrices of a batch, ``n`` rows and columns.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlspec.errors import BackendError
from rlspec.linalg.jacobi import MOST_SWEEPS, Rotated


class _Arrays(ctypes.Structure):
    """``rlspec::Arrays`` of csrc/cuda/interface.hpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("g", "v", "left", "right", "values", "status", "sweeps", "workspace")
    ]


class JacobiLibrary:
    """csrc/cuda/jacobi.cu."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._workspace = library.rlspec_jacobi_workspace
        self._workspace.argtypes, self._workspace.restype = [ctypes.c_int64] * 2, ctypes.c_int64
        self._solve = library.rlspec_jacobi
        self._solve.argtypes = [*[ctypes.c_int] * 4, _Arrays, ctypes.c_void_p]
        self._told = library.rlspec_error
        self._told.argtypes, self._told.restype = [ctypes.c_int], ctypes.c_char_p

    def rotate(self, g: Tensor, v: Tensor | None = None, *, most_sweeps: int = MOST_SWEEPS) -> Rotated:
        """Rotate columns until they are orthogonal.

        Args:
            g: (b, n, n) float64 or float32; row i is column i of A V.
            v: (b, n, n) of its dtype; row i is column i of the orthogonal V, or None where V is not wanted.

        Raises:
            BackendError: the device refuses the launches.
        """
        # Both are destroyed.
        g, v = g.clone(memory_format=torch.contiguous_format), _copied(v)
        b, n, _ = g.shape
        left, right, values = (
            torch.empty_like(g),
            None if v is None else torch.empty_like(g),
            g.new_empty(b, n),
        )
        status, sweeps = (g.new_empty(b, dtype=torch.int32) for _ in range(2))
        workspace = g.new_empty(self._workspace(b, n))
        arrays = _Arrays(*map(_address, (g, v, left, right, values, status, sweeps, workspace)))
        with _current(g.device) as stream:
            error = self._solve(g.element_size(), b, n, most_sweeps, arrays, stream)
        if error:
            raise BackendError(f"one-sided Jacobi on {g.device}: {self._told(error).decode()}")
        return Rotated(values, left, right, status, sweeps)


class CusolverLibrary:
    """csrc/cuda/cusolver.cu."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        address, size = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
        problem: Any = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, address, address
        room: Any = address, ctypes.c_size_t
        self._workspace, self._solve = library.rlspec_syev_workspace, library.rlspec_syev
        self._workspace.argtypes = (*problem, size, size)
        self._solve.argtypes = (*problem, address, *room, *room, address)
        # Kept until the next call: nobody says when the host's is no longer read.
        self._room: tuple[Tensor, ...] = ()

    def syev(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (b, n), ascending, eigenvectors as rows (b, n, n), and where it failed (b,) int32, not 0.

        Raises:
            BackendError: cuSOLVER refuses.
        """
        vectors = a.clone(memory_format=torch.contiguous_format)
        b, n, _ = a.shape
        values, info = a.new_empty(b, n), a.new_empty(b, dtype=torch.int32)
        on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
        problem = a.element_size(), b, n, vectors.data_ptr(), values.data_ptr()
        with _current(a.device) as stream:
            error = self._workspace(*problem, ctypes.byref(on_device), ctypes.byref(on_host))
            if not error:
                there = a.new_empty(on_device.value, dtype=torch.uint8)
                self._room = there, torch.empty(on_host.value, dtype=torch.uint8)
                rooms = [argument for each in self._room for argument in (each.data_ptr(), each.numel())]
                error = self._solve(*problem, info.data_ptr(), *rooms, stream)
        if error:
            raise BackendError(f"cusolverDnXsyevBatched on {a.device}: error {error}")
        return values, vectors, info


def compile_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, or None if it seems that it can."""
    from torch.utils import cpp_extension

    if device.type != "cuda" or torch.version.hip is not None:
        return f"the libraries are for CUDA devices, not {'ROCm' if device.type == 'cuda' else device.type}"
    if cpp_extension.CUDA_HOME is None:
        return "there is no nvcc (CUDA_HOME says where it is)"
    return None if cpp_extension.is_ninja_available() else "ninja is not installed"


@functools.cache
def compiled(name: str) -> Path:
    """The library made of csrc/cuda/<name>.cu for the devices here.

    Raises:
        BackendError: it does not compile.
    """
    from torch.utils import cpp_extension

    from rlspec.kernels import cuda

    source = Path(cuda.__file__).with_name(f"{name}.cu")
    try:
        cpp_extension.load(
            f"rlspec_{name}",
            [str(source)],
            extra_cuda_cflags=["-std=c++17"],
            extra_ldflags=["-lcusolver"] if name == "cusolver" else [],
            is_python_module=False,
        )
    except (RuntimeError, OSError, ImportError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        told = next(
            (line for line in said if "error:" in line), said[0]
        )  # below the compiler's long command line
        raise BackendError(f"{source} does not compile: {told}") from error
    (path,) = (Path(p) for p in torch.ops.loaded_libraries if Path(p).stem.startswith(f"rlspec_{name}"))
    return path


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone(memory_format=torch.contiguous_format)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@contextmanager
def _current(device: torch.device) -> Iterator[int | None]:
    """The stream that torch uses on a device now; the device is the runtime's, too, within."""
    if device.type != "cuda":
        yield None
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
