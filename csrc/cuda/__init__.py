"""Sources of the small dense solves on a device, imported as ``rlspec.kernels.cuda``; `rlspec.linalg` compiles them."""

from __future__ import annotations
