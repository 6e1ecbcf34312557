"""Which implementation of an operation runs, by device, dtypes and shape: one table, in order of preference.

The first that belongs to the device, whose backend is the device's (:mod:`rlspec.backend`) and that fits is taken. One
that is passed over has a reason, which `rlspec env` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rlspec.backend import Backend, backend_for, triton_refusal

Dtypes = tuple[torch.dtype, ...]
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MOST_MATRICES = 65535  # of a stack: the second axis of a grid


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    ``misfit(dtypes, shape)`` says why it cannot take such arguments, or None; ``devices`` are kinds, none meaning all.
    """

    name: str
    backend: Backend
    misfit: Callable[[Dtypes, Sequence[int]], str | None] = lambda dtypes, shape: None
    devices: tuple[str, ...] = ()

    def fits(self, dtypes: Dtypes, shape: Sequence[int]) -> bool:
        return self.misfit(dtypes, shape) is None

    def refusal(self, device: torch.device, dtypes: Dtypes, shape: Sequence[int]) -> str | None:
        """Why it does not run for such arguments on a device, or None where it can."""
        if self.devices and device.type not in self.devices:
            return f"for {' and '.join(self.devices)}, not {device.type}"
        if self.backend == "triton" and (reason := triton_refusal(device)) is not None:
            return reason
        return self.misfit(dtypes, shape)


def _kernel_misfit(dtypes: Dtypes, shape: Sequence[int]) -> str | None:
    for dtype in dtypes:
        if dtype not in _KERNEL_DTYPES:
            return f"the kernel takes float32, bfloat16 and float16, not {_name(dtype)}"
    return "nothing to compute" if 0 in shape else None


def _stack_misfit(dtypes: Dtypes, shape: Sequence[int]) -> str | None:
    """Of kernels that give each matrix a row of the grid; ``shape`` begins with L."""
    if shape[0] > _MOST_MATRICES:
        return f"the kernel takes up to {_MOST_MATRICES} matrices, not {shape[0]}"
    return _kernel_misfit(dtypes, shape)


def _product_misfit(dtypes: Dtypes, shape: Sequence[int]) -> str | None:
    """``dtypes`` of W, W_ref and the block; ``shape`` (L, m, n, c)."""
    if dtypes[-1] != torch.float32:
        return f"the kernel multiplies float32 blocks, not {_name(dtypes[-1])}"
    return _stack_misfit(dtypes, shape)


def _rounding_misfit(dtypes: Dtypes, shape: Sequence[int]) -> str | None:
    """``dtypes`` of the weight, the change or its factors, and the result; ``shape`` begins with (L, m, n)."""
    if dtypes[1] != torch.float32:
        return f"the kernel adds float32 changes, not {_name(dtypes[1])}"
    return _stack_misfit(dtypes, shape)


def _float32_misfit(dtypes: Dtypes, shape: Sequence[int]) -> str | None:
    """``dtypes`` of the matrices and their blocks; ``shape`` begins with (L, m, n)."""
    for dtype in dtypes:
        if dtype != torch.float32:
            return f"the kernel takes float32, not {_name(dtype)}"
    return _stack_misfit(dtypes, shape)


#: operation -> its implementations, the preferred first; the last one takes everything
TABLE: dict[str, tuple[Implementation, ...]] = {
    "delta_stats": (
        Implementation("triton", "triton", _kernel_misfit),
        Implementation(
            "whole", "torch", devices=("cuda",)
        ),  # few launches; temporaries as large as the weights
        Implementation("row blocks", "torch"),  # temporaries that stay in a processor's cache
    ),
    "delta_matmul": (
        Implementation("triton", "triton", _product_misfit),
        Implementation("row blocks", "torch"),
    ),
    "add_rounded": (
        Implementation("triton", "triton", _rounding_misfit),
        Implementation("row blocks", "torch"),
    ),
    "add_low_rank": (
        Implementation("triton", "triton", _rounding_misfit),
        Implementation("row blocks", "torch"),
    ),
    "gram": (
        Implementation("triton", "triton", _float32_misfit),
        Implementation("halves", "torch"),
    ),
    # Its product alone, as for Lanczos vectors and the image A y, is left to torch.bmm.
    "chebyshev_step": (
        Implementation("triton", "triton", _float32_misfit),
        Implementation("in place", "torch"),
    ),
    "residual_norms": (
        Implementation("triton", "triton", _float32_misfit),
        Implementation("stored", "torch"),
    ),
    "sylvester_rotation": (
        Implementation("triton", "triton", _float32_misfit),
        Implementation("elementwise", "torch"),
    ),
}
# Tensors that each takes: W and W_ref, and a block; a weight, a change, and the result;
# a matrix as it is decomposed.
_ARGUMENTS: dict[str, Callable[[torch.dtype, torch.dtype], Dtypes]] = {
    "delta_stats": lambda weights, wide: (weights, weights),
    "delta_matmul": lambda weights, wide: (weights, weights, wide),
    "add_rounded": lambda weights, wide: (weights, wide, weights),
    "add_low_rank": lambda weights, wide: (weights, wide, weights),
    "gram": lambda weights, wide: (wide,),
    "chebyshev_step": lambda weights, wide: (wide,),
    "residual_norms": lambda weights, wide: (wide,) * 4,
    "sylvester_rotation": lambda weights, wide: (wide,),
}
_LARGE = (1, 4096, 4096, 1024)  # sizes that `summary` asks about


def choose(op: str, device: torch.device, dtypes: Dtypes, shape: Sequence[int]) -> str:
    """The name of the implementation that runs.

    Args:
        op: a key of `TABLE`.
        dtypes: of the operation's tensors, in the order of its arguments.
        shape: sizes that it depends on, the stack's first.

    Raises:
        OptionError: ``RLSPEC_BACKEND`` holds an unknown name.
        BackendError: it asks for Triton where Triton cannot run.
    """
    backend = backend_for(device)
    for candidate in TABLE[op]:
        if candidate.backend not in (backend, "torch"):
            continue
        if (not candidate.devices or device.type in candidate.devices) and candidate.fits(dtypes, shape):
            return candidate.name
    raise AssertionError(f"{op}: the last implementation of the table takes everything")


def passed_over(
    op: str, device: torch.device, dtypes: Dtypes, shape: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Implementations preferred to the chosen one, each with the reason why it does not run."""
    chosen = choose(op, device, dtypes, shape)
    for candidate in TABLE[op]:
        if candidate.name == chosen:
            return
        yield candidate.name, candidate.refusal(device, dtypes, shape) or ""


def summary(op: str, device: torch.device) -> str:
    """What runs on a device by the dtype of the weights, and why not what is preferred: a line for `rlspec env`."""
    chosen: dict[str, list[str]] = {}
    reasons: dict[str, None] = {}
    for weights in _SHOWN:
        # Products are taken in float32 unless the weights hold more.
        wide = weights if weights == torch.float64 else torch.float32
        arguments = op, device, _ARGUMENTS[op](weights, wide), _LARGE
        chosen.setdefault(choose(*arguments), []).append(_name(weights))
        reasons |= {f"{name}: {why}": None for name, why in passed_over(*arguments)}
    if len(chosen) == 1:
        told = next(iter(chosen))
    else:
        told = ", ".join(f"{name} for {' '.join(dtypes)}" for name, dtypes in chosen.items())
    return f"{told} ({'; '.join(reasons)})" if reasons else told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
