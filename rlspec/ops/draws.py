"""Random numbers by counter: those of an entry follow from a key and its place alone.

Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), NumPy's on the host; a counter
gives eight numbers of 32 bits, low halves first. So neither blocks of rows nor tiles nor the device they are drawn on
change a bit.
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
    """The numbers of one matrix: ``key`` holds two of 64 bits, as signed ones.

    A row of n entries has ceil(n / 8) counters, and row i's begin at i ceil(n / 8).
    """

    key: tuple[int, int]

    @classmethod
    def of(cls, generator: torch.Generator | None) -> Draws:
        """A key drawn from a generator of the CPU, or from torch's own."""
        return cls(_key(generator))

    def uniform(self, first: int, rows: int, n: int) -> Tensor:
        """(rows, n) float64 on the CPU, uniform in (0, 1): the rows from ``first`` on of a matrix with n columns.

        Each is (d + 1/2) / 2^32 for d of 32 bits, so that products with a power of two are exact.
        """
        counters = -(-n // PER_COUNTER)
        raw = _numbers(self.key, first * counters, rows * counters)
        numbers = raw.reshape(rows, counters * PER_COUNTER)[:, :n].astype(np.float64)
        numbers += 0.5
        numbers *= 2.0**-32
        return torch.from_numpy(numbers)


@dataclass(frozen=True)
class Signs:
    """Random matrices of ±1, ``shape`` (L, n, c).

    A counter has 32 rows and 8 columns: its eight numbers are the columns', and of each the lowest bit is the first
    row's, where 1 is -1. Counters follow each other along a row of blocks; matrix i's begin at i 2^64.
    """

    key: tuple[int, int]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, generator: torch.Generator | None, shape: tuple[int, int, int]) -> Signs:
        """With a key drawn from a generator of the CPU, or from torch's own."""
        return cls(_key(generator), shape)

    def dense(self, like: Tensor) -> Tensor:
        """The matrices themselves, of the dtype and on the device of ``like``."""
        matrices, n, c = self.shape
        blocks, counters = -(-n // 32), -(-c // PER_COUNTER)
        bits = np.empty((matrices, n, c), dtype=np.uint8)
        for i in range(matrices):
            words = _numbers(self.key, i << 64, blocks * counters).view(np.uint8)
            # Bytes, lowest first, before columns: then bits run down the rows.
            rows = words.reshape(blocks, counters * PER_COUNTER, 4).transpose(0, 2, 1)[..., :c]
            bits[i] = np.unpackbits(rows.reshape(blocks * 4, c), axis=0, bitorder="little")[:n]
        return torch.from_numpy(bits).to(like).mul_(-2).add_(1)


def _key(generator: torch.Generator | None) -> tuple[int, int]:
    limits = torch.iinfo(torch.int64)
    low, high = torch.randint(limits.min, limits.max, (2,), generator=generator, dtype=torch.int64).tolist()
    return low, high


def _numbers(key: tuple[int, int], first: int, counters: int) -> np.ndarray:
    """The numbers of 32 bits of so many counters from ``first`` on, in little-endian memory."""
    words = np.array(key, dtype=np.int64).view(np.uint64)
    # NumPy counts before it draws.
    source = np.random.Philox(key=words, counter=(first - 1) % _COUNTERS)
    return source.random_raw(counters * PER_COUNTER // 2).astype("<u8", copy=False).view("<u4")
