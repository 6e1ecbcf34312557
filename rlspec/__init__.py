"""How fine-tuning and reinforcement learning rotate a model's singular vectors, and how to put them back.

The public names are imported on first use, so that ``import rlspec`` and ``rlspec --help`` load no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from rlspec import tasks as tasks
    from rlspec import train as train
    from rlspec.jobs.series import measure as measure
    from rlspec.linalg.svd import svd as svd
    from rlspec.restore import restore_ as restore_
    from rlspec.restore import restore_checkpoint as restore_checkpoint
    from rlspec.restore import restore_matrix as restore_matrix
    from rlspec.spectra.basis import SpectralBasis as SpectralBasis
    from rlspec.spectra.tracker import SpectralTracker as SpectralTracker

_ATTRIBUTES = {
    "SpectralBasis": "rlspec.spectra",
    "SpectralTracker": "rlspec.spectra",
    "measure": "rlspec.jobs.series",
    "restore_": "rlspec.restore",
    "restore_checkpoint": "rlspec.restore",
    "restore_matrix": "rlspec.restore",
    "svd": "rlspec.linalg.svd",
}
_SUBPACKAGES = ("tasks", "train")

__all__ = [
    "SpectralBasis",
    "SpectralTracker",
    "__version__",
    "measure",
    "restore_",
    "restore_checkpoint",
    "restore_matrix",
    "svd",
    "tasks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "_C":
        return _extension()
    if name == "__version__":
        return version("rlspec")
    if name in _ATTRIBUTES:
        return getattr(import_module(_ATTRIBUTES[name]), name)
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _extension() -> Any:
    """The compiled part, for ``from rlspec import _C``."""
    try:
        return import_module(f"{__name__}._C")
    except ImportError as error:
        from rlspec.errors import ExtensionError

        folder = __path__[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == f"{__name__}._C"
        found = "is not built for this Python" if missing else f"cannot be loaded ({error})"
        raise ExtensionError(
            f"{folder}: the compiled part of rlspec {found}; build it with 'python -m pip install -e .' in the folder "
            "above (with a C++ compiler), or run an installed rlspec from elsewhere"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
