"""Every kernel, configuration and target compiled ahead of time: what a GPU would run, on a machine that has none.

A key holds no tensors and asks no driver, so any process can compile any key.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import triton
import triton.language as tl
from rlspec.kernels.configs import (
    FEW,
    GRAM,
    JACOBI,
    JACOBI_REGISTERS,
    NEAREST,
    PRODUCT,
    RECURRENCE,
    ROTATION,
    SHARED_LIMIT,
    SOME,
    Family,
    Precision,
    rounding_config,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TARGETS: dict[Family, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions of tensor cores, loads from global memory (in NVIDIA's, the bits of one load come last) and atomics.
_TENSOR = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma_\w+)")
_LOAD = re.compile(r"\bLDG(?:STS)?\.E\S*?(?:\.(64|128))?(?=[ ;])|\b(?:global|buffer)_load_(\w+)")
_ATOMIC = re.compile(r"^\s*(@\S+\s+)?(atom|red)\.|_atomic_", re.MULTILINE)
_LOADS_LITTLE = ("delta_stats._sum_tiles_kernel", "signs._signs_kernel")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short_d16": 2}


@dataclass(frozen=True)
class Key:
    """One compiled kernel: ``kernel`` is "module.function" in this package."""

    kernel: str
    target: Family
    variant: str
    signature: dict[str, str] = field(hash=False)  # of tensors and numbers
    constants: dict[str, Any] = field(hash=False)
    warps: int = 4
    stages: int = 3
    fused: bool = True  # a product and a sum may be rounded once
    registers: int | None = None  # what a thread may take, where that is told

    @property
    def name(self) -> str:
        return f"{self.kernel.split('.')[-1].strip('_')} {self.target} {self.variant}"


def keys() -> Iterator[Key]:
    """All that `rlspec` launches, and the products in bfloat16."""
    for target in TARGETS:
        yield from _stats_keys(target)
        for precision in (NEAREST[target], "bf16"):
            yield from _product_keys(target, precision)
        yield from _rounding_keys(target)
        yield _gram_key(target)
        yield _signs_key(target)
        yield from _recurrence_keys(target)
        yield from _residual_keys(target)
        yield from _rotation_keys(target)
        yield from _jacobi_keys(target)


def _stats_keys(target: Family) -> Iterator[Key]:
    signature = {"table": "*i64", "tiles": "*i32", "partials": "*fp32", "eta": "fp32"}
    for dtype in (tl.bfloat16, tl.float32):
        for out in (None, tl.float32):
            values = {
                "TUNED": dtype,
                "BASE": dtype,
                "OUT": out,
                "ALIGNED": True,
                "INTERP": False,
                "BLOCK": 4096,
            }
            variant = f"{dtype}{', E stored' if out is not None else ''}"
            yield Key("delta_stats._delta_stats_kernel", target, variant, signature, values)
    signature = {"partials": "*fp32", "starts": "*i64", "sums": "*fp64"}
    block = import_module("rlspec.kernels.delta_stats")._SUMMED
    yield Key("delta_stats._sum_tiles_kernel", target, "float64", signature, {"BLOCK": block})


def _product_keys(target: Family, precision: Precision) -> Iterator[Key]:
    numbers = [
        "R",
        "K",
        "C",
        "tuned_matrix",
        "tuned_row",
        "base_matrix",
        "base_row",
        "block_matrix",
        "block_row",
    ]
    sizes = PRODUCT[target, precision]
    for weights in ("bf16", "fp32") if precision == NEAREST[target] else ("bf16",):
        widths = {"many": sizes.many, f"up to {FEW}": sizes.few, f"up to {SOME}": sizes.some}
        for width, config in widths.items():
            assert config is not None
            for transposed in (False, True):
                signature = {"tuned": f"*{weights}", "base": f"*{weights}", "block": "*fp32", "out": "*fp32"}
                signature |= dict.fromkeys(numbers, "i32")
                values = {"TRANSPOSED": transposed, "PRECISION": precision, "INTERP": False}
                values |= {"BR": config.rows, "BC": config.columns, "BK": config.inner}
                tiles = f"{config.rows}x{config.columns}x{config.inner}"
                side = "transposed" if transposed else "plain"
                variant = f"{side}, {weights} weights, {precision} products, {width} columns, {tiles}"
                kernel = "delta_matmul._delta_matmul_kernel"
                yield Key(kernel, target, variant, signature, values, config.warps, config.stages)


def _rounding_keys(target: Family) -> Iterator[Key]:
    numbers = ["M", "N", "C", "first"]
    numbers += [
        f"{name}_{stride}" for name in ("tuned", "change", "right", "out") for stride in ("matrix", "row")
    ]
    for weights, dtype in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        signature = {"tuned": f"*{weights}", "change": "*fp32", "right": "*fp32", "out": f"*{weights}"}
        signature |= {"sums": "*fp64", "strength": "*fp64", "keys": "*i64"} | dict.fromkeys(numbers, "i32")
        for factors in (True, False):
            config = rounding_config(target, factors=factors)
            for draws in (False, True):
                values = {"FACTORS": factors, "DRAWS": draws, "SAME": True, "TO": dtype}
                values |= {"PRECISION": NEAREST[target], "INTERP": False}
                values |= {"BR": config.rows, "BC": config.columns, "BK": config.inner}
                change = "low-rank" if factors else "stored"
                variant = f"{change} change, {weights} weights, {'stochastic' if draws else 'nearest'}"
                kernel = "add_rounded._add_rounded_kernel"
                yield Key(
                    kernel, target, variant, signature, values, config.warps, config.stages, fused=False
                )


def _gram_key(target: Family) -> Key:
    signature = {"a": "*fp32", "out": "*fp32"} | dict.fromkeys(("M", "N", "a_matrix", "a_row"), "i32")
    config = GRAM[target]
    values = {"PRECISION": NEAREST[target], "BR": config.rows, "BK": config.inner}
    variant = f"{NEAREST[target]} products, {config.rows}x{config.columns}x{config.inner}"
    return Key("gram._gram_kernel", target, variant, signature, values, config.warps, config.stages)


def _signs_key(target: Family) -> Key:
    signature = {"key": "*i64", "out": "*i32", "counters": "i32"}
    block = import_module("rlspec.kernels.signs")._BLOCK
    return Key("signs._signs_kernel", target, f"{block} counters", signature, {"B": block})


def _recurrence_keys(target: Family) -> Iterator[Key]:
    tensors = ["matrix", "block", "current", "previous", "residual"]
    numbers = ["R", "K", "C", *(f"{name}_{stride}" for name in tensors for stride in ("matrix", "row"))]
    signature = dict.fromkeys((*tensors, "factors", "out"), "*fp32") | dict.fromkeys(numbers, "i32")
    config = RECURRENCE[target]
    # The block, the current and the previous one and of the residual.
    for what, kinds in {
        "first step": "stored stored absent absent",
        "plain": "stored stored stored absent",
        "with a residual": "stored stored stored stored",
        "first step of a sketch": "bits bits absent absent",
        "product with a sketch": "bits absent absent absent",
        "sketch added": "stored bits absent absent",
        "second step of a sketch": "stored stored bits absent",
    }.items():
        values = dict(zip(("BLOCK", "CURRENT", "PREVIOUS", "RESIDUAL"), kinds.split(), strict=True))
        # Where a sketch meets A and not C, Aᵀ is what is at hand.
        values |= {"TRANSPOSED": what == "product with a sketch", "PRECISION": NEAREST[target]}
        values |= {"BR": config.rows, "BC": config.columns, "BK": config.inner}
        variant = f"{NEAREST[target]} products, {what}"
        kernel = "chebyshev_step._chebyshev_step_kernel"
        bits = {name: "*i32" for name in tensors if values.get(name.upper()) == "bits"}
        yield Key(kernel, target, variant, signature | bits, values, config.warps, config.stages)


def _residual_keys(target: Family) -> Iterator[Key]:
    numbers = [
        "R",
        "K",
        "C",
        *(f"{name}_{stride}" for name in ("matrix", "x", "y") for stride in ("matrix", "row")),
    ]
    signature = (
        dict.fromkeys(("matrix", "x", "y", "s"), "*fp32")
        | {"squares": "*fp64"}
        | dict.fromkeys(numbers, "i32")
    )
    config = RECURRENCE[target]
    for transposed in (False, True):
        values = {"TRANSPOSED": transposed, "PRECISION": NEAREST[target]}
        values |= {"BR": config.rows, "BC": config.columns, "BK": config.inner}
        variant = f"{'transposed' if transposed else 'plain'}, {NEAREST[target]} products"
        kernel = "residual_norms._residual_norms_kernel"
        yield Key(kernel, target, variant, signature, values, config.warps, config.stages)


def _rotation_keys(target: Family) -> Iterator[Key]:
    blocks = ["left", "right", "u", "a", "vh", "b"]
    numbers = ["R", "C", "M", "N", "tail_matrix", "leading_matrix"]
    numbers += [f"{name}_{stride}" for name in blocks for stride in ("matrix", "row")]
    signature = dict.fromkeys((*blocks, "to_right", "to_left"), "*fp32") | {"floor": "fp32"}
    signature |= dict.fromkeys(("tail", "leading"), "*fp64") | dict.fromkeys(numbers, "i32")
    config = ROTATION[target]
    for products in (False, True):
        values = {"PRODUCTS": products, "PRECISION": NEAREST[target]}
        values |= {"BR": config.rows, "BC": config.columns, "BK": config.inner}
        variant = f"after two {NEAREST[target]} products" if products else "of stored couplings"
        kernel = "sylvester_rotation._sylvester_rotation_kernel"
        yield Key(kernel, target, variant, signature, values, config.warps, config.stages)


def _jacobi_keys(target: Family) -> Iterator[Key]:
    tensors = ("g", "v", "values", "left", "right")
    numbers = ["n", "most_sweeps", "g_matrix", "g_row", "v_matrix", "v_row"]
    for (tile, size), warps in JACOBI.items():
        dtype = torch.float32 if size == 4 else torch.float64
        signature = dict.fromkeys(tensors, f"*fp{8 * size}") | dict.fromkeys(("status", "sweeps"), "*i32")
        signature |= dict.fromkeys(numbers, "i32")
        values = {"EPS": torch.finfo(dtype).eps, "LARGEST": torch.finfo(dtype).max, "BN": tile}
        limit = JACOBI_REGISTERS if target.startswith("sm_") else None
        for right in (True, False):
            variant = f"float{8 * size}, up to {tile} columns, {'both sides' if right else 'left vectors'}"
            kernel = "jacobi._jacobi_kernel"
            yield Key(
                kernel, target, variant, signature, values | {"RIGHT": right}, warps, 1, registers=limit
            )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a key.

    ``spilled_bytes`` is a thread's memory outside registers; ``tensor`` the instructions of tensor cores and
    ``loads`` the bytes that loads from global memory take at once, each with its number in the listing.
    """

    registers: int
    shared_bytes: int
    spilled_bytes: int
    tensor: dict[str, int]
    loads: dict[str, int]
    atomics: bool

    def problems(self, key: Key) -> list[str]:
        """Why this must not be shipped; empty where it may."""
        found = []
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled")
        if self.shared_bytes > SHARED_LIMIT[key.target]:  # no compiler checks this
            found.append(f"{self.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[key.target]}")
        multiplies = "PRECISION" in key.constants and key.constants.get(
            "FACTORS", key.constants.get("PRODUCTS", True)
        )
        if multiplies and not self.tensor:
            found.append("no instruction of tensor cores")
        if "16" not in self.loads and key.kernel not in _LOADS_LITTLE:
            found.append("no load of 16 bytes: the alignment of the pointers is lost")
        if self.atomics:
            found.append("atomics: sums would hang on the order of programs")
        return found


