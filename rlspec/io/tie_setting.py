"""What a checkpoint's configuration says of its head: tied to the embedding, or not."""

from __future__ import annotations

from pathlib import Path

from rlspec.io.files import read_json_object
from rlspec.io.stacks import text_sections

SETTING = "tie_word_embeddings"


def says_tied(config: Path) -> bool | None:
    """What config.json says, in any section that is about the text; None where it leaves that to a default.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not config.is_file():
        return None
    said = [section[SETTING] for section in text_sections(read_json_object(config)) if SETTING in section]
    return any(said) if said else None
