"""Restoring a model in memory against a basis that is at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlspec.errors import OptionError, TensorError
from rlspec.io.projections import Projection, counterpart
from rlspec.linalg.rank import Rank, RankLike
from rlspec.perturb.matrix import matrix_basis
from rlspec.restore.matrix import Rounding
from rlspec.restore.options import RestoreOptions
from rlspec.restore.report import MatrixReport
from rlspec.restore.tensors import restore_with
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.sources import strip_wrappers


@torch.no_grad()
def restore_(
    model: nn.Module,
    basis: SpectralBasis,
    *,
    rank: RankLike | None = None,
    part: str = "top",
    mode: str = "directions",
    strength: float = 1.0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    exact: bool = False,
) -> tuple[MatrixReport, ...]:
    """Put the basis's directions (or values) back into a model, in place and all or nothing.

    Every matrix is computed before the first is written, so an error leaves the model as it was; the new matrices
    are held until then. Gradients and optimizer state are left alone.

    Args:
        model: its parameters have the names that the basis was built from.
        basis: the reference; all its projections are restored.
        rank: default the basis's own.
        part, mode, strength, rounding, seed, exact: see :class:`rlspec.restore.RestoreOptions`.

    Returns:
        A report of each matrix, in the basis's order.

    Raises:
        OptionError: a setting that does not exist or is out of range.
        TensorError: the model lacks a matrix of the basis, has it in another shape or sharded over processes, or it
            holds NaN or infinity; or it is tied where the basis has two different matrices.
    """
    rule = Rank.parse(rank) if rank is not None else basis.rank
    options = RestoreOptions(
        rank=rule, part=part, mode=mode, strength=strength, rounding=rounding, seed=seed, exact=exact
    )
    tensors = {strip_wrappers(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    changes = []
    for projection in basis.projections:
        stored = _whole(tensors, projection.tensor)
        reference = basis.matrix(projection.name)
        tuned = projection.take(stored).detach()
        if tuple(tuned.shape) != reference.shape:
            raise TensorError(
                f"{projection.name}: {tuple(tuned.shape)} in the model, {reference.shape} in the basis"
            )
        if not options.elementwise and options.arguments(min(tuned.shape)) is None:
            raise OptionError(f"part {part} lies past the {min(tuned.shape)} directions of {projection.name}")
        factors = (reference.U, reference.S, reference.Vh)
        own = matrix_basis(projection.name, reference.W, factors, rule)
        try:
            result = restore_with(own, projection.name, tuned, stored.dtype, options)
        except TensorError as error:
            raise TensorError(f"{projection.name}: {error}") from None
        report = MatrixReport.of(projection, reference.shape, stored.dtype, result)
        changes.append((projection, stored, result.weight, report))
    _refuse_two_for_one([(projection, stored) for projection, stored, *_ in changes], basis)
    for projection, stored, weight, _ in changes:
        projection.put(stored, weight)
    return tuple(report for *_, report in changes)


def _refuse_two_for_one(places: list[tuple[Projection, Tensor]], basis: SpectralBasis) -> None:
    """Refuse a tied tensor of which the basis holds two different matrices: only one of them could be put back."""
    seen: dict[tuple[int, str], str] = {}
    for projection, stored in places:
        first = seen.setdefault((stored.data_ptr(), str(projection.rows)), projection.name)
        if first == projection.name:
            continue
        if not torch.equal(basis.matrix(first).W, basis.matrix(projection.name).W):
            raise TensorError(
                f"{projection.name}: one tensor with {first} in the model (tied), two different ones in the basis; build "
                "the basis from a tied model, or with modules that name one of them"
            )


def _whole(tensors: dict[str, nn.Parameter], name: str) -> Tensor:
    """The parameter's own storage, which writing to changes the model."""
    found = counterpart(name, tensors)
    if found is None:
        raise TensorError(f"{name}: no such parameter in the model; it is in the basis")
    tensor = tensors[found].data
    if hasattr(tensors[found], "full_tensor"):
        raise TensorError(f"{name}: sharded over processes; restore the gathered model or its checkpoint")
    if tensor.is_meta:
        raise TensorError(f"{name}: on the meta device, it has no values")
    if not tensor.is_floating_point():
        raise TensorError(f"{name}: {tensor.dtype}, which cannot be restored")
    return tensor
