"""The embedded base model: a small Llama that ships with the package, and the recipe that makes it."""

from __future__ import annotations

from pathlib import Path

#: The name under which the command line finds the embedded model.
EMBEDDED = "embedded"


def embedded_model_path() -> Path:
    """The folder of the embedded base model, a Hugging Face checkpoint with its tokenizer.

    Raises:
        CheckpointError: the installation lacks the model's files.
    """
    from rlspec.errors import CheckpointError

    folder = Path(__file__).parent / "general_points_base"
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: the embedded model's files are missing; reinstall rlspec")
    return folder
