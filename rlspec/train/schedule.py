"""Learning rates and seeds as pure functions of the step: nothing to save, nothing to replay on resume."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

Schedule = Literal["cosine", "constant"]


def learning_rate_at(
    step: int,
    total: int,
    *,
    peak: float,
    warmup_ratio: float = 0.0,
    schedule: Schedule = "cosine",
    floor: float = 0.0,
) -> float:
    """Learning rate of step 1 … total.

    Linear warm-up over the first ``warmup_ratio`` of the steps (the first step is never at 0), then constant
    or half a cosine from ``peak`` to ``floor``, which the last step just misses.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = (step - 1 - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
