"""Restoring a model in memory against a basis that is at hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlspec.errors import OptionError, TensorError
from rlspec.io.module import ModuleTensors, strip_wrappers, unmerged_adapters
from rlspec.io.projections import Projection
from rlspec.io.quantised import companions, has_own_scheme
from rlspec.io.weights import find_tensor
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.perturb.matrix import matrix_basis
from rlspec.restore.matrix import Rounding
from rlspec.restore.options import RestoreOptions
from rlspec.restore.report import MatrixReport
from rlspec.restore.tensors import restore_with
from rlspec.spectra.basis import SpectralBasis


@pinned_arithmetic()
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
        TensorError: the model lacks a matrix of the basis, has it in another shape, sharded over processes, quantised,
            offloaded or under adapters that are not merged into it, or it holds NaN or infinity; or it is tied where
            the basis has two different matrices.
    """
    rule = Rank.parse(rank) if rank is not None else basis.rank
    options = RestoreOptions(
        rank=rule, part=part, mode=mode, strength=strength, rounding=rounding, seed=seed, exact=exact
    )
    held = ModuleTensors(model, dict(model.named_parameters(remove_duplicate=False)))
    beside = companions([*held.tensors, *(strip_wrappers(n) for n, _ in model.named_buffers())])
    changes = []
    for projection in basis.projections:
        stored = _whole(held, beside, projection.tensor)
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


def _whole(held: ModuleTensors, beside: Mapping[str, list[str]], name: str) -> Tensor:
    """The parameter's own storage, which writing to changes the model."""
    if held.is_fsdp:
        raise TensorError(
            f"{name}: sharded over processes by FSDP; restore the gathered model or its checkpoint"
        )
    found = find_tensor(name, held.tensors, "the model given", "parameter")
    tensor = held.tensors[found].data
    if hasattr(held.tensors[found], "full_tensor"):
        raise TensorError(f"{name}: sharded over processes; restore the gathered model or its checkpoint")
    if tensor.is_meta:
        raise TensorError(
            f"{name}: on the meta device, it has no values that could be written; load it first"
        )
    if not tensor.is_floating_point() or has_own_scheme(tensor) or beside.get(found):
        told = ", ".join(beside.get(found, [])) or "no scale"
        raise TensorError(
            f"{name}: codes of quantised weights ({tensor.dtype}, {told} beside it), which cannot be restored; load the "
            "model in 16 or 32 bits"
        )
    layer = held.adapter(found)
    if layer is not None and unmerged_adapters(layer):
        raise TensorError(
            f"{name}: an adapter of PEFT is applied beside it; restore what merge_and_unload() returns, or the model "
            "between merge_adapter() and unmerge_adapter()"
        )
    return tensor
