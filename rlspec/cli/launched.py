"""Who of several processes tells what is wrong: the first one, but for what it cannot know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlspec.errors import RlspecError
from rlspec.io.share import Share


class Told:
    """Whether the processes have found each other, from when on they tell each other what goes wrong."""

    joined = False


@contextmanager
def first_tells(share: Share, launch: Callable[[], Path]) -> Iterator[Told]:
    """Context for a command that several processes carry out; errors of rlspec's own end it with their exit code.

    What all refuse alike, the first one tells. What one refuses alone, it tells itself: the first one goes on then.

    Args:
        launch: the file that the first one holds from when on it refuses nothing any more.
    """
    told, began = Told(), time.monotonic()
    try:
        yield told
    except RlspecError as error:
        if share.number == 0:
            raise
        from rlspec.io.launch import FirstMissingError, ToldByFirstError, wait_for_launch

        if isinstance(error, ToldByFirstError):
            raise SystemExit(error.exit_code) from None
        if told.joined or isinstance(error, FirstMissingError):
            raise
        try:
            alone = wait_for_launch(launch(), began)
        except KeyboardInterrupt:  # whoever started the processes has seen the first one end
            alone = False
        if not alone:
            raise SystemExit(error.exit_code) from None
        raise type(error)(f"process {share.number} of {share.count}: {error}") from None
