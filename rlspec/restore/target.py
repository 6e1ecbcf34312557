"""Where a restoration writes, and what must not be harmed there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlspec.errors import CheckpointError
from rlspec.io.replaced import refuse_losses, refuse_mount_point


@dataclass(frozen=True)
class Target:
    """Where the output goes.

    Raises:
        CheckpointError: ``out`` touches an input, is a mount point, or exists and is not to be overwritten, or holds more
            than a checkpoint.
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
        refuse_mount_point(place)
        if not self.overwrite:
            complete = "; it is complete, nothing is left to resume" if self.resume else ""
            raise CheckpointError(f"{self.out} exists already{complete}; give overwrite=True to replace it")
        self.refuse_losses()

    def refuse_losses(self) -> None:
        """Refuse to replace what is not a checkpoint, or holds more than one; an input's own files are no loss.

        Raises:
            CheckpointError: names what would be lost.
        """
        if self.overwrite and self.out.exists():
            refuse_losses(self.out, kept=(self.base, self.tuned))
