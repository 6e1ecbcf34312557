"""Dense linear algebra on CPU and GPU tensors: SVDs, subspace angles, error bounds."""

from __future__ import annotations
