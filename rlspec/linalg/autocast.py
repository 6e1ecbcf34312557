"""Arithmetic in the precision of the tensors at hand, also inside a training loop's autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch torch.autocast off on every device; it is restored on exit. Usable as a decorator.

    A callback of a trainer runs inside it, where float32 products are rounded to 16 bits.
    """
    with ExitStack() as stack:
        for device in _DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
