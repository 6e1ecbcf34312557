"""Triton kernels and their launchers; imported as ``rlspec.kernels``. Importing this package imports no Triton."""

from __future__ import annotations
