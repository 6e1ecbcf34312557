"""Triton kernels and their launchers, imported as ``rlspec.kernels``; this file imports no Triton."""

from __future__ import annotations
