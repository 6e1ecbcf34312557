"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, for the hidden matrices of a model.

``torch.optim.Muon`` iterates in bfloat16, which CPUs without bfloat16 units emulate far slower than float32;
this one stays in the parameters' dtype and orthogonalises all matrices of one shape in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

#: Coefficients of the quintic Newton–Schulz iteration (K. Jordan, "Muon", 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix close to 1 (0.7 to 1.2), keeping its singular vectors.

    Args:
        G: (batch, m, n), floating point.
        steps: Newton–Schulz iterations.
    """
    a, b, c = _QUINTIC
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon:
    """Nesterov momentum, orthogonalised; the step is scaled by sqrt(max(1, m/n))."""

    def __init__(self, parameters: Iterable[Tensor], momentum: float = 0.95) -> None:
        groups: dict[torch.Size, list[Tensor]] = {}
        for p in parameters:
            groups.setdefault(p.shape, []).append(p)
        self.groups = [(ps, [torch.zeros_like(p) for p in ps]) for ps in groups.values()]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        for parameters, buffers in self.groups:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            updates = orthogonalise(torch.stack(torch._foreach_lerp(gradients, buffers, self.momentum)))
            m, n = parameters[0].shape
            torch._foreach_mul_(parameters, 1 - learning_rate * weight_decay)
            torch._foreach_add_(
                parameters, updates.unbind(0), alpha=-learning_rate * math.sqrt(max(1.0, m / n))
            )

    def zero_grad(self) -> None:
        for parameters, _ in self.groups:
            for p in parameters:
                p.grad = None
