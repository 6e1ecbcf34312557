"""delta_stats in Triton's interpreter, against float64, and faults put into it on purpose.

Run by tests/test_op_delta_stats.py in a process with TRITON_INTERPRET=1.

The interpreter cannot show races, alignment or register use; the ahead-of-time test looks at the latter.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from interpreter_toys import HALO, in_halo, shuffle_programs, whole_buffer, with_fault
from torch import Tensor

from rlspec.kernels import delta_stats as kernel
from rlspec.kernels.delta_stats import PairSums, delta_stats_triton
from rlspec.ops.delta_stats import delta_stats
from rlspec.ops.reference import delta_stats_ref

# float32: a relative rounding of 2^-24 for the difference (twice, it is squared), the square, and each of the
# at most 12 levels of a sum over 4096 positive terms; 4 more for the interpreter's blocked sums.
SUM_BAR = (2 + 1 + 12 + 4) * 2.0**-24

SHAPES = [(1, 1), (1, 17), (63, 65), (17, 129), (64, 64), (3, 1)]


def reference(tuned: Tensor, base: Tensor, eta: float) -> tuple[Tensor, list[float]]:
    """E in float64 and [‖E‖², ‖W‖², ‖W_ref‖², changed, non-finite]."""
    w, w_ref = tuned.double(), base.double()
    e = w - w_ref
    changed = e.abs() > eta * torch.maximum(w.abs(), w_ref.abs())
    finite = torch.isfinite(w) & torch.isfinite(w_ref)
    sums = [(x * x).sum().item() for x in (e, w, w_ref)]
    return e, [*sums, float(changed.sum()), float((~finite).sum())]


def pairs(dtype: torch.dtype, base_dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    base = [torch.randn(shape).to(base_dtype) for shape in SHAPES]
    tuned = []
    for w_ref in base:
        step = torch.randn(w_ref.shape) * 1e-2 * (torch.rand(w_ref.shape) < 0.5)  # half of the entries stay
        tuned.append(in_halo((w_ref.float() + step).to(dtype)))
    return tuned, [in_halo(w_ref) for w_ref in base]


def places(tuned: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Where E may go."""
    return [torch.empty(w.shape, dtype=dtype) for w in tuned]


def check(
    result: PairSums, tuned: list[Tensor], base: list[Tensor], eta: float, out: list[Tensor] | None = None
) -> None:
    for i, (w, w_ref) in enumerate(zip(tuned, base)):
        e, (delta_sq, tuned_sq, base_sq, changed, nonfinite) = reference(w, w_ref, eta)
        # The float32 difference of two numbers of at most 24 bits is rounded once, then once more to E's dtype.
        assert out is None or torch.equal(out[i], e.float().to(out[i].dtype))
        for got, expected in (
            (result.delta_sq[i], delta_sq),
            (result.tuned_sq[i], tuned_sq),
            (result.base_sq[i], base_sq),
        ):
            assert got.dtype == torch.float64
            assert abs(got.item() - expected) <= SUM_BAR * expected
        assert (result.changed[i].item(), result.nonfinite[i].item()) == (changed, nonfinite)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("block", [128, 1024, 4096])
