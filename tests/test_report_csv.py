"""The link that saves a table: the cells as they are, and nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
from urllib.parse import unquote

import pytest

from rlspec.report.csv_link import csv_link


def saved(rows: list[list[str]]) -> list[list[str]]:
    kind, content = csv_link(("a", "b"), rows).split(",", 1)
    assert kind == "data:text/csv;charset=utf-8" and not set("<>\"' \n,") & set(content)
    text = unquote(content)
    assert text[0] == "\ufeff"
    return list(csv.reader(io.StringIO(text[1:])))


def test_cells_come_back() -> None:
    rows = [
        ['a "b", c', "σ ‖ΔW‖\nnext"],
        ["-0.5", "+0.10 to +0.42"],
        ["1e-05", "–"],
        ["41.5 % (35.3–47.9)", ""],
    ]
    assert saved(rows) == [["a", "b"], *rows]


@pytest.mark.parametrize(
    "cell", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0", "-1 +A1", "\t=1", "\r=1"]
)
def test_no_cell_is_a_formula(cell: str) -> None:
    assert saved([[cell, "x"]])[1] == [f"'{cell}", "x"]


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert saved([["\ud800", "x"]])[1] == ["?", "x"]
