"""Comma-separated values: read back by Python's own reader as what they were."""

from __future__ import annotations

import csv
import io

from rlspec.io.csv_text import csv_text


def test_rows_read_back_as_they_were() -> None:
    rows = [
        {"name": 'a, "b"\nc\r', "value": 0.1 + 0.2, "count": 3, "flag": True, "beyond": "left out"},
        {"value": 1e-300, "name": None},
    ]
    text = csv_text(["name", "value", "count", "flag"], rows)
    found = list(csv.reader(io.StringIO(text, newline="")))
    assert found[0] == ["name", "value", "count", "flag"]
    assert found[1] == ['a, "b"\nc\r', repr(0.1 + 0.2), "3", "True"] and float(found[1][1]) == 0.1 + 0.2
    assert found[2] == ["", "1e-300", "", ""]
    assert text.startswith("name,value,count,flag\n") and text.endswith("\n")


def test_no_rows_are_the_names_of_the_columns() -> None:
    assert csv_text(["a", "b"], []) == "a,b\n"
