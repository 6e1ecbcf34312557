"""Where a restoration writes, and what must not be harmed there."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Target:
    """Where the output goes.

    Raises:
        CheckpointError: ``out`` touches an input, or exists and is not to be overwritten, or holds more than a
            checkpoint.
    """

    out: Path
    base: Path
    tuned: Path
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        place = self.out.resolve()
        for name, given in (("base", self.base), ("tuned", self.tuned)):
            source = given.resolve()
            if place == source or source in place.parents or place in source.parents:
                raise CheckpointError(
                    f"{self.out} is, holds or lies in the {name} checkpoint {given}; inputs are never written, "
                    "choose another folder"
                )
        if not self.out.exists():
            return
        if not self.overwrite:
            complete = "; it is complete, nothing is left to resume" if self.resume else ""
            raise CheckpointError(f"{self.out} exists already{complete}; give overwrite=True to replace it")
        self.refuse_losses()

    def refuse_losses(self) -> None:
        """Refuse to replace what is not a checkpoint, or holds more than one: what is replaced is gone.

        Part of a checkpoint are its own weights, files of the names that loaders know, and what an input holds at the
        same place with the same bytes.

        Raises:
            CheckpointError: names what would be lost.
        """
        if not (self.overwrite and self.out.exists()):
            return
        if not self.out.is_dir():
            raise CheckpointError(f"{self.out} is not a checkpoint; overwrite=True replaces checkpoints only")
        shards = self._shards() if any(self.out.iterdir()) else set()
        for path in _files(self.out):
            place = path.relative_to(self.out)
            if path in shards or (len(place.parts) == 1 and place.name in _NAMES and not path.is_symlink()):
                continue
            if not any(_same(path, given / place) for given in (self.base, self.tuned)):
                raise CheckpointError(
                    f"{self.out} also holds {place}, which is no part of a checkpoint; move it elsewhere, "
                    "overwrite=True would delete it"
                )

    def _shards(self) -> set[Path]:
        from rlspec.io.index import SINGLE_FILE, CheckpointIndex

        try:
            index = CheckpointIndex.open(self.out)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.out} is not a checkpoint; overwrite=True replaces checkpoints only ({error})"
            ) from None
        return {self.out / SINGLE_FILE, *(entry.shard for entry in index.tensors.values())}


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
