"""From what the command line names to a model in memory, with every refusal before anything is written."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlspec.errors import CheckpointError
from rlspec.io.files import refuse_lfs_pointers
from rlspec.io.heads import split_heads
from rlspec.io.index import CheckpointIndex, only_measured
from rlspec.io.projections import check_finite, find_projections, read_config
from rlspec.io.quantised import is_quantised
from rlspec.run.config import EMBEDDED
from rlspec.tasks import Task, evaluation_problems
from rlspec.train.limits import Needs


def model_folder(name: str) -> Path:
    """The Hugging Face folder that ``model`` names: the embedded model's, or the path itself.

    Raises:
        CheckpointError: No folder with a config.json is there, or one with pointers of Git LFS.
    """
    if name == EMBEDDED:
        from rlspec.models import embedded_model_path

        return embedded_model_path()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{name}: no such folder; model= wants a local Hugging Face folder, or {EMBEDDED!r}"
        )
    _refuse_distributed(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json in it, so it is not a Hugging Face checkpoint")
    refuse_lfs_pointers(path for path in sorted(folder.iterdir()) if path.is_file())
    return folder


def _refuse_distributed(folder: Path) -> None:
    """transformers does not load them, and what it says does not tell why."""
    if (told := only_measured(folder)) is not None:
        raise CheckpointError(told)


def check_checkpoint(folder: Path, modules: Sequence[str] = (), *, per_head: bool = False) -> None:
    """Read the checkpoint's headers; refuse one that is cut off, malformed or without the named projections.

    Raises:
        CheckpointError: A file is missing, cut off or malformed.
        ProjectionError: One of ``modules`` names no matrix of the checkpoint, or one that is stored in a form that is
            not known; with ``per_head``, its heads are not known.
    """
    index = CheckpointIndex.open(folder)
    if modules:
        shapes = {name: tuple(entry.shape) for name, entry in index.tensors.items()}
        config = read_config(index.path)
        projections = find_projections(shapes, modules, config)
        if per_head:
            split_heads(projections, shapes, config)


def load_model(folder: Path, device: torch.device, *, stored: bool = False) -> nn.Module:
    """The causal LM of ``folder`` with float32 weights on ``device``, every one of them finite.

    Args:
        stored: leave the weights in the dtype of the checkpoint, which its products then have too.

    Raises:
        CheckpointError: transformers cannot load it, weights are missing from it, or it keeps them quantised.
        TensorError: A weight holds NaN or infinity; the message names it.
    """
    _refuse_distributed(folder)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # From 5.0 on weights are loaded as they are stored unless one asks for something else.
    as_stored = {"torch_dtype": "auto"} if int(transformers.__version__.partition(".")[0]) < 5 else {}
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **as_stored
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {_one_line(error)}") from error
    model, info = loaded
    # transformers fills missing weights with random numbers and goes on; a run on those would mean nothing.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing from it, the first is {missing[0]}"
        )
    # What follows would otherwise be codes without their scales.
    if scales := sorted(filter(is_quantised, info["unexpected_keys"])):
        raise CheckpointError(
            f"{folder}: {scales[0]} belongs to quantised weights, but config.json has no quantization_config for them"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() == 1:
            raise CheckpointError(
                f"{folder}: {name} is loaded as {parameter.dtype}, quantised; training and evaluation need weights of 16 "
                "or 32 bits: give a checkpoint that is not quantised"
            )
    model = (model if stored else model.float()).to(device)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
        # As loaded, weights lie in the mapped file at any address. Products of unaligned rows are slower and
        # may round differently: a continued run would not repeat the first one's losses to the last bit.
        parameter.data = parameter.data.clone()
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of ``folder``.

    Raises:
        CheckpointError: There is none, or transformers cannot load it.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer that transformers can load: {_one_line(error)}"
        ) from error


def evaluation_keys(task: Task, shifts: Iterable[str], deals: int, seed: int) -> frozenset[Hashable]:
    """The keys of every evaluation problem of ``shifts``: what training must never draw."""
    return frozenset(
        problem.key
        for shift in shifts
        for problem in evaluation_problems(task, deals, shift=shift, seed=seed)
    )


def conversation_needs(tokenizer: Any, task: Task, shifts: Iterable[str], deals: int, seed: int) -> Needs:
    """What the conversations of every evaluation problem of ``shifts`` need of a model.

    Raises:
        CheckpointError: The tokenizer's chat template cannot render them.
    """
    problems = (evaluation_problems(task, deals, shift=shift, seed=seed) for shift in shifts)
    return Needs.of(tokenizer, task, (problem for found in problems for problem in found))


def _one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
