"""The pages in a real browser: their tables sort and are saved, no text lies on another, and no script runs but ours."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from browser import answer, asked, browser, complaints, shown
from report_toys import make_run, make_tree
from test_report_series import rows, write, write_scores

from rlspec.report import write_comparison, write_report
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


@pytest.fixture(scope="module", params=["run", "series", "comparison"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    if request.param == "run":
        return write_report(make_run(folder / "run")).read_text()
    series = write(folder / "series", rows(12))
    scores = [
        {"checkpoint": f"checkpoint-{100 * i}", "score": "loss", "value": 2 + (i % 5) / 8}
        for i in range(1, 13)
    ]
    write_scores(series, scores)
    if request.param == "series":
        return write_report(series).read_text()
    return write_comparison([make_run(folder / "run"), series]).read_text()


# Every heading is clicked on and, the other way, taken by the keyboard; what each table then is, and what its link saves.
WALK = """
const cells = table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent));
return [...document.querySelectorAll("table")].map(table => {
  const link = table.parentElement.nextElementSibling.querySelector("a");
  const sorted = [...table.tHead.rows[0].cells].map(heading => {
    const states = [heading.getAttribute("aria-sort")];
    heading.click();
    states.push(heading.getAttribute("aria-sort"));
    const up = cells(table);
    heading.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
    states.push(heading.getAttribute("aria-sort"));
    const down = cells(table);
    heading.dispatchEvent(new KeyboardEvent("keydown", {key: " "}));
    states.push(heading.getAttribute("aria-sort"));
    return {states, up, down};
  });
  return {cells: cells(table), sorted, link: link.href, saved: link.download, caption: table.caption.textContent};
});
"""


def test_every_table_of_every_page_sorts_and_is_saved_as_it_is_shown(page: str, tmp_path: Path) -> None:
    walked = asked(page, WALK)
    assert complaints(walked, tmp_path) == []
    tables = answer(page, WALK, tmp_path)
    assert len(tables) == page.count("<table>") > 0
    assert len({table["saved"] for table in tables}) == len(tables)
    for table in tables:
        head, *body = table["cells"]
        kind, content = table["link"].split(",", 1)
        assert kind == "data:text/csv;charset=utf-8" and table["saved"].endswith(".csv") and table["caption"]
        assert list(csv.reader(io.StringIO(unquote(content).removeprefix("\ufeff")))) == table["cells"]
        assert len(table["sorted"]) == len(head)
        for column, found in enumerate(table["sorted"]):
            assert found["states"] == ["none", "ascending", "descending", "none"]
            for way in (found["up"], found["down"]):
                assert way[0] == head and sorted(way[1:]) == sorted(body)
            up, down = (
                [row[column] for row in found[way][1:] if row[column] not in ("", "–")]
                for way in ("up", "down")
            )
            if all(re.fullmatch(r"[-+]?[\d.]+( %)?", cell) for cell in up):
                values = [float(cell.removesuffix(" %")) for cell in up]
                assert values == sorted(values)
                assert [float(cell.removesuffix(" %")) for cell in down] == values[::-1]


def test_checkpoints_sort_by_their_steps_and_not_by_their_letters(tmp_path: Path) -> None:
    page = write_report(write(tmp_path / "series", rows(12))).read_text()
    (table,) = (found for found in answer(page, WALK, tmp_path) if found["caption"] == "Checkpoints")
    names = [f"checkpoint-{100 * i}" for i in range(1, 13)]
    assert [row[0] for row in table["sorted"][0]["up"][1:]] == names
    assert [row[0] for row in table["sorted"][0]["down"][1:]] == names[::-1]


def test_the_console_would_tell_of_a_fault(tmp_path: Path) -> None:
    """The broken twins: of a script that throws, and of one that the policy refuses."""
    (told,) = complaints(asked(table_page(), "nothing.of(this_kind)"), tmp_path)
    assert "nothing is not defined" in told
    refused = complaints(table_page().replace("</body>", "<script>1</script></body>"), tmp_path)
    assert len(refused) == 1 and "Content Security Policy" in refused[0]


# Texts of drawings that leave their drawing or lie on each other, where the page's own fonts put them. A text that is
# turned by a right angle has a box of its own, as the others do.
TEXTS = """
const faults = [];
for (const drawing of document.querySelectorAll("svg[role=img]")) {
  const frame = drawing.getBoundingClientRect();
  const texts = [...drawing.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  texts.forEach(([text, box], i) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 2
        || box.bottom > frame.bottom + 1)
      faults.push([text, "outside"]);
    for (const [other, at] of texts.slice(i + 1))
      // A line of text is higher than its letters.
      if (box.left < at.right && at.left < box.right && box.top + 4 < at.bottom && at.top + 4 < box.bottom)
        faults.push([text, other]);
  });
}
return faults;
"""


def test_no_text_of_a_drawing_leaves_it_or_lies_on_another(page: str, tmp_path: Path) -> None:
    assert answer(page, TEXTS, tmp_path) == []
    moved = re.sub(r'<text class="y" x="[\d.]+"', '<text class="y" x="20"', page)
    assert answer(moved, TEXTS, tmp_path) != []  # the broken twin


def test_the_names_of_many_branches_do_not_lie_on_each_other(tmp_path: Path) -> None:
    starts = (100, 110, 120, 290, 300)
    ood = {("sft", 0): 20, ("sft", 300): 10} | {(f"ppo-from-{i}", at): 10 for i in starts for at in (0, 20)}
    run = make_tree(tmp_path / "run", ood, ppo_from=starts, finished=False)
    page = write_report(run).read_text()
    assert answer(page, TEXTS, tmp_path) == []
    places = re.findall(r'<text class="begin" x="[\d.]+" y="([\d.]+)"', page)
    assert len({*places}) > 1
    level = re.sub(r'(<text class="begin" x="[\d.]+") y="[\d.]+"', rf'\1 y="{places[0]}"', page)
    assert answer(level, TEXTS, tmp_path) != []  # the broken twin


def test_a_script_that_got_into_the_page_would_not_run(tmp_path: Path) -> None:
    attack = "<script>document.body.dataset.attacked = 1</script>"
    page = table_page().replace("</body>", f"{attack}</body>")
    assert 'data-attacked="1"' not in shown(page, tmp_path)
    free = page.replace("Content-Security-Policy", "X-Nothing")  # the broken twin
    assert 'data-attacked="1"' in shown(free, tmp_path)


def test_checkpoints_and_their_scores_are_seen_without_scrolling(tmp_path: Path) -> None:
    folder = write(tmp_path / "series", rows(3))
    names = ("text_loss", "forgetting")
    write_scores(
        folder, [{"checkpoint": "checkpoint-300", "score": name, "value": -0.123456} for name in names]
    )
    page = write_report(folder).read_text()
    script = "return [...document.querySelectorAll('.scroll')].map(box => box.scrollWidth - box.clientWidth);"
    assert answer(page, script, tmp_path, 1100) == [0]
    held = page.replace('class="long"', 'class="held"')  # the broken twin: names in one piece
    assert answer(held, script, tmp_path, 1100) != [0]


def test_nothing_of_the_page_is_wider_than_its_window(page: str, tmp_path: Path) -> None:
    script = "return document.documentElement.scrollWidth - innerWidth;"
    assert answer(page, script, tmp_path) <= 0
    unscrolled = page.replace(".scroll { overflow-x: auto; }", "td { padding: 200px; }")
    assert answer(unscrolled, script, tmp_path) > 0  # the broken twin
