"""Flags and modes around a computation: pinned by the first call, put back by the last, whatever happens between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlspec.linalg import flags, precision

NEW = pytest.mark.skipif(not flags.has_backend_flags(), reason="this torch has one flag for all backends")


def readings() -> list[Any]:
    return [flag.read() for flag in flags.flags()]


@pytest.fixture(autouse=True)
def _flags_of_the_user() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")  # which lets TF32 in on CUDA, and oneDNN's bfloat16 on CPUs
    before = readings()
    yield
    assert readings() == before
    torch.set_float32_matmul_precision("highest")


def test_flags_are_put_back_even_after_an_error() -> None:
    before = readings()
    with precision.pinned_arithmetic():
        inside = readings()
        assert inside == [flag.wanted() for flag in flags.flags()] and inside != before
    assert readings() == before and torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(RuntimeError), precision.pinned_arithmetic():
        raise RuntimeError
    assert readings() == before


def test_a_flag_that_refuses_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary, before = flags.flags(), readings()

    def refuse(value: Any) -> None:
        raise RuntimeError("frozen")

    broken = flags.Flag(lambda: 0, refuse, lambda: 1)
    monkeypatch.setattr(precision, "flags", lambda: [*ordinary, broken])
    with pytest.raises(RuntimeError, match="frozen"), precision.pinned_arithmetic():
        pass
    assert readings() == before and precision._holders == 0


@NEW
@pytest.mark.parametrize("pays", [True, False])
def test_bfloat16_is_let_in_only_where_it_is_accurate(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """Where the CPU truly computes in it, what the user has set is kept out too."""
    monkeypatch.setattr(flags, "own_kernels_pay", lambda: pays)
    holder: Any = torch.backends.mkldnn
    assert holder.matmul.fp32_precision == "bf16"
    with precision.pinned_arithmetic():
        assert holder.matmul.fp32_precision == ("bf16" if pays else "ieee")
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_torch_without_flags_of_its_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.9 one setting rules TF32 and oneDNN's bfloat16 alike."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    assert not flags.has_backend_flags()
    with precision.pinned_arithmetic():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"


def test_products_inside_keep_float32_accuracy() -> None:
    a, b = torch.randn(3, 96, 300), torch.randn(3, 300, 80)
    truth = a.double() @ b.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with precision.pinned_arithmetic():
            for got, wanted in ((a @ b, truth), (a[0] @ b[0], truth[0]), (b.mT @ a.mT, truth.mT)):
                assert (got - wanted).norm() < 2e-6 * wanted.norm()
        assert ((a @ b) - truth).norm() > 2e-6 * truth.norm()  # the twin that must fail


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_found_of_a_cpu_does_not_hang_on_who_asks(dtype: torch.dtype) -> None:
    """The probe is kept for the process: one that ran under autocast would make it slow for good."""
    with precision.pinned_arithmetic():
        known = flags.own_kernels_are_accurate()
    flags.own_kernels_are_accurate.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), precision.pinned_arithmetic():
            assert flags.own_kernels_are_accurate() == known
    finally:
        torch.set_default_dtype(torch.float32)
    assert flags.own_kernels_are_accurate.cache_info().hits >= 1


def test_overlapping_calls_of_two_threads() -> None:
    """The first to leave puts nothing back while the other computes, and the last the user's flags, not the first's."""
    before, seen = readings(), []
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with precision.pinned_arithmetic():
            entered.set()
            assert left.wait(10)
            seen.append(readings())
        seen.append(readings())

    thread = threading.Thread(target=second)
    with precision.pinned_arithmetic():
        pinned = readings()
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join(10)
    assert seen == [pinned, before] and pinned != before


def test_a_flag_that_someone_sets_meanwhile_stays_set() -> None:
    torch.backends.mkldnn.enabled = False
    try:
        with precision.pinned_arithmetic():
            assert torch.backends.mkldnn.enabled
            torch.set_float32_matmul_precision("high")
        assert torch.get_float32_matmul_precision() == "high" and not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True
        torch.set_float32_matmul_precision("medium")


@NEW
def test_a_flag_that_follows_a_wider_one_goes_on_following_it() -> None:
    holder: Any = torch.backends
    before = readings()
    products = [torch.backends.cuda.matmul, holder.mkldnn.matmul]
    own = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "none"
        holder.fp32_precision = "tf32"
        with precision.pinned_arithmetic():
            assert [product.fp32_precision for product in products] != ["tf32", "tf32"]
        for wide in ("tf32", "ieee"):
            holder.fp32_precision = wide
            assert [product.fp32_precision for product in products] == [wide, wide]
    finally:
        holder.fp32_precision = "none"
        for product, value in zip(products, own, strict=True):
            product.fp32_precision = value
    assert readings() == before
