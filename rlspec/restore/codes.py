"""Restoring matrices that one of the two checkpoints, or both, store as fp8 codes with scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlspec.io.index import CheckpointIndex
from rlspec.io.projections import Projection
from rlspec.io.requantised import ScaledCodes
from rlspec.io.weights import CheckpointWeights
from rlspec.restore.matrix import is_plain_copy
from rlspec.restore.options import RestoreOptions
from rlspec.restore.plan import Step
from rlspec.restore.report import MatrixReport
from rlspec.restore.tensors import draws, restore_stored

Side = Tensor | ScaledCodes


class StoredWeights:
    """The tensors of a checkpoint as they are stored: numbers, or codes with their scale beside them."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._weights = CheckpointWeights.of(index)

    def side(self, name: str, stored: Tensor) -> Side:
        """A tensor that was read, with its scale where it has one; plain fp8 as float32."""
        scale = self._weights.scale_of(name)
        if scale is not None:
            return self._weights.codes(name, stored, scale)
        return stored.float() if stored.element_size() == 1 else stored


def restore_codes(
    step: Step, base: Side, tuned: Side, options: RestoreOptions, cache_dir: Path | None
) -> tuple[Tensor, Tensor | None, list[MatrixReport]]:
    """As `restore_stored`, of the numbers that the two sides stand for.

    Returns:
        The tensor to store; the scale to store with it, where that is codes; and a report of each matrix.
    """
    there = base.numbers() if isinstance(base, ScaledCodes) else base
    if not isinstance(tuned, ScaledCodes):
        out, rows = restore_stored(step, there, tuned, options, cache_dir)
        return out, None, rows
    here = tuned.numbers()
    plainly = replace(options, rounding="nearest")
    wanted, rows = restore_stored(replace(step, dtype=torch.float32), there, here, plainly, cache_dir)
    if _takes_over(step, base, tuned, options):
        assert isinstance(base, ScaledCodes)
        new = base
    else:
        new = tuned.replaced(wanted, draws=draws(options, step.name))
    told = [
        told_of_codes(row, projection, here, wanted, new)
        for row, projection in zip(rows, step.projections, strict=True)
    ]
    return new.codes, new.scale, told


def _takes_over(step: Step, base: Side, tuned: ScaledCodes, options: RestoreOptions) -> bool:
    """Whether the result is the base's own codes and scale: a plain copy, in the scheme that the output has."""
    (projection, *others) = step.projections
    return (
        isinstance(base, ScaledCodes)
        and is_plain_copy(options.restore_mode, options.strength, base.codes.dtype, tuned.codes.dtype)
        and (base.scale.dtype, base.scale.shape, base.block)
        == (tuned.scale.dtype, tuned.scale.shape, tuned.block)
        and not others
        and projection.rows is None
    )


def told_of_codes(
    row: MatrixReport, projection: Projection, before: Tensor, wanted: Tensor, new: ScaledCodes
) -> MatrixReport:
    """The report of a matrix restored to numbers, with what rounding those to codes did.

    Args:
        before, wanted: the whole tensors, (m, n) float32; ``new`` is what ``wanted`` became.
    """
    old, meant, stored = (projection.take(x) for x in (before, wanted, new.numbers()))
    lost = float((stored.double() - meant.double()).norm())
    return replace(
        row,
        dtype=str(new.codes.dtype).removeprefix("torch."),
        rounding_share=lost / row.change_frobenius if row.change_frobenius else 0.0,
        entries_changed=int(torch.count_nonzero(stored != old)),
    )
