"""Restoring one stored tensor: the matrices in it one by one, or row blocks of any shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rlspec.errors import TensorError
from rlspec.io.projections import check_finite
from rlspec.linalg.dense import lapack_svd
from rlspec.linalg.rank import Rank
from rlspec.ops.add_rounded import ChangeSums, add_rounded
from rlspec.ops.draws import Draws
from rlspec.perturb.matrix import MatrixBasis, matrix_basis
from rlspec.restore.matrix import RestoreResult, difference, is_plain_copy, restore_matrix
from rlspec.restore.options import RestoreOptions
from rlspec.restore.plan import Step
from rlspec.restore.report import MatrixReport
from rlspec.spectra.cache import cached_factors

# Entries of one block of the elementwise modes.
BLOCK_ENTRIES = 1 << 21
Block = tuple[int, Tensor, Tensor]  # index of the first row; base's rows; tuned rows


class NotFiniteError(TensorError):
    """NaN or infinity in one of the two sides, "base" or "tuned"."""

    def __init__(self, side: str, message: str) -> None:
        super().__init__(message)
        self.side = side


@dataclass
class Changes:
    """The figures of :class:`RestoreResult` for a tensor restored entry by entry, from sums over its row blocks."""

    k: int
    sums: ChangeSums = field(default_factory=ChangeSums)
    error_estimate: float = 0.0
    rotation_sine_rms: float | None = None
    method: str = "none"
    note: str | None = None

    @property
    def change_frobenius(self) -> float:
        return self.sums.frobenius

    @property
    def change_relative(self) -> float:
        return self.sums.relative

    @property
    def rounding_share(self) -> float:
        return self.sums.rounding_share

    @property
    def entries_changed(self) -> int:
        return self.sums.entries_changed


def restore_stored(
    step: Step, base: Tensor, tuned: Tensor, options: RestoreOptions, cache_dir: Path | None
) -> tuple[Tensor, list[MatrixReport]]:
    """The new content of a tensor that is held whole.

    Args:
        step: what to do.
        base, tuned: the whole stored tensors, (in, out) for transposed ones; left as they are.

    Returns:
        The tensor to store, ``step.dtype``, and a report of each matrix.

    Raises:
        NotFiniteError: in one of the matrices; names it.
    """
    assert step.dtype is not None
    rows = []
    out: Tensor | None = None
    for projection, shape in step.matrices():
        there, here = projection.take(base), projection.take(tuned)
        _check_sides(projection.name, there, here)
        if options.elementwise or _nothing_to_do(there, here, options):
            settings = options if options.elementwise else unchanged(options)
            changes = Changes(min(shape) if options.elementwise else 0)
            weight = elementwise(projection.name, there, here, step.dtype, settings, changes)
            rows.append(MatrixReport.of(projection, shape, step.dtype, changes))
        else:
            try:
                basis = base_factors(projection.name, there, options, cache_dir)
                moved = here.to(options.device)
                result = restore_with(basis, projection.name, moved, step.dtype, options)
            except TensorError as error:
                raise TensorError(f"{projection.name}: {error}") from None
            weight = result.weight.cpu()
            rows.append(MatrixReport.of(projection, shape, step.dtype, result))
        if projection.rows is None and not projection.transposed:
            return weight, rows
        if out is None:
            out = converted(step.name, tuned, step.dtype, options)
        projection.put(out, weight)
    assert out is not None
    return out, rows


def base_factors(label: str, weight: Tensor, options: RestoreOptions, cache_dir: Path | None) -> MatrixBasis:
    """The base's decomposition, from the cache where it is there."""
    weight = weight.contiguous()
    factors = lapack_svd(weight.double()) if options.exact else cached_factors(weight, cache_dir)
    return matrix_basis(label, weight, factors, Rank.parse(options.rank))


def restore_with(
    basis: MatrixBasis, label: str, tuned: Tensor, dtype: torch.dtype, options: RestoreOptions
) -> RestoreResult:
    """Restore a matrix (m, n) by its singular vectors, as ``options`` say."""
    r = min(tuned.shape)
    arguments = options.arguments(r)
    assert arguments is not None  # plans leave such matrices out
    return restore_matrix(
        basis.W,
        tuned,
        options.rank,
        strength=options.strength,
        dtype=dtype,
        rounding=options.rounding,
        basis=basis,
        exact=options.exact,
        generator=generator(options.seed, label),
        **arguments,
    )


