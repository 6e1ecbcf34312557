"""Errors that users meet: one line each, naming the thing, what was found, what was wanted and what to do."""

from __future__ import annotations


class RlspecError(Exception):
    """Base of all errors that bad input causes; the command line prints the message and exits with 2."""

    exit_code = 2


class CheckpointError(RlspecError):
    """A checkpoint is missing, truncated or malformed."""


class TensorError(RlspecError):
    """A tensor holds NaN or infinity, or has another shape than wanted."""


class ProjectionError(RlspecError):
    """A model lacks the projections that were asked for."""


class OptionError(RlspecError, ValueError):
    """An option has a value that does not exist or is out of range."""


class RunFolderError(RlspecError):
    """A run folder exists already, is incomplete, or belongs to other settings."""


class BackendError(RlspecError):
    """A backend was asked for that cannot run here."""


class MissingPackageError(RlspecError, ImportError):
    """A package is not installed that few need, so that it does not come with rlspec."""

    def __init__(self, needed_by: str, package: str) -> None:
        super().__init__(
            f"{needed_by} needs {package}, which is not installed: pip install 'rlspec[{package}]'"
        )
