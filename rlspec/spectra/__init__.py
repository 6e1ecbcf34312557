"""Spectra of weights against a fixed reference: singular values, principal angles, where an update goes."""

from __future__ import annotations

from rlspec.linalg.rank import Rank
from rlspec.perturb.matrix import MatrixBasis
from rlspec.spectra.basis import SpectralBasis
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.tracker import SpectralRecord, SpectralRecords, SpectralTracker

__all__ = [
    "DealtTracker",
    "MatrixBasis",
    "Rank",
    "SpectralBasis",
    "SpectralRecord",
    "SpectralRecords",
    "SpectralTracker",
]
