"""The folder of a training that is tracked from inside somebody else's trainer.

::

    tracking.json     what is tracked, and of which training; written first
    reference/        the tracked weights at the training's start, where no base was given: a checkpoint folder
    spectra.jsonl     one row per event and matrix, with the columns of a run folder's
    scores.jsonl      one row per event and score, where scores are taken

A training that is resumed goes on in it. One that starts again sets the files of the one before aside.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlspec.errors import RunFolderError
from rlspec.integrations.hold import Hold, new_training
from rlspec.io.files import read_json_object, replacing, write_atomically
from rlspec.io.fused import Config
from rlspec.io.index import INDEX_FILE
from rlspec.io.jsonl import Row, append_rows, keep_rows, read_rows, repair
from rlspec.io.projections import Projection, find_projections
from rlspec.io.weights import open_weights
from rlspec.spectra.dealt import gathered, make_room
from rlspec.spectra.processes import GatherError, Processes, told
from rlspec.spectra.spread import in_pieces, is_spread


class TrackingFolder:
    """Where the rows of one training go.

    Args:
        path: made where it is missing.
        settings: what is tracked, plain values; a resumed training must have the same.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        #: which training the files are of, see ``rlspec.integrations.hold``; None where an earlier version began it
        self.training: str | None = None
        self._hold: Hold | None = None

    def hold(self) -> None:
        """Keep the trainings of other processes away from here until :meth:`release`; first of all.

        Raises:
            RunFolderError: one is here already.
        """
        self._hold = Hold(self.path)

    def release(self) -> None:
        if self._hold is not None:
            self._hold.release()

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
        self.training = new_training()
        told = {**self.settings, "training": self.training}
        write_atomically(self._settings_file, (json.dumps(told, indent=2) + "\n").encode())
        return aside

    def resume(self, step: int, trainings: Collection[str] | None = None) -> list[Row]:
        """Go on from a step: rows of later steps go, which are trained again.

        Args:
            trainings: those that the resumed checkpoint belongs to; None where it cannot tell.

        Returns:
            The rows that stay.

        Raises:
            RunFolderError: the folder tracks something else or another training, or what it says of that cannot be read.
        """
        before = self._settings_file.exists()
        if not before:
            self.start()
        found = {
            "per_head": False,  # which earlier versions did not tell
            **read_json_object(self._settings_file, RunFolderError),
        }
        for name, wanted in self.settings.items():
            if found.get(name) != wanted:
                raise RunFolderError(
                    f"{self._settings_file}: {name} is {found.get(name)!r} there and {wanted!r} now; resume with the "
                    "same settings, or choose another folder"
                )
        training = found.get("training")
        if before and trainings is not None and training is not None and training not in trainings:
            raise RunFolderError(
                f"{self.path} holds another training than the one that is resumed at step {step}; files of earlier ones "
                "are there under names with a number: put its own back into a folder and give that as out="
            )
        self.training = training
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

    def save_reference(
        self, model: nn.Module, modules: Sequence[str], processes: Processes | None = None
    ) -> None:
        """Write the weights that are tracked, as they are now, to :attr:`reference`, a tensor at a time.

        Args:
            processes: that hold the model together and all call this; the first one writes.

        Errors are those of ``SpectralBasis.from_model``; ProcessError, GatherError see ``DealtTracker``.
        """
        processes = processes or Processes()
        with processes.patient() as waiting:  # the first one's disk may be slow
            failure = self._write_reference(model, modules, processes)
            if processes.count == 1 and failure is not None:
                raise failure
            waiting.agree(None if failure is None else told(failure))

    def _write_reference(
        self, model: nn.Module, modules: Sequence[str], processes: Processes
    ) -> Exception | None:
        """What went wrong in this process."""
        spread = is_spread(model)
        if not (spread or processes.number == 0):
            return None
        failure: Exception | None = None
        try:
            weights = open_weights(in_pieces(model))
            writer = _Reference(self.reference, weights.config(), weights.shapes())
            found = find_projections(writer.shapes, modules, writer.config)
            if any(projection.tensor.endswith("qkv_proj.weight") for projection in found):
                found = find_projections(
                    writer.shapes, (*modules, "o"), writer.config
                )  # how that tensor is split
            writer.expect(found)
            if spread:
                largest = max(math.prod(writer.shapes[projection.tensor]) for projection in found)
                make_room(model, largest, processes)
            for projection, matrix, _ in gathered(weights, found, spread=spread):
                if processes.number == 0 and failure is None:
                    try:
                        writer.put(projection, matrix)
                    except Exception as error:
                        failure = error  # the others gather on
                del matrix
            if processes.number == 0 and failure is None:
                writer.finish()
        except GatherError:
            raise
        except Exception as error:
            failure = failure or error
        return failure

    def append(self, rows: Sequence[Row]) -> None:
        if self._hold is not None:
            self._hold.check()
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


class _Reference:
    """A checkpoint folder with one file a tensor; its index comes last."""

    def __init__(self, folder: Path, config: Config | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder, self.config, self.shapes = folder, config, shapes
        self._left: dict[str, int] = {}  # tensor -> its projections still to come
        self._open: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}

    def expect(self, projections: Sequence[Projection]) -> None:
        for projection in projections:
            self._left[projection.tensor] = self._left.get(projection.tensor, 0) + 1

    def put(self, projection: Projection, matrix: Tensor) -> None:
        name = projection.tensor
        # Of a fused tensor what is not tracked stays zero.
        tensor = self._open.setdefault(name, torch.zeros(self.shapes[name], dtype=matrix.dtype))
        projection.put(tensor, matrix.cpu())
        self._left[name] -= 1
        if self._left[name] == 0:
            del self._open[name]
            file = f"model-{len(self._files) + 1:05d}-of-{len(self._left):05d}.safetensors"
            self.folder.mkdir(exist_ok=True)
            with replacing(self.folder / file) as temporary:
                save_file({name: tensor}, temporary, metadata={"format": "pt"})
            self._files[name] = file

    def finish(self) -> None:
        if self.config is not None:  # how fused projections are laid out
            write_atomically(self.folder / "config.json", json.dumps(self.config, default=str).encode())
        index = {"metadata": {}, "weight_map": self._files}
        write_atomically(self.folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
