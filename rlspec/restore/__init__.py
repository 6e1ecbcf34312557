"""Putting a reference's singular directions or values back: one matrix, or a whole checkpoint.

The public names are imported on first use: the settings, which the command line reads for --help, need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlspec.restore.checkpoint import restore_checkpoint as restore_checkpoint
    from rlspec.restore.matrix import RestoreResult as RestoreResult
    from rlspec.restore.matrix import restore_matrix as restore_matrix
    from rlspec.restore.model import restore_ as restore_
    from rlspec.restore.options import Mode as Mode
    from rlspec.restore.options import RestoreOptions as RestoreOptions
    from rlspec.restore.options import Rounding as Rounding
    from rlspec.restore.report import MatrixReport as MatrixReport
    from rlspec.restore.report import RestoreReport as RestoreReport

_MODULES = {
    "MatrixReport": "report",
    "Mode": "options",
    "RestoreOptions": "options",
    "RestoreReport": "report",
    "RestoreResult": "matrix",
    "Rounding": "options",
    "restore_": "model",
    "restore_checkpoint": "checkpoint",
    "restore_matrix": "matrix",
}

__all__ = [
    "MatrixReport",
    "Mode",
    "RestoreOptions",
    "RestoreReport",
    "RestoreResult",
    "Rounding",
    "restore_",
    "restore_checkpoint",
    "restore_matrix",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
