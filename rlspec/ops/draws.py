"""Random numbers by counter: those of an entry follow from a key and its place alone.

Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), NumPy's on the host. A row of n
entries has ceil(n / 8) counters, row i's begin at i ceil(n / 8), and each gives eight numbers of 32 bits, low halves
first. So neither blocks of rows nor tiles nor the device they are drawn on change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Numbers of 32 bits that a counter gives.
PER_COUNTER = 8
_COUNTERS = 1 << 256


@dataclass(frozen=True)
class Draws:
    """The numbers of one matrix: ``key`` holds two of 64 bits, as signed ones."""

    key: tuple[int, int]

    @classmethod
    def of(cls, generator: torch.Generator | None) -> Draws:
        """A key drawn from a generator of the CPU, or from torch's own."""
        limits = torch.iinfo(torch.int64)
        low, high = torch.randint(
            limits.min, limits.max, (2,), generator=generator, dtype=torch.int64
        ).tolist()
        return cls((low, high))

    def uniform(self, first: int, rows: int, n: int) -> Tensor:
        """(rows, n) float64 on the CPU, uniform in (0, 1): the rows from ``first`` on of a matrix with n columns.

        Each is (d + 1/2) / 2^32 for d of 32 bits, so that products with a power of two are exact.
        """
        counters = -(-n // PER_COUNTER)
        words = np.array(self.key, dtype=np.int64).view(np.uint64)
        # NumPy counts before it draws.
        source = np.random.Philox(key=words, counter=(first * counters - 1) % _COUNTERS)
        raw = source.random_raw(rows * counters * PER_COUNTER // 2).astype("<u8", copy=False).view("<u4")
        numbers = raw.reshape(rows, counters * PER_COUNTER)[:, :n].astype(np.float64)
        numbers += 0.5
        numbers *= 2.0**-32
        return torch.from_numpy(numbers)
