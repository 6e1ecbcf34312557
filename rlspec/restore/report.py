"""What a restoration did, matrix by matrix, and the journal that lets an interrupted one still tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlspec.errors import CheckpointError
from rlspec.io.files import write_atomically
from rlspec.io.jsonl import append_rows, read_rows, repair
from rlspec.io.projections import Projection

if TYPE_CHECKING:  # both report to here
    from rlspec.restore.matrix import RestoreResult
    from rlspec.restore.tensors import Changes


@dataclass(frozen=True)
class MatrixReport:
    """One restored matrix. Norms are Frobenius norms; the figures are those of :class:`RestoreResult`."""

    name: str
    tensor: str
    module: str
    layer: int | None
    rows: int
    cols: int
    dtype: str
    k: int
    change_frobenius: float
    change_relative: float
    error_estimate: float
    rounding_share: float
    entries_changed: int
    rotation_sine_rms: float | None
    method: str
    note: str | None = None

    @classmethod
    def of(
        cls,
        projection: Projection,
        shape: tuple[int, int],
        dtype: torch.dtype,
        result: RestoreResult | Changes,
    ) -> MatrixReport:
        described: dict[str, Any] = {
            "name": projection.name,
            "tensor": projection.tensor,
            "module": projection.module,
            "layer": projection.layer,
            "rows": shape[0],
            "cols": shape[1],
            "dtype": str(dtype).removeprefix("torch."),
        }
        figures = (each.name for each in fields(cls) if each.name not in described)
        return cls(**described, **{name: getattr(result, name) for name in figures})


@dataclass(frozen=True)
class RestoreReport:
    """The result of :func:`rlspec.restore_checkpoint`.

    ``kept`` maps every tensor that was not restored to the reason. ``seconds`` is the time of this call; ``resumed``
    counts matrices that an earlier, interrupted call had done; ``tied`` maps stored copies of a tied
    embedding to its name, as which they are written; ``notes`` are sentences about the checkpoint.
    """

    out: Path
    base: Path
    tuned: Path
    options: dict[str, Any]
    matrices: tuple[MatrixReport, ...]
    kept: dict[str, str]
    bytes_written: int
    seconds: float
    resumed: int = 0
    merged: tuple[str, ...] = field(default=())
    tied: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, **{name: str(found[name]) for name in ("out", "base", "tuned")}}

    def write(self, path: Path) -> None:
        """Write the report as JSON; a reader sees the old file or the new one.

        Raises:
            CheckpointError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with _named(path):
            write_atomically(path, text.encode())


class Journal:
    """Reports of the matrices done so far, a line of JSON each, beside the unfinished output.

    Every method raises CheckpointError where a file cannot be used.

    Args:
        out: the output.
        number: of this process, where several write the output: each appends to a file of its own.
    """

    def __init__(self, out: Path, number: int = 0) -> None:
        self._folder, self._stem = out.parent, f".{out.name}.rlspec-restored"
        self._path = self._folder / (f"{self._stem}-{number}.jsonl" if number else f"{self._stem}.jsonl")

    def append(self, rows: Sequence[MatrixReport]) -> None:
        if rows:
            with _named(self._path):
                append_rows(self._path, map(asdict, rows))

    def read(self) -> dict[str, MatrixReport]:
        """Name to report, those of all processes, the latest of each; a line cut off by a kill is removed."""
        rows: dict[str, MatrixReport] = {}
        for path in self._files():
            with _named(path):
                repair(path)
            for row in read_rows(path, CheckpointError):
                try:
                    report = MatrixReport(**row)
                except TypeError:  # of another version
                    continue
                rows[report.name] = report
        return rows

    def clear(self) -> None:
        """Remove the files of all processes."""
        for path in self._files():
            with _named(path):
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        others = sorted(self._folder.glob(f"{escape(self._stem)}-*.jsonl"))
        return [
            self._folder / f"{self._stem}.jsonl",
            *(path for path in others if self._number(path).isdecimal()),
        ]

    def _number(self, path: Path) -> str:
        return path.name.removeprefix(f"{self._stem}-").removesuffix(".jsonl")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Tell of a file that cannot be used in one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
