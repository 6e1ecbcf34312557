"""The exponent of the tail of a weight's eigenvalue density, as WeightWatcher defines it.

The density of the eigenvalues λ = σ² of WᵀW is taken for a power law λ^-α above some xmin (Martin and Mahoney, arXiv
1810.01075; Martin, Peng and Mahoney, Nature Communications 12, 2021). For each xmin α is the maximum likelihood
estimate, and the xmin is chosen whose power law lies nearest to the data by Kolmogorov and Smirnov (Clauset, Shalizi
and Newman, arXiv 0706.1062).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Eigenvalues up to this are left out, as WeightWatcher does, whatever the scale of the weight is.
THRESHOLD = 1e-5
#: With fewer eigenvalues no exponent is told.
FEWEST = 20


@dataclass(frozen=True)
class PowerLaw:
    """A power law fitted to the largest ``tail`` eigenvalues, those from ``xmin`` on; ``distance`` is that of Kolmogorov
    and Smirnov between the two distribution functions, in [0, 1]."""

    alpha: float
    xmin: float
    distance: float
    tail: int


def fit_power_law(sigma: Tensor) -> PowerLaw | None:
    """The power law of the eigenvalues σ² of a matrix.

    Takes r² / 2 exponentials for r values.

    Args:
        sigma: (r,) all singular values, in any order.

    Returns:
        None where fewer than `FEWEST` eigenvalues exceed `THRESHOLD`, or all of them are equal.
    """
    x = sigma.double().square().sort().values
    logs = x[x > THRESHOLD].log()
    n = logs.numel()
    if n < FEWEST or logs[0] == logs[-1]:
        return None
    counts = torch.arange(n, 0, -1, dtype=torch.float64)
    above = logs.flip(0).cumsum(0).flip(0) - counts * logs  # Σ log(λ / xmin) for each xmin
    best: tuple[float, int, float] | None = None
    for i, (total, count) in enumerate(zip(above[:-1].tolist(), range(n, 1, -1))):
        rest = logs[i:] - logs[i]
        if rest[-1] == 0:
            break
        slope = count / total  # α - 1
        # The share of the law below each eigenvalue against that of the data.
        distance = float(
            (-torch.expm1(-slope * rest) - torch.arange(count, dtype=torch.float64) / count).abs().max()
        )
        if best is None or distance < best[0]:
            best = distance, i, 1.0 + slope
    assert best is not None
    distance, at, alpha = best
    return PowerLaw(alpha, math.exp(float(logs[at])), distance, n - at)
