"""A checkpoint that is to be replaced: what else lies in its folder would be lost."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlspec.errors import CheckpointError

# What checkpoints hold beside their weights, whoever wrote them; a file of another name may be anybody's.
_NAMES = frozenset(
    (
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
        "vocab.txt",
    )
)


def refuse_losses(folder: Path, *, kept: Sequence[Path] = ()) -> None:
    """Refuse to replace what is not a checkpoint, or holds more than one: what is replaced is gone.

    Part of a checkpoint are its own weights, files of the names that loaders know, and what a folder of ``kept`` holds at
    the same place with the same bytes.

    Args:
        folder: exists.
        kept: checkpoints that stay.

    Raises:
        CheckpointError: names what would be lost.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint; overwrite=True replaces checkpoints only")
    shards = _shards(folder) if any(folder.iterdir()) else set()
    for path in _files(folder):
        place = path.relative_to(folder)
        if path in shards or (len(place.parts) == 1 and place.name in _NAMES and not path.is_symlink()):
            continue
        if not any(_same(path, given / place) for given in kept):
            raise CheckpointError(
                f"{folder} also holds {place}, which is no part of a checkpoint; move it elsewhere, overwrite=True would "
                "delete it"
            )


def refuse_mount_point(out: Path) -> None:
    """Refuse an output that no rename can give its name, before it is written.

    Raises:
        CheckpointError: something is mounted there.
    """
    if os.path.ismount(out):
        raise CheckpointError(
            f"{out} is a mount point, whose name no new folder can take; give a folder in it"
        )


def _shards(folder: Path) -> set[Path]:
    from rlspec.io.index import SINGLE_FILE, CheckpointIndex

    try:
        index = CheckpointIndex.open(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint; overwrite=True replaces checkpoints only ({error})"
        ) from None
    return {folder / SINGLE_FILE, *(entry.shard for entry in index.tensors.values())}


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, and all links."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from (Path(root, name) for name in sorted([*names, *links]))


def _same(path: Path, other: Path) -> bool:
    try:
        return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False
