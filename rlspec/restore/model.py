"""Restoring a model in memory against a basis that is at hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlspec.errors import OptionError, TensorError, check_type
from rlspec.io.counterparts import Names
from rlspec.io.module import ModuleTensors, module_config, unmerged_adapters
from rlspec.io.projections import Projection
from rlspec.io.quantised import block_size, companions, dequantised, has_own_scheme, scales_of
from rlspec.io.requantised import ScaledCodes
from rlspec.io.weights import find_tensor
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.linalg.workers import in_order
from rlspec.perturb.matrix import MatrixBasis, matrix_basis
from rlspec.restore.codes import told_of_codes
from rlspec.restore.matrix import RestoreResult, same_entries
from rlspec.restore.options import RestoreOptions, Rounding
from rlspec.restore.report import MatrixReport
from rlspec.restore.tensors import draws, restore_with
from rlspec.spectra.basis import SpectralBasis


@pinned_arithmetic()
def restore_(
    model: nn.Module,
    basis: SpectralBasis | str | Path,
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
    are held until then. Gradients and optimizer state are left alone. A weight in scaled fp8 is restored as the numbers
    that it stands for, and stored in the same scheme, rounded to it.

    Args:
        model: its parameters have the names that the basis was built from.
        basis: the reference; all its projections are restored. Or the checkpoint on disk of which it is to be built,
            with the q, k and v projections.
        rank: default the basis's own, or 0.2.
        part, mode, strength, rounding, seed, exact: see :class:`rlspec.restore.RestoreOptions`.

    Returns:
        A report of each matrix, in the basis's order.

    Raises:
        OptionError: a setting that does not exist or is out of range, or an argument of another type.
        CheckpointError: there is no checkpoint at that path, or one that cannot be read.
        TensorError: the model lacks a matrix of the basis, has it in another shape, sharded over processes, quantised
            in a form that is not known, offloaded or under adapters that are not merged into it, or it holds NaN or
            infinity; or it is tied where the basis has two different matrices.
    """
    check_type("model", model, nn.Module, "a module")
    if isinstance(basis, (str, Path)):
        basis = SpectralBasis.from_checkpoint(basis, rank=0.2 if rank is None else rank)
    check_type("basis", basis, SpectralBasis, "a SpectralBasis or the path of a checkpoint")
    rule = Rank.parse(rank) if rank is not None else basis.rank
    options = RestoreOptions(
        rank=rule, part=part, mode=mode, strength=strength, rounding=rounding, seed=seed, exact=exact
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = ModuleTensors(model, {**dict(model.named_buffers()), **parameters})
    beside, block = companions(held.tensors), block_size(module_config(model))
    names = Names(held.tensors)
    places: dict[str, _Place] = {}
    todo = []
    for projection in basis.projections:
        if held.is_fsdp:
            raise TensorError(
                f"{projection.tensor}: sharded over processes by FSDP; restore the gathered model or its checkpoint"
            )
        found = find_tensor(projection.tensor, names, "the model given", "parameter")
        if found not in places:
            places[found] = _place(held, projection.tensor, found, beside.get(found, []), block)
        place = places[found]
        shape, wanted = tuple(projection.take(place.numbers).shape), basis.matrix(projection.name).shape
        if shape != wanted:
            raise TensorError(f"{projection.name}: {shape} in the model, {wanted} in the basis")
        if not options.elementwise and options.arguments(min(shape)) is None:
            raise OptionError(f"part {part} lies past the {min(shape)} directions of {projection.name}")
        todo.append((projection, place))
    jobs = (
        _job(projection, place, basis.matrix(projection.name), rule, options) for projection, place in todo
    )
    changes = []
    for (projection, place), result in zip(todo, in_order(jobs, torch.get_num_threads()), strict=True):
        shape, dtype = basis.matrix(projection.name).shape, place.numbers.dtype
        changes.append((projection, place, result.weight, MatrixReport.of(projection, shape, dtype, result)))
    _refuse_two_for_one([(projection, place.stored) for projection, place, *_ in changes], basis)
    return tuple(_put_back(changes, options))


@dataclass(frozen=True)
class _Place:
    """A tensor of the model: what is stored, the numbers that it stands for, and the codes if these are not the same."""

    stored: Tensor
    numbers: Tensor
    codes: ScaledCodes | None = None


def _job(
    projection: Projection, place: _Place, reference: MatrixBasis, rule: Rank, options: RestoreOptions
) -> tuple[int, Callable[[], RestoreResult]]:
    tuned = projection.take(place.numbers).detach()
    settings = options if place.codes is None else replace(options, rounding="nearest")

    def work() -> RestoreResult:
        with pinned_arithmetic():
            factors = (reference.U, reference.S, reference.Vh)
            own = matrix_basis(projection.name, reference.W, factors, rule)
            try:
                return restore_with(own, projection.name, tuned, tuned.dtype, settings)
            except TensorError as error:
                raise TensorError(f"{projection.name}: {error}") from None

    return tuned.numel() if tuned.device.type == "cpu" else sys.maxsize, work


def _put_back(
    changes: list[tuple[Projection, _Place, Tensor, MatrixReport]], options: RestoreOptions
) -> list[MatrixReport]:
    """Write the new matrices; nothing is written before all codes are found."""
    wanted: dict[str, tuple[_Place, Tensor]] = {}
    for projection, place, weight, _ in changes:
        if place.codes is not None:
            _, target = wanted.setdefault(place.codes.name, (place, place.numbers.clone()))
            projection.put(target, weight)
    coded = {
        name: place.codes.replaced(target, draws=draws(options, name))
        for name, (place, target) in wanted.items()
        if place.codes is not None
    }
    _refuse_shared_scales([place.codes for place, _ in wanted.values() if place.codes is not None])
    reports = []
    for projection, place, weight, report in changes:
        if place.codes is None:
            projection.put(place.stored, weight)
            reports.append(report)
        else:
            (_, target), new = wanted[place.codes.name], coded[place.codes.name]
            reports.append(told_of_codes(report, projection, place.numbers, target, new))
    for name, (place, _) in wanted.items():
        assert place.codes is not None
        place.codes.codes.copy_(coded[name].codes)
        place.codes.scale.copy_(coded[name].scale)
    return reports


def _refuse_shared_scales(coded: list[ScaledCodes]) -> None:
    """Refuse one scale of two matrices, for which each would find another."""
    owners: dict[int, ScaledCodes] = {}
    for codes in coded:
        first = owners.setdefault(codes.scale.data_ptr(), codes)
        if first.codes.data_ptr() != codes.codes.data_ptr():
            raise TensorError(
                f"{codes.scale_name}: one tensor with {first.scale_name} in the model, so that neither matrix can be "
                "restored alone; give each a scale of its own"
            )


def _refuse_two_for_one(places: list[tuple[Projection, Tensor]], basis: SpectralBasis) -> None:
    """Refuse a tied tensor of which the basis holds two different matrices: only one of them could be put back."""
    seen: dict[tuple[int, str], str] = {}
    for projection, stored in places:
        first = seen.setdefault((stored.data_ptr(), str(projection.rows)), projection.name)
        if first == projection.name:
            continue
        if not same_entries(basis.matrix(first).W, basis.matrix(projection.name).W):
            raise TensorError(
                f"{projection.name}: one tensor with {first} in the model (tied), two different ones in the basis; build "
                "the basis from a tied model, or with modules that name one of them"
            )


def _place(
    held: ModuleTensors, name: str, found: str, beside: list[str], block: tuple[int, int] | None
) -> _Place:
    stored = _whole(held, name, found)
    if not has_own_scheme(stored) and not (stored.element_size() > 1 and beside):
        numbers = dequantised(found, stored, beside, held.value, block)
        scale = next(iter(scales_of(found, beside)), None)
        codes = (
            None if scale is None else ScaledCodes(found, stored, scale, _whole(held, scale, scale), block)
        )
        return _Place(stored, numbers, codes)
    told = ", ".join(beside) or "no scale"
    raise TensorError(
        f"{name}: codes of quantised weights ({stored.dtype}, {told} beside it), which cannot be restored; load the "
        "model in 16 or 32 bits"
    )


def _whole(held: ModuleTensors, name: str, found: str) -> Tensor:
    """The parameter's own storage, which writing to changes the model."""
    tensor = held.tensors[found].data
    if hasattr(held.tensors[found], "full_tensor"):
        raise TensorError(f"{name}: sharded over processes; restore the gathered model or its checkpoint")
    if tensor.is_meta:
        raise TensorError(
            f"{name}: on the meta device, it has no values that could be written; load it first"
        )
    layer = held.adapter(found)
    if layer is not None and unmerged_adapters(layer):
        raise TensorError(
            f"{name}: an adapter of PEFT is applied beside it; restore what merge_and_unload() returns, or the model "
            "between merge_adapter() and unmerge_adapter()"
        )
    return tensor
