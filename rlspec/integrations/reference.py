"""What a training is measured against, as it begins: which weights, and the tracker that decomposes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlspec.errors import RunFolderError, TensorError
from rlspec.integrations.store import TrackingFolder
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.processes import Processes
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


def make_tracker(
    model: nn.Module, base: Path | None, processes: Processes, **options: Any
) -> SpectralTracker | DealtTracker:
    """Decompose the reference: ``base``, or the model as it is now; called in all processes.

    Args:
        options: ``modules``, ``rank`` and ``per_head`` of ``SpectralBasis.from_model``, whose errors are raised.
    """
    if processes.count > 1:
        device = None if base is None else _device(model)
        return DealtTracker(model, base=base, device=device, **options)
    if base is None:
        basis = SpectralBasis.from_model(model, **options)
    else:
        basis = SpectralBasis.from_checkpoint(base, device=_device(model), **options)
    # On a device every byte is the training's.
    return SpectralTracker(basis, arrays=False, factors="host")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
