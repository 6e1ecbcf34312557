"""Errors that users meet: one line each, naming the thing, what was found, what was wanted and what to do.

What is wrong with a value that was given (an option, a tensor, the name of a module) is a ValueError too; what is
wrong with a file, a folder or the machine is not. Messages name arguments as Python does (``strength=2``), never
flags: the command line puts its own spelling there (see rlspec.cli.flags).
"""

from __future__ import annotations


class RlspecError(Exception):
    """Base of all errors that bad input causes; the command line prints the message and exits with 2."""

    exit_code = 2


class CheckpointError(RlspecError):
    """A checkpoint is missing, truncated or malformed."""


class TensorError(RlspecError, ValueError):
    """A tensor holds NaN or infinity, or has another shape than wanted."""


class ProjectionError(RlspecError, ValueError):
    """A model lacks the projections that were asked for."""


class OptionError(RlspecError, ValueError):
    """An option has a value that does not exist or is out of range."""


class RunFolderError(RlspecError):
    """A run folder exists already, is incomplete, or belongs to other settings."""


class ExtensionError(RlspecError, ImportError):
    """The compiled part of rlspec is not there, or cannot be loaded."""


class BackendError(RlspecError):
    """A backend was asked for that cannot run here."""


class JobError(RlspecError):
    """A process or a cluster's job that worked on a part of something ended without a result."""

    exit_code = 1


class MissingPackageError(RlspecError, ImportError):
    """A package is not installed that few need, so that it does not come with rlspec."""

    def __init__(self, needed_by: str, package: str, *, extra: str | None = None) -> None:
        super().__init__(
            f"{needed_by} needs {package}, which is not installed: pip install 'rlspec[{extra or package}]'"
        )


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse an argument of another type, before it fails where nobody knows its name.

    Args:
        wanted: what messages call the kinds.

    Raises:
        OptionError: it is none of the kinds. True and False are no numbers.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        plain = isinstance(value, (str, int, float, type(None)))
        given = f"{name}={value!r}" if plain else f"{name}, a {type(value).__name__},"
        raise OptionError(f"{given} is not {wanted}")
