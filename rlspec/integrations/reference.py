"""What a training is measured against, as it begins: which weights, and the tracker that has their factors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlspec.errors import OptionError, RunFolderError, TensorError, check_type
from rlspec.integrations.store import TrackingFolder
from rlspec.io.projections import MODULES
from rlspec.linalg.rank import Rank
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.cache import content_key
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.processes import Processes
from rlspec.spectra.saved_basis import SavedBasis, opened_base
from rlspec.spectra.tracker import SpectralTracker


def refuse_sharded(model: nn.Module, world_size: int) -> None:
    """Refuse a model whose weights this process has parts of that are no DTensors, so that nothing tells what of."""
    if world_size == 1:
        return
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_shape") or "_fsdp_wrapped" in name:
            raise TensorError(
                f"{name}: spread over {world_size} processes by FSDP1 or DeepSpeed's ZeRO-3, which is not gathered "
                "inside a training; use FSDP2 (fsdp_version: 2 for accelerate), or measure the checkpoints that it saves"
            )
        # The mark that DeepSpeed's AutoTP and Megatron's layers give to their slices, which are plain tensors.
        if getattr(parameter, "tensor_model_parallel", False) and not hasattr(parameter, "full_tensor"):
            raise TensorError(
                f"{name}: a slice of a weight, of DeepSpeed's AutoTP or of Megatron, which are not gathered inside a "
                'training; use tensor parallelism of transformers (tp_plan="auto") or FSDP2, or measure the whole '
                "checkpoints that it saves"
            )


def kept_start(folder: TrackingFolder | None, step: int) -> Path:
    """Where a training that is resumed at a step keeps the weights that it began with.

    Raises:
        RunFolderError: nowhere.
    """
    base = None if folder is None else folder.reference
    if base is None or not base.is_dir():
        where = "without out=, which would have kept them" if base is None else f"and {base} is not there"
        raise RunFolderError(
            f"resumed at step {step} {where}: the weights that the training began with are not known; give them as base="
        )
    return base


def known_base(
    base: str | Path | SpectralBasis | None, modules: Sequence[str], rank: Rank, per_head: bool
) -> Path | SpectralBasis | None:
    """The reference that a training is given, found fit before the training begins.

    Raises:
        CheckpointError: a folder of neither a checkpoint nor a saved basis.
        OptionError: nothing of these kinds, or a basis of other matrices or of another rank.
    """
    if base is None:
        return None
    check_type("base", base, (str, Path, SpectralBasis), "a folder, a SpectralBasis or None")
    kept = base if isinstance(base, SpectralBasis) else Path(base)
    opened = opened_base(kept)
    if isinstance(opened, SpectralBasis | SavedBasis):
        _check_fit("base" if isinstance(kept, SpectralBasis) else str(kept), opened, modules, rank, per_head)
    return kept


def told_base(base: Path | SpectralBasis | None) -> str | None:
    """What a training that is resumed must have again: the place of a reference, or what a basis in memory holds."""
    if not isinstance(base, SpectralBasis):
        return None if base is None else str(base.resolve())
    digest = hashlib.blake2b(digest_size=20)
    for projection in base.projections:
        digest.update(f"{projection.name} {content_key(base.matrix(projection.name).W)} ".encode())
    return f"SpectralBasis {digest.hexdigest()}"


def make_tracker(
    model: nn.Module, base: Path | SpectralBasis | None, processes: Processes, **options: Any
) -> SpectralTracker | DealtTracker:
    """Take the factors of the reference, or decompose it: ``base``, or the model as it is now; called in all processes.

    Args:
        options: ``modules``, ``rank`` and ``per_head`` of ``SpectralBasis.from_model``, whose errors are raised; a basis
            has its own.
    """
    device = _device(model)
    if processes.count > 1:
        return DealtTracker(model, base=base, device=None if base is None else device, **options)
    opened = None if base is None else opened_base(base)
    if isinstance(opened, SpectralBasis | SavedBasis):
        basis = opened.part(opened.projections, device=device)
    elif isinstance(base, Path):
        basis = SpectralBasis.from_checkpoint(base, device=device, **options)
    else:
        basis = SpectralBasis.from_model(model, **options)
    # On a device every byte is the training's.
    return SpectralTracker(basis, arrays=False, factors="host")


def _check_fit(
    name: str, basis: SpectralBasis | SavedBasis, modules: Sequence[str], rank: Rank, per_head: bool
) -> None:
    held = {projection.module for projection in basis.projections}
    # A tied embedding stands for both, as where a checkpoint is decomposed.
    wanted = [module for module in modules if module in held or module != "lm_head" or "embed" not in held]
    asked = {"modules": ",".join(wanted), "rank": str(rank)}
    found = {"modules": ",".join(m for m in MODULES if m in held), "rank": str(basis.rank)}
    if held & {"q", "k", "v", "o"}:
        asked["per_head"] = str(per_head)
        found["per_head"] = str(any(projection.head is not None for projection in basis.projections))
    others = [option for option in asked if found[option] != asked[option]]
    if others:
        told = ", ".join(f"{option}={found[option]} where {asked[option]} is wanted" for option in others)
        raise OptionError(
            f"{name}: a basis of {told}; ask for what it holds, or give the checkpoint that it was made of as base="
        )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
