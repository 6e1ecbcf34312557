"""Each operation of :mod:`rlspec.ops` once more, in plain float64: what the fast ones are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaSums(NamedTuple):
    """E = W - W_ref of L matrices and the sums that metrics of an update start from."""

    delta: Tensor  #: (L, m, n)
    delta_sq: Tensor  #: (L,) float64, ||W - W_ref||²_F
    weight_sq: Tensor  #: (L,) float64, ||W||²_F
    reference_sq: Tensor  #: (L,) float64, ||W_ref||²_F
    unchanged: Tensor  #: (L,) int64, entries with |w - w_ref| <= eta max(|w|, |w_ref|)


def delta_prep_ref(weight: Tensor, reference: Tensor, *, eta: float) -> DeltaSums:
    """See :func:`rlspec.ops.delta_prep`; E and the sums in float64."""
    w, ref = weight.double(), reference.double()
    delta = w - ref
    unchanged = delta.abs() <= eta * torch.maximum(w.abs(), ref.abs())
    delta_sq, weight_sq, reference_sq = (x.square().sum((-2, -1)) for x in (delta, w, ref))
    return DeltaSums(delta, delta_sq, weight_sq, reference_sq, unchanged.sum((-2, -1)))
