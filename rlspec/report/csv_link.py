"""A table as a link that saves it as CSV: no script and no second file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?( to [-+][\d.]+)?")


def csv_link(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A data: URI of the cells, as UTF-8 with a byte order mark, by which Excel knows it."""
    text = io.StringIO()
    writer = csv.writer(text)
    for row in (head, *rows):
        writer.writerow([_harmless(cell) for cell in row])
    return "data:text/csv;charset=utf-8," + quote(("\ufeff" + text.getvalue()).encode(errors="replace"))


def _harmless(cell: str) -> str:
    """A text of somebody else's run that a spreadsheet would take for a formula, marked as a text."""
    return (
        f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not _NUMBER.fullmatch(cell) else cell
    )