@pytest.mark.parametrize(
    ("dtype", "base_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_against_float64(dtype: torch.dtype, base_dtype: torch.dtype, block: int) -> None:
    tuned, base = pairs(dtype, base_dtype)
    out = places(tuned, torch.float32)
    result = delta_stats_triton(tuned, base, out=out, block=block)
    check(result, tuned, base, 1e-3, out)
    alone = delta_stats_triton(tuned, base, block=block)
    assert all(torch.equal(a, b) for a, b in zip(result, alone))  # E is not needed for its sums
    assert 0 < result.changed.sum() < sum(w.numel() for w in tuned)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_out_dtype_and_eta(out_dtype: torch.dtype, eta: float) -> None:
    tuned, base = pairs(torch.bfloat16, torch.bfloat16)
    out = places(tuned, out_dtype)
    check(delta_stats_triton(tuned, base, eta=eta, out=out), tuned, base, eta, out)


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    """Every kind of float32: ties to even both ways, the largest, subnormals, infinities, NaN."""
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 64), dtype=torch.int64)
    bits[:32] = bits[:32] & ~0xFFFF | 0x8000  # exact ties
    special = [0x7F7FFFFF, 0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, -1, 1, 0x8000, 0x18000, -0x80000000]
    bits.view(-1)[: len(special)] = torch.tensor(special)
    w = bits.to(torch.int32).view(torch.float32)
    out = places([w], torch.bfloat16)
    delta_stats_triton([w], [torch.zeros_like(w)], out=out)
    torch.testing.assert_close(out[0], w.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def nan_and_infinity(module: ModuleType) -> None:
    tuned, base = pairs(torch.bfloat16, torch.bfloat16)
    tuned[2][5, 7] = math.nan
    tuned[2][6, 7] = math.inf
    base[2][5, 7] = math.inf
    base[2][0, 0] = -math.inf
    tuned[2][1, 1] = base[2][1, 2] = math.nan  # beside a finite number
    result = module.delta_stats_triton(tuned, base)
    assert result.nonfinite.tolist() == [0, 0, 5, 0, 0, 0]
    assert not torch.isfinite(result.tuned_sq[2]) and not torch.isfinite(result.delta_sq[2])
    others = [i for i in range(len(SHAPES)) if i != 2]
    check(
        PairSums(*(field[others] for field in result)),
        [tuned[i] for i in others],
        [base[i] for i in others],
        1e-3,
    )


def test_nan_and_infinity_are_counted_and_do_not_spread_to_other_matrices() -> None:
    nan_and_infinity(kernel)


def writes_stay_inside(module: ModuleType) -> None:
    tuned, base = pairs(torch.bfloat16, torch.bfloat16)
    out = [in_halo(torch.zeros(w.shape)) for w in tuned]
    check(module.delta_stats_triton(tuned, base, eta=0.0, out=out, block=128), tuned, base, 0.0, out)
    for view in out:
        assert whole_buffer(view).isnan().sum() == 2 * HALO


def test_writes_stay_inside() -> None:
    writes_stay_inside(kernel)


FAULTS = {
    "mask one too far": ("inside = at < entries", "inside = at < entries + 1"),
    "mask one too short": ("inside = at < entries", "inside = at < entries - 1"),
    "stored without a mask": ("tl.store(out + at, e.to(OUT), mask=inside)", "tl.store(out + at, e.to(OUT))"),
    "the other sign": ("e = w - w_ref", "e = w_ref - w"),
    "every program the first tile": ("at = tile.to(tl.int64) * BLOCK +", "at = tl.cast(0, tl.int64) +"),
    "every program the first matrix": ("row = table + 4 * matrix", "row = table"),
    "squares in bfloat16": ("tl.sum(e * e)", "tl.sum((e * e).to(tl.bfloat16).to(tl.float32))"),
    "reference's squares for the weight's": ("tl.sum(w * w)", "tl.sum(w_ref * w_ref)"),
    "unmoved entries counted": ("tl.abs(e) > eta * larger", "tl.abs(e) >= eta * larger"),
    "NaN counts as finite": ("(tl.abs(w) < infinity)", "(tl.abs(w) != infinity)"),
    "NaN of the reference counts as finite": ("(tl.abs(w_ref) < infinity)", "(tl.abs(w_ref) != infinity)"),
    "last tile not added": ("range(first, stop, BLOCK)", "range(first, stop - 1, BLOCK)"),
    "a tile of the next matrix added": ("mask=at < stop", "mask=at < stop + 1"),
    "sums of the first column": ("partials + 5 * at + column", "partials + 5 * at"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, tmp_path: Path) -> None:
    module = with_fault(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):  # a wrong number, not an exception of another kind
        writes_stay_inside(module)
        nan_and_infinity(module)


def test_result_does_not_depend_on_the_neighbours() -> None:
    tuned, base = pairs(torch.bfloat16, torch.bfloat16)
    together = delta_stats_triton(tuned, base)
    for i, pair in enumerate(zip(tuned, base)):
        alone = delta_stats_triton([pair[0]], [pair[1]])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together))