def compiled(key: Key) -> Compiled:
    """Compile a key and look at what came of it."""
    made = built(key)
    return _nvidia(made) if "cubin" in made.asm else _amd(made)


def built(key: Key) -> Any:
    """A key as Triton's compiler leaves it."""
    module, _, function = key.kernel.partition(".")
    kernel = getattr(import_module(f"rlspec.kernels.{module}"), function)
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in key.constants.items()}
    # Tensors of torch begin at multiples of 16 bytes; sizes and strides of weights are mostly multiples of 16 too.
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in key.signature.items()
        if kind != "fp32"
    }
    source = ASTSource(
        kernel, key.signature | dict.fromkeys(key.constants, "constexpr"), constants, attributes
    )
    # The default of fusion differs between releases.
    options = {"num_warps": key.warps, "num_stages": key.stages, "enable_fp_fusion": key.fused}
    if key.registers is not None:
        options["maxnreg"] = key.registers
    return compile(source, target=TARGETS[key.target], options=options)


def _nvidia(made: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = _output(str(tool), "-res-usage", str(cubin))
        listing = _output(str(tool.with_name("nvdisasm")), "-c", str(cubin))
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return Compiled(
        registers=used["REG"],
        shared_bytes=made.metadata.shared,
        spilled_bytes=used["STACK"] + used["LOCAL"],
        tensor=_counted(m[1] for m in _TENSOR.finditer(listing)),
        loads=_counted(str(int(m[1] or 32) // 8) for m in _LOAD.finditer(listing)),
        atomics=bool(_ATOMIC.search(made.asm["ptx"])),
    )


def _amd(made: Any) -> Compiled:
    listing = made.asm["amdgcn"]

    def counter(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", listing)[0])

    return Compiled(
        registers=counter("vgpr_count"),
        shared_bytes=made.metadata.shared,
        # Scalar registers may spill: into lanes of vector registers, not into memory.
        spilled_bytes=4 * counter("vgpr_spill_count") + counter("private_segment_fixed_size"),
        tensor=_counted(m[1] for m in _TENSOR.finditer(listing)),
        loads=_counted(str(_AMD_BYTES.get(m[2], m[2])) for m in _LOAD.finditer(listing)),
        atomics=bool(_ATOMIC.search(listing)),
    )


def _counted(found: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(found).items()))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
