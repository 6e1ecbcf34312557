"""Checkpoints of torch.distributed.checkpoint as its users write them, and what is read of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rlspec.io.distributed_weights import DistributedWeights


def save(state: dict[str, Any], folder: Path, **options: Any) -> None:
    """By one process without a group."""
    writer = dcp.FileSystemWriter(folder, sync_files=False, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.save(state, storage_writer=writer, no_dist=True)


def save_with_accelerate(model: torch.nn.Module, folder: Path, number: int, *, version: int) -> None:
    """By accelerate's own function for FSDP, in process ``number``; ``folder`` is what bears the step."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model

    PartialState(cpu=True)  # which its logger asks for
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type="SHARDED_STATE_DICT")
    save_fsdp_model(plugin, SimpleNamespace(process_index=number), model, folder)


def tensors_in(folder: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """What is read of a checkpoint, by name; all tensors, or those named."""
    weights = DistributedWeights(folder)
    wanted = list(weights.shapes() if names is None else names)
    return {name: tensor.clone() for name, tensor in zip(wanted, weights._tensors_of(wanted), strict=True)}


def assert_same(found: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