def elementwise(
    label: str, base: Tensor, tuned: Tensor, dtype: torch.dtype, options: RestoreOptions, changes: Changes
) -> Tensor:
    """Copy or interpolate a tensor of any shape."""
    out = torch.empty(tuned.shape, dtype=dtype)
    here = torch.atleast_1d(tuned)  # a scalar is a row
    there = here if base is tuned else torch.atleast_1d(base)
    for first, block in restore_rows(label, [(0, there, here)], dtype, options, changes):
        torch.atleast_1d(out)[first : first + len(block)] = block
    return out


def converted(name: str, tuned: Tensor, dtype: torch.dtype, options: RestoreOptions) -> Tensor:
    """The tuned tensor in another dtype, rounded as ``options`` say; always a new tensor."""
    if tuned.dtype == dtype:
        return tuned.clone()
    return elementwise(name, tuned, tuned, dtype, unchanged(options), Changes(0))


def unchanged(options: RestoreOptions) -> RestoreOptions:
    """Settings that round to a dtype and do nothing else."""
    return replace(options, mode="copy", part="top", strength=0.0)


def merged(label: str, blocks: Iterable[Block], *, added: bool) -> Iterator[Block]:
    """Row blocks whose tuned side is to be stored as it is.

    Args:
        added: it is the base's with something added: NaN and infinity of the base are told as such.

    Raises:
        NotFiniteError: names the rows.
    """
    for first, base, tuned in blocks:
        if added:
            _check_sides(f"{label}: rows {first}:{first + len(base)}", base, tuned)
        yield first, tuned, tuned


def restore_rows(
    label: str,
    blocks: Iterable[Block],
    dtype: torch.dtype,
    options: RestoreOptions,
    changes: Changes,
) -> Iterator[tuple[int, Tensor]]:
    """Copy or interpolate row block by row block.

    Args:
        blocks: rows of the base and the tuned tensor, in order, none left out.
        changes: gets the sums of all blocks.

    Yields:
        Index of the first row, and the new rows in ``dtype``.

    Raises:
        NotFiniteError: names the rows.
    """
    own = draws(options, label)
    for first, base, tuned in _small(blocks):
        copied = is_plain_copy(options.restore_mode, options.strength, base.dtype, dtype)
        if base.dtype == tuned.dtype == dtype and torch.equal(base, tuned):
            changes.sums.add(ChangeSums(tuned_sq=float(tuned.double().square().sum())))
            yield first, base if copied else tuned  # equal, but for the sign of a zero
            continue
        _check_sides(f"{label}: rows {first}:{first + len(tuned)}", base, tuned)
        sides = (len(tuned), -1)
        here = tuned.reshape(sides)
        change = difference(base.reshape(sides), here)
        weight, sums = add_rounded(here, change, options.strength, dtype, draws=own, first=first)
        changes.sums.add(sums)
        yield first, base if copied else weight.reshape(tuned.shape)


def generator(seed: int, label: str) -> torch.Generator:
    """A source of draws that belongs to one tensor, whatever was drawn before."""
    digest = hashlib.blake2b(f"{seed} {label}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draws(options: RestoreOptions, label: str) -> Draws | None:
    """What a tensor is rounded by; None to nearest."""
    return Draws.of(generator(options.seed, label)) if options.rounding == "stochastic" else None


def _check_sides(label: str, base: Tensor, tuned: Tensor) -> None:
    sides = {"tuned": tuned} if base is tuned else {"base": base, "tuned": tuned}
    for side, tensor in sides.items():
        try:
            check_finite(label, tensor)
        except TensorError as error:
            raise NotFiniteError(side, str(error)) from None


def _nothing_to_do(base: Tensor, tuned: Tensor, options: RestoreOptions) -> bool:
    """Whether a matrix stays as it is whatever its directions: so asked, or tuning left it alone."""
    return options.strength == 0.0 or (base.dtype == tuned.dtype and torch.equal(base, tuned))


def _small(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same rows in blocks of at most `BLOCK_ENTRIES` entries (one row at least); one tensor stays one."""
    for first, base, tuned in blocks:
        count = max(1, BLOCK_ENTRIES // max(1, tuned[0].numel()))
        for start in range(0, len(tuned), count):
            here = tuned[start : start + count]
            yield first + start, here if base is tuned else base[start : start + count], here