@triton.jit
def _atomic_twin(x, total, entries, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(x + at, mask=at < entries, other=0.0)
    tl.atomic_add(total, tl.sum(tile * tile))


def test_no_bit_depends_on_the_order_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base = (side[1:4] for side in pairs(torch.float32, torch.float32))
    x = max(tuned, key=Tensor.numel)

    def atomic() -> float:
        total = torch.zeros(1)
        _atomic_twin[(triton.cdiv(x.numel(), 256),)](x, total, x.numel(), BLOCK=256)
        return total.item()

    stored = places(tuned, torch.float32)
    ordered, twin = delta_stats_triton(tuned, base, out=stored, block=256), {atomic()}
    for seed in range(4):
        shuffle_programs(monkeypatch, seed)
        out = places(tuned, torch.float32)
        found = delta_stats_triton(tuned, base, out=out, block=256)
        assert all(torch.equal(a, b) for a, b in zip([*stored, *ordered], [*out, *found]))
        twin.add(atomic())
    assert len(twin) > 1  # the broken twin: what atomics add up hangs on the order


def test_nothing_is_added_up_outside_the_kernels() -> None:
    """index_add_ and its kin add by atomics on a GPU; the launcher calls nothing that adds floating numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                called.add(function.overloadpacket.__name__)
            return out

    called: set[str] = set()
    tuned, base = pairs(torch.bfloat16, torch.bfloat16)
    with Recorder():
        delta_stats_triton(tuned, base)
        adding = {name for name in called if re.search("add|sum|put|scatter|reduce|copy|mm", name)}
        assert called and not adding, adding
        torch.zeros(2).index_add_(0, torch.tensor([0, 0]), torch.ones(2))
    assert "index_add_" in called  # the twin that the recorder sees


def test_matrices_of_more_tiles_than_are_added_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number at a time is another order of additions, and no other sum than to float64's rounding."""
    from rlspec.kernels import delta_stats as module

    tuned, base = pairs(torch.bfloat16, torch.bfloat16)
    whole = delta_stats_triton(tuned, base, block=256)
    monkeypatch.setattr(module, "_SUMMED", 4)
    parts = delta_stats_triton(tuned, base, block=256)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_the_bar_catches_sums_in_bfloat16() -> None:
    """The broken twin: squares rounded to bfloat16 before they are summed exceed the bar by far."""
    w = torch.randn(63, 65).to(torch.bfloat16)
    exact = (w.double() ** 2).sum().item()
    broken = (w * w).double().sum().item()
    assert abs(broken - exact) > 10 * SUM_BAR * exact


@pytest.mark.parametrize(
    ("tuned", "base", "message"),
    [
        ([], [], "as many"),
        ([torch.zeros(2, 2)], [torch.zeros(2, 3)], "shapes"),
        ([torch.zeros(0, 2)], [torch.zeros(0, 2)], "non-empty"),
        ([torch.zeros(2, 2), torch.zeros(2, 2).half()], [torch.zeros(2, 2)] * 2, "one dtype"),
        ([torch.zeros(2, 2).double()], [torch.zeros(2, 2)], "float64"),
        ([torch.zeros(2, 3).T], [torch.zeros(3, 2)], "contiguous"),
    ],
)
def test_refusals(tuned: list[Tensor], base: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_stats_triton(tuned, base)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_public_operation_runs_the_kernel(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    base = torch.randn(3, 33, 17)
    step = 1e-2 * torch.randn(base.shape) * (torch.rand(base.shape) < 0.5)
    weight, reference_weight = (base + step).to(dtype), base.to(dtype)
    out = torch.empty(base.shape)
    found = delta_stats(weight, reference_weight, eta=1e-3, out=out)
    truth = delta_stats_ref(weight, reference_weight, eta=1e-3)
    assert torch.equal(out, (weight.double() - reference_weight.double()).float())
    for got, expected in zip(found[:3], truth[:3]):
        assert bool(((got - expected).abs() <= SUM_BAR * expected).all())
    assert torch.equal(found.unchanged, truth.unchanged)
