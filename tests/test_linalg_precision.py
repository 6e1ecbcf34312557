"""The product flags: chosen by measurement, restored whatever happens, and never at the price of accuracy."""

from __future__ import annotations

import pytest
import torch

from rlspec.linalg import precision


def flags() -> list[str]:
    holders = [torch.backends.cuda.matmul, precision._mkldnn_matmul()]
    return [getattr(holder, "fp32_precision", "") for holder in holders]


def test_flags_are_restored_even_after_an_error() -> None:
    before = flags()
    with precision.fast_matmul():
        pass
    assert flags() == before
    with pytest.raises(RuntimeError), precision.fast_matmul():
        raise RuntimeError
    assert flags() == before


@pytest.mark.parametrize("pays", [True, False])
def test_the_split_route_is_taken_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    holder = precision._mkldnn_matmul()
    if holder is None:
        pytest.skip("this torch has no such flag")
    monkeypatch.setattr(precision, "split_products_pay", lambda: pays)
    before = holder.fp32_precision
    with precision.fast_matmul():
        assert holder.fp32_precision == ("bf16" if pays else before)
    assert holder.fp32_precision == before


def test_products_inside_keep_float32_accuracy() -> None:
    a, b = torch.randn(3, 96, 300), torch.randn(3, 300, 80)
    truth = a.double() @ b.double()
    with precision.fast_matmul():
        for got, wanted in ((a @ b, truth), (a[0] @ b[0], truth[0]), (b.mT @ a.mT, truth.mT)):
            assert (got - wanted).norm() < 2e-6 * wanted.norm()
    assert (a.bfloat16() @ b.bfloat16() - truth).norm() > 2e-6 * truth.norm()  # the twin that must fail
