"""Tracking with the kernels, in Triton's interpreter: the numbers of the CPU path, and no stored update.

Run by tests/test_spectra_kernels.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rlspec.kernels import delta_matmul as products
from rlspec.kernels import delta_stats as sums
from rlspec.kernels import sylvester_rotation as rotation
from rlspec.perturb.delta import DenseDelta
from rlspec.spectra import SpectralBasis, SpectralTracker
from rlspec.spectra.tracker import SpectralRecord

SHAPES = {"q_proj": (72, 72), "k_proj": (40, 72), "o_proj": (90, 50)}


def weights(eps: float, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reference and tuned weights: a wide, a tall and a square shape, two layers each."""
    g = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for layer in range(2):
        for kind, (m, n) in SHAPES.items():
            r = min(m, n)
            u, v = (torch.linalg.qr(torch.randn(d, r, generator=g))[0] for d in (m, n))
            w = (u * (3 / (1 + 4 * torch.arange(r) / r))) @ v.mT
            e = torch.randn(m, n, generator=g)
            name = f"model.layers.{layer}.self_attn.{kind}.weight"
            base[name], tuned[name] = w.to(dtype), (w + eps * e * w.norm() / e.norm()).to(dtype)
    return base, tuned


def measured(base: dict[str, Tensor], tuned: dict[str, Tensor], **options: Any) -> SpectralRecord:
    basis = SpectralBasis.from_tensors(base, modules="q,k,o")
    return SpectralTracker(basis).measure(tuned, step=1, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 2e-2])
def test_rows_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, eps: float, dtype: torch.dtype) -> None:
    base, tuned = weights(eps, dtype)
    on_cpu = measured(base, tuned)
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    with (
        mock.patch.object(products, "_product", side_effect=products._product) as launched,
        mock.patch.object(sums, "_check", side_effect=sums._check) as counted,
        mock.patch.object(rotation, "_launch", side_effect=rotation._launch) as turned,
        mock.patch.object(DenseDelta, "between", side_effect=AssertionError("E was stored")),
    ):
        by_kernel = measured(base, tuned)
    assert launched.call_count >= (2 if eps else 0) * len(SHAPES) and counted.call_count == len(SHAPES)
    assert turned.call_count >= (2 if eps else 0) * len(SHAPES)  # first order, and what it leaves over
    for mine, theirs in zip(by_kernel.rows, on_cpu.rows, strict=True):
        assert mine.keys() == theirs.keys()
        for column, value in theirs.items():
            if isinstance(value, float):
                # Bounds are taken from what rounding leaves over, here a few 1e-8 of the largest value.
                close = pytest.approx(value, rel=0.5 if "bound" in column else 1e-5, abs=1e-9)
                assert mine[column] == close, column
            else:
                assert mine[column] == value, column
    for name, values in on_cpu.arrays.items():
        # Float32 rounding of products with E, against E.
        torch.testing.assert_close(by_kernel.arrays[name], values, rtol=1e-6, atol=1e-6 * eps)


def test_nulls_and_a_weight_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlspec.errors import TensorError

    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    base, tuned = weights(1e-2, torch.bfloat16)
    record = measured(base, tuned, null_draws=1)
    assert all(row["null_draws"] == 1 and row["null_random_rad"] > 0 for row in record.rows)
    name = next(iter(tuned))
    tuned[name][3, 4] = torch.nan
    with pytest.raises(TensorError, match=name.replace(".", r"\.")):
        measured(base, tuned)


def test_threads_of_small_matrices_take_turns_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It patches Triton's language while a kernel runs, and puts it back, whoever else is in one."""
    base, tuned = weights(1e-3, torch.float32)
    on_cpu = measured(base, tuned)
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    monkeypatch.setattr("rlspec.linalg.workers._TINY_ENTRIES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        by_kernel = measured(base, tuned)
    finally:
        torch.set_num_threads(threads)
    for name, values in on_cpu.arrays.items():
        torch.testing.assert_close(by_kernel.arrays[name], values, rtol=1e-6, atol=1e-9)
