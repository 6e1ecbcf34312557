"""Which process this is of several that share a piece of work, as they were launched.

They need nothing but a file system in common, and learn by locks who still lives (rlspec.io.lock). So a process that dies
takes nobody with it, and what it wrote stays.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlspec.errors import OptionError

if TYPE_CHECKING:
    import torch

#: Seconds that processes of one launch may start apart.
APART = 60.0
#: Seconds between two looks at what the others have done.
LOOK = 0.2


@dataclass(frozen=True)
class Share:
    """Which process this is of those that were started with the same arguments."""

    number: int = 0
    count: int = 1
    local: int = 0  #: its number on this machine, which the choice of its GPU goes by

    @classmethod
    def of_launch(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As torchrun tells: ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; one process where there are none.

        Raises:
            OptionError: they are no numbers, or out of range.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        given = [environment["RANK"], environment["WORLD_SIZE"], environment.get("LOCAL_RANK", "0")]
        try:
            number, count, local = map(int, given)
        except ValueError:
            number, count, local = -1, 0, 0
        if not (0 <= number < count and local >= 0):
            raise OptionError(f"RANK={given[0]!r} WORLD_SIZE={given[1]!r} LOCAL_RANK={given[2]!r}: no launch")
        return cls(number, count, local)

    def device(self, chosen: torch.device) -> torch.device:
        """The device of this process, where one of no number was chosen for all."""
        if self.count == 1 or chosen.type != "cuda" or chosen.index is not None:
            return chosen
        import torch  # here: what asks for the process's number alone needs none of it

        return torch.device("cuda", self.local % torch.cuda.device_count())


#: One process that does everything.
ALONE = Share()
