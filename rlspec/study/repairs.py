"""Restorations of a model in memory and their controls, each given as JSON settings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlspec.linalg.dense import thin_svd
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.perturb.matrix import MatrixBasis
from rlspec.restore import restore_
from rlspec.spectra import Rank, SpectralBasis
from rlspec.study.cells import Settings
from rlspec.study.context import Context
from rlspec.train.schedule import derived_seed


@pinned_arithmetic()
def restored(context: Context, model: Any, settings: Settings) -> float:
    """Change a model in place; returns the norm of the change over that of what was tuned, all its weights together.

    ``kind`` in settings: "restoration" (modes of :func:`rlspec.restore.restore_`, ``shift_k`` more directions than the
    rank says), "random" (the same, but each matrix's change replaced by a Gaussian one of its norm), "line" (every
    weight ``strength`` of the way to the base, WiSE-FT), "noise_floor" (see :func:`above_noise`).
    """
    tuned = {name: p.detach().clone() for name, p in model.named_parameters()}
    base = dict(context.base.named_parameters())
    kind = settings["kind"]
    if kind == "line":
        for name, p in model.named_parameters():
            p.data.lerp_(base[name].detach(), settings["strength"])
    else:
        basis = context.basis(settings["modules"], settings["layers"])
        if kind == "noise_floor":
            for projection in basis.projections:
                p = model.get_parameter(projection.tensor)
                weight, reference = projection.take(p.data), basis.matrix(projection.name)
                kept = above_noise(weight.double() - reference.W.double())
                projection.put(p.data, (reference.W.double() + kept).to(weight.dtype))
        else:
            _restore(model, basis, settings)
    if kind == "random":
        for name, p in model.named_parameters():
            seed = derived_seed(context.shared["seed"], "study", "random", name)
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            change = p.detach() - tuned[name]
            p.data = tuned[name] + noise * (change.norm() / noise.norm())
    changed = sum((p.detach() - tuned[n]).double().square().sum().item() for n, p in model.named_parameters())
    moved = sum((base[n].detach() - tuned[n]).double().square().sum().item() for n in tuned)
    return math.sqrt(changed / moved) if moved > 0 else 0.0


def _restore(model: Any, basis: SpectralBasis, settings: Settings) -> None:
    options = {"part": settings["part"], "mode": settings["mode"], "strength": settings["strength"]}
    if not settings["shift_k"]:
        restore_(model, basis, rank=settings["rank"], **options)
        return
    for projection in basis.projections:
        matrix = basis.matrix(projection.name)
        k = shifted(matrix, settings["rank"], settings["shift_k"])
        restore_(model, SpectralBasis([projection], [matrix], basis.rank), rank=k, **options)


def shifted(matrix: MatrixBasis, rank: Any, by: int) -> int:
    """The count that a rank means for a matrix, ``by`` more (or fewer), kept from 1 to all."""
    return min(max(Rank.parse(rank).resolve(matrix.S) + by, 1), int(matrix.S.shape[0]))


def above_noise(delta: Tensor) -> Tensor:
    """What of an update (m, n) stands above its noise floor, float64: its singular values over ω(β)·median(σ), with
    β the smaller side over the larger and ω(β) ≈ 0.56 β³ - 0.95 β² + 1.82 β + 1.43 (Gavish and Donoho 2014, arXiv
    1305.5870, for noise of unknown size); the repair of DG-Hard (arXiv 2605.20296)."""
    u, s, vh = thin_svd(delta.double())
    beta = min(delta.shape) / max(delta.shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    kept = torch.where(s > omega * s.median(), s, torch.zeros_like(s))
    return (u * kept) @ vh
