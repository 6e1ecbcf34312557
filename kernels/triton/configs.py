"""Sizes of tiles by target: a table, made ahead of time from what compiles without spills; see ``report``.

rows, columns: of a program's tile of the result   inner: entries of the inner dimension taken at a time
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Precision = Literal["ieee", "tf32x3", "bf16"]
Family = Literal["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"]


class Config(NamedTuple):
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """For blocks of many columns, and of few (up to `FEW`), where reading the weights is all the work.

    Of `PRODUCT` also for some (up to `SOME`), as many as the sample has that tells what a result leaves over.
    """

    many: Config
    few: Config
    some: Config | None = None


FEW, SOME = 32, 64
#: Shared memory of one program, bytes. Other devices that a family stands for (compute capability 8.6, 8.9, 12) have
#: 99 KiB, so the first family is held to that.
SHARED_LIMIT: dict[Family, int] = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
PRODUCT: dict[tuple[Family, Precision], Sizes] = {
    ("sm_80", "tf32x3"): Sizes(Config(64, 128, 32, 8, 2), Config(64, 32, 32, 4, 3), Config(64, 64, 32, 4, 2)),
    ("sm_80", "bf16"): Sizes(Config(128, 128, 32, 8, 3), Config(64, 32, 32, 4, 3), Config(64, 64, 32, 4, 3)),
    ("sm_90", "tf32x3"): Sizes(
        Config(128, 128, 32, 8, 2), Config(64, 32, 32, 4, 3), Config(64, 64, 32, 4, 3)
    ),
    ("sm_90", "bf16"): Sizes(Config(128, 128, 64, 8, 3), Config(64, 32, 64, 4, 3), Config(64, 64, 32, 4, 3)),
    ("sm_100", "tf32x3"): Sizes(
        Config(128, 128, 32, 8, 2), Config(64, 32, 64, 8, 3), Config(64, 64, 32, 4, 2)
    ),
    ("sm_100", "bf16"): Sizes(Config(128, 128, 32, 8, 3), Config(64, 32, 64, 4, 3), Config(64, 64, 32, 4, 2)),
    ("gfx942", "ieee"): Sizes(Config(128, 128, 32, 8, 2), Config(64, 32, 64, 4, 2), Config(64, 64, 32, 4, 2)),
    ("gfx942", "bf16"): Sizes(Config(128, 128, 32, 8, 2), Config(64, 32, 64, 4, 2), Config(64, 64, 32, 4, 2)),
    ("interpreter", "ieee"): Sizes(Config(64, 64, 64, 4, 1), Config(64, 32, 64, 4, 1)),
    ("interpreter", "bf16"): Sizes(Config(64, 64, 64, 4, 1), Config(64, 32, 64, 4, 1)),
}
# What is nearest to float32 on the tensor cores of each. AMD's multiply float32 itself; on NVIDIA's, three products of
# factors split in two terms lose 2^-21 or so.
NEAREST: dict[Family, Precision] = {
    "sm_80": "tf32x3",
    "sm_90": "tf32x3",
    "sm_100": "tf32x3",
    "gfx942": "ieee",
    "interpreter": "ieee",
}


#: Of `add_rounded`: with a stored change, and with factors. Its float64 sums want many threads for a tile.
ROUNDING: dict[Family, Sizes] = {
    "sm_80": Sizes(Config(64, 64, 16, 8, 2), Config(16, 256, 16, 8, 1)),
    "sm_90": Sizes(Config(64, 64, 32, 8, 3), Config(16, 256, 16, 8, 1)),
    "sm_100": Sizes(Config(64, 64, 32, 8, 3), Config(16, 256, 16, 8, 1)),
    "gfx942": Sizes(Config(64, 64, 32, 8, 2), Config(16, 256, 16, 8, 1)),
    "interpreter": Sizes(Config(32, 64, 32, 4, 1), Config(32, 64, 16, 4, 1)),
}


#: Of `gram`: square tiles, which are turned in shared memory.
GRAM: dict[Family, Config] = {
    "sm_80": Config(64, 64, 32, 4, 3),
    "sm_90": Config(128, 128, 32, 8, 2),
    "sm_100": Config(64, 64, 32, 8, 2),
    "gfx942": Config(64, 64, 32, 4, 2),
    "interpreter": Config(64, 64, 64, 4, 1),
}

#: Of `chebyshev_step` and `residual_norms`, whose epilogues hold more than one tile in registers.
RECURRENCE: dict[Family, Config] = {
    "sm_80": Config(64, 128, 32, 8, 2),
    "sm_90": Config(128, 64, 32, 8, 3),
    "sm_100": Config(128, 64, 32, 8, 3),
    "gfx942": Config(128, 128, 32, 8, 2),
    "interpreter": Config(64, 64, 64, 4, 1),
}

#: Of `sylvester_rotation`: two tiles of sums are held at once.
ROTATION: dict[Family, Config] = {
    "sm_80": Config(64, 64, 16, 4, 2),
    "sm_90": Config(128, 64, 32, 8, 2),
    "sm_100": Config(128, 64, 32, 8, 2),
    "gfx942": Config(64, 64, 32, 4, 2),
    "interpreter": Config(64, 64, 64, 4, 1),
}

#: Of `jacobi`: warps by tile, which a matrix has to fit into, and bytes of a number; the same for every target.
JACOBI: dict[tuple[int, int], int] = {(32, 4): 2, (64, 4): 4, (32, 8): 4, (64, 8): 8}
#: What its threads may take. Left to itself, NVIDIA's assembler takes fewer, to fit one program more, and spills.
JACOBI_REGISTERS = 255


def rounding_config(family: Family, *, factors: bool) -> Config:
    """Sizes for `add_rounded` with factors (`Sizes.many`) or a stored change."""
    return ROUNDING[family].many if factors else ROUNDING[family].few


def jacobi_config(n: int, dtype: torch.dtype) -> Config:
    """Sizes for `jacobi` of (n, n): the smallest tile that holds the matrix.

    Raises:
        ValueError: more columns than the largest tile has.
    """
    fits = [tile for tile, size in JACOBI if size == dtype.itemsize and tile >= n]
    if not fits:
        raise ValueError(f"expected up to {max(JACOBI)[0]} columns, found {n}")
    return Config(min(fits), min(fits), min(fits), JACOBI[min(fits), dtype.itemsize], 1)


def family_of(device: torch.device) -> Family:
    """The row of the tables that a device is served from."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    by_major: dict[int, Family] = {9: "sm_90", 10: "sm_100"}
    return by_major.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def product_config(family: Family, precision: Precision, columns: int) -> Config:
    """Sizes for a block of ``columns``.

    Raises:
        ValueError: a precision that the family has no tensor cores for.
    """
    sizes = PRODUCT.get((family, precision))
    if sizes is None:
        known = ", ".join(p for f, p in PRODUCT if f == family)
        raise ValueError(f"precision={precision}: not on {family}; valid: {known}")
    if columns <= FEW:
        return sizes.few
    return sizes.some if sizes.some is not None and columns <= SOME else sizes.many
