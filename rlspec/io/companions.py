"""The files beside a checkpoint's weights: which are copied into one that is written like it, and which stay behind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from rlspec.io.files import refuse_lfs_pointers
from rlspec.io.index import METADATA_FILE, CheckpointIndex, check_links

# Weights in other formats, or beside the ones that the index lists: they would be the unchanged ones. Parts of
# torch.distributed.checkpoint are the states of optimizers too.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".ckpt",
    ".distcp",
    ".index.json",
)
# Of those, by their names: other forms of the same weights, and states of trainings. A folder's name ends in /.
_KNOWN = re.compile(
    r"(?:pytorch_model|tf_model|flax_model|rust_model|model|consolidated|adapter_model|optimizer|scheduler|scaler|rng_state"
    r"|training_args)[^/]*|[^/]*(?:\.gguf|\.distcp|\.index\.json|_states\.pt)|\.metadata"
    r"|(?:checkpoint|global_step|original|onnx|openvino|coreml|pytorch_model_fsdp|optimizer)[^/]*/"
)
# How the names of a tokenizer's files and of chat templates begin.
_TOKENIZER = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "additional_chat_templates",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
)
# Where sentence-transformers names the folders of what comes after the model.
_MODULES_FILE = "modules.json"
# How many of the files that stay behind are named.
_NAMED = 5


def companions(like: CheckpointIndex, tokenizer: Path | None = None) -> dict[Path, Path]:
    """The other files of the folder, to be copied: configuration, tokenizer, templates, licence; no other weights.

    Of the folders in it those come along that hold no weights, such as ``additional_chat_templates``, and those that
    ``modules.json`` names; not the training states or other formats that some keep beside the model, and nothing hidden.

    Args:
        tokenizer: a folder whose tokenizer and chat templates take the place of the ones here. A whole tokenizer there
            leaves none of the files of this one.

    Returns:
        Each file's place in the new folder, and the file.

    Raises:
        CheckpointError: one of them is a symbolic link that leaves its folder or leads nowhere, or a pointer of Git LFS.
    """
    if like.path.is_file():
        return {}
    files = {path.relative_to(like.path): path for path in _sorted_out(like)[0]}
    own: dict[Path, Path] = {}
    if tokenizer is not None:
        found = {path.relative_to(tokenizer): path for path in _files(tokenizer, set())[0]}
        own = {place: path for place, path in found.items() if _is_tokenizer(place)}
        if Path("tokenizer_config.json") in own:
            files = {place: path for place, path in files.items() if not _is_tokenizer(place)}
        check_links(tokenizer, own.values())
    files = {place: path for place, path in files.items() if place not in own}
    check_links(like.path, files.values())
    files |= own
    refuse_lfs_pointers(files.values())
    return files


def left_behind(like: CheckpointIndex) -> str:
    """A sentence that names what looks like weights and is not copied, or "".

    Other forms of the same weights and states of trainings, as far as their names tell, nobody misses.
    """
    if like.path.is_file():
        return ""
    names = [name for name in _sorted_out(like)[1] if not _KNOWN.fullmatch(name)]
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    told = ", ".join(names[:_NAMED])
    return f"not copied from {like.path}: {told}{more}, which look like other weights; copy them if the model needs them"


def _sorted_out(like: CheckpointIndex) -> tuple[list[Path], list[str]]:
    return _files(like.path, {entry.shard for entry in like.tensors.values()})


def _files(folder: Path, shards: set[Path]) -> tuple[list[Path], list[str]]:
    """The files to be copied, and the names of the files and folders that are not, since they are or hold weights."""
    entries = [path for path in sorted(folder.iterdir()) if path not in shards]
    files = [path for path in entries if _is_file(path)]
    left = [path.name for path in files if _is_weights(path)]
    files = [path for path in files if not _is_weights(path)]
    modules = _modules(folder)
    for below in entries:
        if not below.is_dir() or below.is_symlink() or below.name.startswith("."):
            continue
        inside = [Path(root, name) for root, _, names in os.walk(below) for name in sorted(names)]
        weights = [path for path in inside if path in shards or _is_weights(path)]
        if not weights or (below.name in modules and shards.isdisjoint(weights)):
            files += [path for path in inside if _is_file(path)]
        elif not shards.issuperset(weights):
            left.append(f"{below.name}/")
    return files, left


def _modules(folder: Path) -> set[str]:
    """The folders that ``modules.json`` names; none where it is not what sentence-transformers writes."""
    try:
        listed = json.loads((folder / _MODULES_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    paths = (
        [each.get("path") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    )
    return {Path(path).parts[0] for path in paths if isinstance(path, str) and Path(path).parts}


def _is_file(path: Path) -> bool:
    """Whether it is a file; also a link to one that is missing, by its name: a folder's rarely has an ending."""
    return path.is_file() or (path.is_symlink() and not path.exists() and path.suffix != "")


def _is_tokenizer(place: Path) -> bool:
    return place.parts[0].startswith(_TOKENIZER)


def _is_weights(path: Path) -> bool:
    return path.name == METADATA_FILE or path.name.endswith(_WEIGHTS)
