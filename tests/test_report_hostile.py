"""A run folder of somebody else's: none of its texts becomes markup, none of its values ends in a traceback."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from report_toys import make_run

from rlspec.cli.main import main
from rlspec.errors import RunFolderError
from rlspec.report import html, pages, write_comparison, write_report

ATTACK = "\"'><script>alert(1)<-script><svg onload=alert(2)><!--{{ 7 * 7 }}{% raw %}&lt;</style></title>"


class Markup(HTMLParser):
    """What a browser would act on: every element with the names of its attributes; and the text besides."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attributes)))
        self.texts += [value for _, value in attributes if value]

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("/" + tag,))

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment",))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def foreign_run(parent: Path, attack: str) -> Path:
    """A run with ``attack`` in every text that reaches the page, each with its own number, from 10 on."""
    folder = make_run(parent / f"{attack.replace('/', '-')}10", layers=1)
    shift = f"{attack}14"
    config = {
        "model": f"{attack}11",
        "task": f"{attack}12",
        "seed": f"{attack}13",
        "shifts": ["none", shift],
        f"{attack}15": [f"{attack}16", 1],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    stages = {"sft": "sft", "ppo": f"{attack}18"}
    metrics = rows_of(folder / "metrics.jsonl")
    for row in metrics:
        row |= {"ood_shift": f"{attack}17", "stage": stages[row["stage"]], f"{shift}_accuracy": 0.5}
    spectra = rows_of(folder / "spectra.jsonl")
    for row in spectra:
        row |= {"stage": stages[row["stage"]], "note": f"{attack}20", "null_random_rad": 0.1}
        if row["module"] == "q":
            row["module"] = f"{attack}19"
    for row in (*metrics, *spectra):
        if row["stage"] == "sft":
            row["segment"] = f"{attack}22"
        else:
            row |= {"segment": f"{attack}23", "parent_segment": f"{attack}22", "parent_step": 7}
    write_rows(folder / "metrics.jsonl", metrics)
    write_rows(folder / "spectra.jsonl", spectra)
    events = {name: {"metrics": metrics[-1]} for name in ("sft_peak", "ppo_end", f"{attack}21")}
    branch = f"{attack}23"
    tests = {
        f"{branch}_start_to_{branch}_end": {f"{attack}17": {"n": 5, "p_value": 0.5, "gained": 1, "lost": 0}}
    }
    gain = {
        "n": 5,
        "p_value": 0.5,
        "first_gain": 0.1,
        "second_gain": 0.2,
        "more_in_first": 1,
        "more_in_second": 2,
    }
    gains = {f"{branch}_and_{branch}": {f"{attack}17": gain}}
    (folder / "summary.json").write_text(json.dumps({"events": events, "tests": tests, "gains": gains}))
    return folder


def page_of(parent: Path, attack: str) -> Markup:
    parent.mkdir()
    return Markup(write_report(foreign_run(parent, attack)).read_text())


def test_no_text_of_a_foreign_folder_becomes_markup(tmp_path: Path) -> None:
    plain, hostile = page_of(tmp_path / "a", "word"), page_of(tmp_path / "b", ATTACK)
    assert hostile.elements == plain.elements
    text = "\n".join(hostile.texts)
    shown = {number: f"{ATTACK}{number}" for number in (*range(10, 21), 22, 23)}
    shown[10] = shown[10].replace("/", "-")  # a folder's name
    shown[18] = shown[18].upper()  # a stage's title
    assert [number for number, word in shown.items() if word not in text] == []
    assert f"{ATTACK}21" not in text  # no event of ours


def test_no_text_of_foreign_folders_becomes_markup_where_they_are_compared(tmp_path: Path) -> None:
    def compared(parent: Path, attack: str) -> Markup:
        parent.mkdir()
        own = make_run(parent / "own")
        return Markup(write_comparison([foreign_run(parent, attack), own]).read_text())

    plain, hostile = compared(tmp_path / "a", "word"), compared(tmp_path / "b", ATTACK)
    assert hostile.elements == plain.elements
    text = "\n".join(hostile.texts)
    numbers = (11, 12, 13, 15, 16, 17)
    assert [number for number in numbers if f"{ATTACK}{number}" not in text] == []
    assert ATTACK.replace("/", "-") + "10" in text  # a folder's name


def test_without_escaping_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin, and that the check sees it."""
    with monkeypatch.context() as patch:
        patch.setattr(pages.environment(), "autoescape", False)
        pages.environment().cache.clear()
        hostile = page_of(tmp_path / "b", ATTACK)
    pages.environment().cache.clear()
    assert hostile.elements != page_of(tmp_path / "a", "word").elements


def test_nothing_is_passed_to_the_page_as_markup() -> None:
    folder = Path(html.__file__).parent
    sources = [path.read_text() for suffix in ("py", "jinja") for path in folder.glob(f"*.{suffix}")]
    assert len(sources) > 5
    assert not [
        text for text in sources if "Markup" in text or "safe }" in text or "autoescape false" in text
    ]


def test_half_a_surrogate_pair_and_a_name_of_odd_bytes_are_written(tmp_path: Path) -> None:
    folder = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")))
    rows = rows_of(folder / "spectra.jsonl")
    write_rows(folder / "spectra.jsonl", [row | {"note": "\ud800"} for row in rows])
    assert "run-?" in write_report(folder).read_bytes().decode()


ODD = ["<i id=x>", [], {}, ["<i id=x>"], -1, 10**400, 1e300, float("nan"), 1e-320, None]


def variants(content: dict[Any, Any]) -> Iterator[Any]:
    """The content with one value, however deep, replaced by an odd one, or by nothing."""
    for key, value in content.items():
        others = list(variants(value)) if isinstance(value, dict) else []
        yield from (content | {key: other} for other in (*ODD, *others))
        yield {other: content[other] for other in content if other != key}


@pytest.mark.parametrize("name", ["metrics.jsonl", "spectra.jsonl", "summary.json", "config.yaml"])
def test_odd_values_anywhere_are_drawn_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = foreign_run(tmp_path, "word")
    path = folder / name
    before, last = "", path.read_text()
    if name != "spectra.jsonl":
        (folder / "spectra.jsonl").write_text("")  # quicker; that file has its own turn
    if name.endswith("jsonl"):
        *earlier, last = path.read_text().splitlines()
        before = "".join(line + "\n" for line in earlier[-2:])
    content = yaml.safe_load(last) if name == "config.yaml" else json.loads(last)
    if name == "summary.json":
        content["events"] = dict(list(content["events"].items())[:1])
    drawn = refused = 0
    for changed in (*ODD, *variants(content)):
        path.write_text(f"{before}{json.dumps(changed)}\n")
        try:
            page = write_report(folder).read_text()
        except RunFolderError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            drawn += 1
            assert "<i id=x>" not in page
            assert not re.search(r"<(rect|circle|poly|line|svg)[^>]*(nan|inf)", page)
    assert drawn > 20 and (refused > 20 or name == "config.yaml")


def test_the_command_refuses_a_text_where_a_number_belongs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = rows_of(folder / "metrics.jsonl")
    write_rows(folder / "metrics.jsonl", [*rows[:1], rows[1] | {"id_accuracy": "<b>"}, *rows[2:]])
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "metrics.jsonl, line 2: 'id_accuracy' is '<b>', wanted a number" in result.stderr
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\0a", b"a: [", b"a: " + b"[" * 5000, b"a: 2024-13-45"])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_files_that_are_something_else_are_refused_in_one_line(
    name: str, content: bytes, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content + b"\n")
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2
    assert result.stderr.startswith(f"Error: {folder / name}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["report.html", ".report.html.tmp"])
def test_a_link_in_the_folder_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.write_text("mine")
    folder = make_run(tmp_path / "run")
    (folder / name).symlink_to(other)
    write_report(folder)
    assert other.read_text() == "mine"
    assert "What fine-tuning did" in (folder / "report.html").read_text()
