"""The index of a checkpoint: which tensor lies in which file, at which bytes. Nothing but headers is read.

A checkpoint is a ``.safetensors`` file, or a folder with ``model.safetensors`` or with shards that
``model.safetensors.index.json`` lists. The files may come from anyone: headers and index are checked in C++
(`rlspec._C`), and an index may name files of its own folder only. Such a file may be a symbolic link to anywhere:
whoever has the folder made it, and it is read as safetensors or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from rlspec import _C
from rlspec.errors import CheckpointError
from rlspec.io.tie_setting import says_tied

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: of a checkpoint of torch.distributed.checkpoint, see rlspec.io.distributed
METADATA_FILE = ".metadata"
#: of a saved SpectralBasis, see rlspec.spectra.saved_basis
BASIS_FILE = "basis.json"
_LONGEST_NAME = 255  # of a file, in bytes
_HEAD = re.compile(r"(?:.+\.)?(?:lm_head|embed_out)\.weight")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk."""

    name: str
    shard: Path  #: the file that holds it
    dtype: str  #: as safetensors spells it, e.g. "BF16"
    shape: tuple[int, ...]
    start: int  #: first byte in the file
    end: int  #: one past the last byte


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint by name."""

    path: Path  #: the folder or file that was opened
    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: str | Path) -> CheckpointIndex:
        """Read the headers of all the files of a checkpoint.

        Args:
            path: a ``.safetensors`` file, or a folder in the layout of Hugging Face.

        Raises:
            CheckpointError: nothing there, no safetensors in it, or a file that is missing, truncated or
                malformed; the message names the file.
        """
        path = Path(path)
        if path.is_file():
            return cls(path, _by_name(read_header(path)))
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint file or folder")
        if (path / SINGLE_FILE).is_file():  # which transformers, too, takes before the index
            return cls(path, _by_name(read_header(path / SINGLE_FILE)))
        if (path / INDEX_FILE).is_file():
            return cls(path, _read_shards(path))
        raise CheckpointError(_nothing_to_read(path))


def read_header(path: str | Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is unreadable, truncated or malformed.
    """
    path = Path(path)
    try:
        tensors, _metadata = _C.read_header(os.fsencode(path))
    except _C.FileError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return [TensorEntry(name, path, dtype, shape, start, end) for name, dtype, shape, start, end in tensors]


