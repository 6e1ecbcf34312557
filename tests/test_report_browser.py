"""The report in a real browser: its tables sort and are saved, and no script runs but its own."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from browser import answer, browser, shown
from report_toys import make_run

from rlspec.report import write_report
from rlspec.report.pages import rendered

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium")

HEAD = ("name", "share", "missing")
ROWS = [
    ["step 100", "41.5 % (35.3–47.9)", "–"],
    ["step 20", "-3.5 %", "2e-16"],
    ["step 3", "100 %", "0.5"],
    ["=step 4", "9 %", "–"],
]
# Clicks on the heading of a column, then the names from top to bottom, for each number of clicks.
CLICKS = """
const found = {};
document.querySelectorAll("table").forEach(table => {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    found[column] = [0, 1, 2, 3].map(click => {
      if (click) heading.click();
      return [heading.getAttribute("aria-sort"), ...[...table.tBodies[0].rows].map(row => row.cells[0].textContent)];
    });
  });
});
return found;
"""


def table_page(rows: list[list[str]] = ROWS) -> str:
    section: dict[str, Any] = {
        "title": "t",
        "text": "",
        "chart": None,
        "head": HEAD,
        "rows": rows,
        "note": "",
    }
    facts = {"plan": "p", "model": "m", "seeds": [], "cells": 1, "sections": [section]}
    return rendered("study/page.html.jinja", facts)


def test_a_click_on_a_heading_sorts_by_its_numbers_or_texts(tmp_path: Path) -> None:
    found = answer(table_page(), CLICKS, tmp_path)
    hundred, twenty, three, four = (row[0] for row in ROWS)
    orders = {
        "0": [four, three, twenty, hundred],
        "1": [twenty, four, hundred, three],
        "2": [twenty, three, hundred, four],  # what is missing stays below
    }
    as_they_were = [hundred, twenty, three, four]
    for column, up in orders.items():
        down = [three, twenty, hundred, four] if column == "2" else up[::-1]
        assert found[column] == [
            ["none", *as_they_were], ["ascending", *up], ["descending", *down], ["none", *as_they_were]
        ]  # fmt: skip


def test_every_table_of_a_run_sorts_and_is_saved_as_it_is_shown(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text()
    script = """
    return [...document.querySelectorAll("table")].map(table => ({
      cells: [...table.rows].map(row => [...row.cells].map(cell => cell.textContent)),
      sorts: [...table.tHead.rows[0].cells].every(cell => cell.getAttribute("aria-sort") === "none"),
      link: table.parentElement.nextElementSibling.querySelector("a").href,
    }));
    """
    tables = answer(page, script, tmp_path)
    assert len(tables) == page.count("<table>") >= 4
    for table in tables:
        assert table["sorts"]
        kind, content = table["link"].split(",", 1)
        assert kind == "data:text/csv;charset=utf-8"
        assert list(csv.reader(io.StringIO(unquote(content).removeprefix("\ufeff")))) == table["cells"]


def test_a_script_that_got_into_the_page_would_not_run(tmp_path: Path) -> None:
    attack = "<script>document.body.dataset.attacked = 1</script>"
    page = table_page().replace("</body>", f"{attack}</body>")
    assert 'data-attacked="1"' not in shown(page, tmp_path)
    free = page.replace("Content-Security-Policy", "X-Nothing")  # the broken twin
    assert 'data-attacked="1"' in shown(free, tmp_path)


def test_nothing_of_the_page_is_wider_than_its_window(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text()
    script = "return document.documentElement.scrollWidth - innerWidth;"
    assert answer(page, script, tmp_path) <= 0
    unscrolled = page.replace(".scroll { overflow-x: auto; }", "td { padding: 200px; }")
    assert answer(unscrolled, script, tmp_path) > 0  # the broken twin
