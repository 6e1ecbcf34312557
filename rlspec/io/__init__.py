"""Checkpoints on disk: their index, and which tensors are which projections."""

from __future__ import annotations