def _by_name(entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    return {entry.name: entry for entry in entries}


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of a sharded checkpoint; index and shards must name the same ones.

    But for a head that is tied to the embedding: some writers list it and leave it out, and transformers ties it then.
    """
    weight_map = _read_weight_map(folder / INDEX_FILE)
    shards = {
        name: file_below(folder, name, folder / INDEX_FILE) for name in dict.fromkeys(weight_map.values())
    }  # a name is refused before any shard is opened
    tensors: dict[str, TensorEntry] = {}
    for file_name, shard in shards.items():
        if not shard.is_file():
            raise CheckpointError(f"{shard}: {_broken_link(shard) or 'missing'}; {INDEX_FILE} names it")
        for entry in read_header(shard):
            if weight_map.get(entry.name) != file_name:
                raise CheckpointError(f"{shard}: holds {entry.name!r}, not placed there by {INDEX_FILE}")
            tensors[entry.name] = entry
    absent = [name for name in weight_map if name not in tensors]
    if len(absent) == 1 and _HEAD.fullmatch(absent[0]) and says_tied(folder / "config.json"):
        del weight_map[absent[0]]
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / file_name}: lacks {name!r}, which {INDEX_FILE} places there")
    return {name: tensors[name] for name in weight_map}


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        return _C.read_weight_map(os.fsencode(path))
    except _C.FileError as error:
        raise CheckpointError(f"{path}: {error}") from None


def file_below(folder: Path, name: str, named_by: Path) -> Path:
    """The file that an index names, refused where that is not a name below the checkpoint's folder."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"{named_by}: names {name!r}, which is not a file below its folder")
    if "\0" in name:
        raise CheckpointError(f"{named_by}: names a file with a NUL byte")
    if (
        len(name.encode(errors="surrogatepass")) > _LONGEST_NAME
    ):  # of which systems say no more than an error number
        raise CheckpointError(f"{named_by}: names a file {name[:40]!r}... of {len(name)} characters")
    return folder / name


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuse files that would be copied as they are and are no files of the folder.

    Hugging Face's download cache links every file of a snapshot to ``blobs`` two folders up; a link is
    therefore followed as far as the folder that holds both.

    Raises:
        CheckpointError: a symbolic link that leaves the folder, or leads nowhere.
    """
    root = _cache_root(folder.resolve())
    leaving = []
    for path in files:
        if (broken := _broken_link(path)) is not None:
            raise CheckpointError(f"{path}: {broken}; fetch that file, or remove the link")
        if not path.resolve().is_relative_to(root):
            leaving.append(path)
    if leaving:
        more = f" ({len(leaving) - 1} more do so)" if len(leaving) > 1 else ""
        raise CheckpointError(
            f"{leaving[0]}: a symbolic link that leaves the checkpoint's folder, to {leaving[0].resolve()}{more}; "
            "weights may lie elsewhere, but this file would be copied into the output: put a copy in place of the link"
        )


def _broken_link(path: Path) -> str | None:
    """What to say of a symbolic link to something that does not exist; None for all else."""
    if not path.is_symlink() or path.exists():
        return None
    return f"a symbolic link to {os.readlink(path)}, which is not there"


def _cache_root(folder: Path) -> Path:
    """The folder itself; of a snapshot in Hugging Face's cache, the ``models--…`` that holds its blobs too."""
    for revision in (folder, *folder.parents):  # a model may lie in a folder of the repository
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository
    return folder


# How the files of checkpoints that each process wrote its part of are called, in the folder or one below it; what writes
# them, and what makes one checkpoint of them.
_DEEPSPEED = (
    "DeepSpeed's parts of a model",
    "merge them first with the zero_to_fp32.py that DeepSpeed puts beside them, its safe_serialization on",
)
_DISTRIBUTED = {
    "model_world_size_*_rank_*.pt": (
        "FSDP's parts of a model, as verl saves them",
        "merge them with verl's model_merger first (python -m verl.model_merger merge, backend fsdp, local_dir {place})",
    ),
    "*_model_states.pt": _DEEPSPEED,
    "*_optim_states.pt": _DEEPSPEED,
    "pytorch_model_fsdp_*rank*.bin": (
        "FSDP's parts of a model, as accelerate saves them without torch.distributed.checkpoint",
        "resume from it with accelerate and save with that (fsdp_state_dict_type SHARDED_STATE_DICT, use_dcp on)",
    ),
    "model_optim_rng.pt": (
        "Megatron's parts of a model",
        "export it to Hugging Face's layout first, for example with Megatron Bridge",
    ),
}


# Whole models in other formats: how their files are called, what that is, and what to do.
_FOREIGN = {
    "*.gguf": ("llama.cpp's GGUF", "give the checkpoint that it was made of"),
    "consolidated*.pth": (
        "Meta's pickled weights",
        "convert them to Hugging Face's layout first, for Llama with convert_llama_weights_to_hf.py of transformers",
    ),
    "*.ckpt": (
        "a pickle as Lightning saves it",
        "load it with what trained it, and save its model with save_pretrained of transformers",
    ),
}


def distributed_places(folder: Path) -> list[Path]:
    """Where a checkpoint's folder holds models that torch.distributed.checkpoint wrote: itself, or folders right below.

    Those below are accelerate's and verl's. Nowhere, where the folder holds safetensors, which are read instead.
    """
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return []
    if is_distributed(folder):
        return [folder]
    below = (*sorted(folder.glob("pytorch_model_fsdp_*")), folder / "dist_ckpt")
    return [place for place in below if is_distributed(place)]


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds, whole or not, what torch.distributed.checkpoint wrote: a model, or an optimizer."""
    return next(folder.glob("*.distcp"), None) is not None


def distributed_format(folder: Path) -> str | None:
    """What to say of a folder with a checkpoint in parts, one of each process; None where there is none."""
    for pattern, (what, advice) in _DISTRIBUTED.items():
        for place in (pattern, f"*/{pattern}"):
            found = min(folder.glob(place), default=None)
            if found is not None:
                told = advice.format(place=found.parent)
                return f"{folder}: holds {what} ({found.relative_to(folder)}), which is not read; {told}"
    return None


def foreign_files(folder: Path) -> dict[Path, str]:
    """Files of models in formats that are not read, the first of each format in a folder, and what to say of them."""
    found = {}
    for pattern, (what, advice) in _FOREIGN.items():
        if (path := min(folder.glob(pattern), default=None)) is not None:
            found[path] = f"{path}: {what}, which is not read; {advice}"
    return found


def only_measured(folder: Path) -> str | None:
    """What to say of a model that torch.distributed.checkpoint wrote where safetensors are needed; None of all else."""
    place = next(iter(distributed_places(folder)), None)
    if place is None:
        return None
    return (
        f"{place}: a checkpoint of torch.distributed.checkpoint, which is measured and restored as it is, but not read "
        f"here; {merged_first(place)}"
    )


def merged_first(place: Path) -> str:
    """How to make safetensors of a folder that torch.distributed.checkpoint wrote."""
    if place.name.startswith("pytorch_model_fsdp"):
        way = f"accelerate merge-weights {place} OUT"
    else:  # an optimizer may lie in it too, which that command cannot leave out
        way = (
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} FILE, and save_pretrained of the "
            "model that has loaded what torch.load finds there"
        )
    return f"write its weights as safetensors first: {way}"


def _snapshot_of(repository: Path) -> str | None:
    """What to say of a model's folder in Hugging Face's cache, whose snapshots are the checkpoints; None of all else."""
    if not (repository / "snapshots").is_dir() or not repository.name.startswith("models--"):
        return None
    there = sorted(path for path in (repository / "snapshots").iterdir() if path.is_dir())
    try:
        main = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        main = ""
    chosen = [path for path in there if path.name == main] or there
    told = f"{repository}: a model's folder in Hugging Face's cache, not a checkpoint; "
    if not chosen:
        return told + "there is no snapshot in it: download the model anew"
    return (
        told
        + ("give " if len(chosen) == 1 else f"give one of its {len(chosen)} snapshots, such as ")
        + str(chosen[0])
    )


def _nothing_to_read(folder: Path) -> str:
    if (snapshot := _snapshot_of(folder)) is not None:
        return snapshot
    if (told := only_measured(folder)) is not None:
        return told
    if (folder / BASIS_FILE).is_file():
        return f"{folder}: a saved SpectralBasis, not a checkpoint; SpectralBasis.from_pretrained reads it"
    if (distributed := distributed_format(folder)) is not None:
        return distributed
    for foreign in foreign_files(folder).values():
        return foreign
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
    pickles.sort(key=lambda name: (not name.startswith("pytorch_model"), name))  # the optimizer's tell less
    if pickles:
        return (
            f"{folder}: holds {pickles[0]} but no {SINGLE_FILE}; pickled weights are not read, "
            "convert them with model.save_pretrained(folder) of transformers"
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if (broken := _broken_link(folder / name)) is not None:
            return f"{folder / name}: {broken}"
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} in it"
