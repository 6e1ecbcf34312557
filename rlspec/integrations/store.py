"""The folder of a training that is tracked from inside somebody else's trainer.

::

    tracking.json     what is tracked; written first
    reference/        the tracked weights at the training's start, where no base was given: a checkpoint folder
    spectra.jsonl     one row per event and matrix, with the columns of a run folder's
    scores.jsonl      one row per event and score, where scores are taken

A training that is resumed goes on in it. One that starts again sets the files of the one before aside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlspec.errors import RunFolderError
from rlspec.io.files import read_json_object, replacing, write_atomically
from rlspec.io.index import SINGLE_FILE
from rlspec.io.jsonl import Row, append_rows, keep_rows, read_rows, repair
from rlspec.io.projections import find_projections
from rlspec.io.weights import open_weights


class TrackingFolder:
    """Where the rows of one training go.

    Args:
        path: made where it is missing.
        settings: what is tracked, plain values; a resumed training must have the same.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def spectra(self) -> Path:
        return self.path / "spectra.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def _settings_file(self) -> Path:
        return self.path / "tracking.json"

    def start(self) -> list[Path]:
        """Begin a training from its first step.

        Returns:
            What an earlier training left here, under the new names that it was given.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self._set_aside()
        write_atomically(self._settings_file, (json.dumps(self.settings, indent=2) + "\n").encode())
        return aside

    def resume(self, step: int) -> list[Row]:
        """Go on from a step: rows of later steps go, which are trained again.

        Returns:
            The rows that stay.

        Raises:
            RunFolderError: the folder tracks something else.
        """
        if not self._settings_file.exists():
            self.start()
        found = read_json_object(self._settings_file)
        for name, wanted in self.settings.items():
            if found.get(name) != wanted:
                raise RunFolderError(
                    f"{self._settings_file}: {name} is {found.get(name)!r} there and {wanted!r} now; resume with the "
                    "same settings, or choose another folder"
                )
        repair(self.spectra)
        rows = read_rows(self.spectra)
        counts: dict[int, int] = {}
        for row in rows:
            counts[row["step"]] = counts.get(row["step"], 0) + 1
        whole = max(counts.values(), default=0)  # a kill may have left some rows of the last event alone
        kept = {event for event, count in counts.items() if event <= step and count == whole}
        keep_rows(self.spectra, lambda row: row["step"] in kept)
        repair(self.scores)
        keep_rows(self.scores, lambda row: row["step"] in kept)
        return [row for row in rows if row["step"] in kept]

    def save_reference(self, model: nn.Module, modules: Sequence[str]) -> None:
        """Write the weights that are tracked, as they are now, to :attr:`reference`.

        Errors are those of ``SpectralBasis.from_model``.
        """
        weights = open_weights(model)
        config = weights.config()
        shapes = weights.shapes()
        tensors: dict[str, Tensor] = {}
        found = find_projections(shapes, modules, config)
        if any(projection.tensor.endswith("qkv_proj.weight") for projection in found):
            found = find_projections(shapes, (*modules, "o"), config)  # tells how that tensor is split
        for projection, matrix in weights.stream(found):
            # Of a fused tensor what is not tracked stays zero.
            if projection.tensor not in tensors:
                tensors[projection.tensor] = torch.zeros(shapes[projection.tensor], dtype=matrix.dtype)
            projection.put(tensors[projection.tensor], matrix.cpu())
        self.reference.mkdir(exist_ok=True)
        if config is not None:  # how fused projections are laid out
            write_atomically(self.reference / "config.json", json.dumps(config, default=str).encode())
        with replacing(self.reference / SINGLE_FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def append(self, rows: Sequence[Row]) -> None:
        append_rows(self.spectra, rows)

    def append_scores(self, rows: Sequence[Row]) -> None:
        append_rows(self.scores, rows)

    def read_scores(self) -> list[Row]:
        """The rows of :attr:`scores`, none where there are none."""
        return read_rows(self.scores)

    def _set_aside(self) -> list[Path]:
        there = [
            p for p in (self.spectra, self.scores, self.reference, self._settings_file) if os.path.lexists(p)
        ]
        number = 1
        while any(os.path.lexists(f"{path}.{number}") for path in there):
            number += 1
        return [path.rename(f"{path}.{number}") for path in there]
