"""The report: its numbers are the data's, it needs no network, and broken folders get one clear error."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_toys import MODEL, make_run

from rlspec.errors import RunFolderError
from rlspec.report import write_report
from rlspec.report.chart import Series, line_chart, ticks
from rlspec.report.data import read_run
from rlspec.report.heatmap import colour
from rlspec.run.config import TrackConfig
from rlspec.run.folder import RunFolder
from rlspec.tasks.stats import spearman


def test_page_holds_the_figures_and_loads_nothing(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text()
    assert "51.2 %" in page  # the OOD peak
    assert "left angles skipped" in page
    assert MODEL not in page
    assert "a &lt;b&gt;&amp;model" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert not list(tmp_path.glob("run/*.tmp"))


def test_null_rotations_and_blocks_stand_beside_the_measured_ones(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "more than chance" not in write_report(folder).read_text()
    rows = [json.loads(line) for line in (folder / "spectra.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["stage"], row["step"]) == ("sft", 100):
            beyond = 100.0 if row["layer"] < 3 else 50.0
            row |= {"null_random_rad": 0.0123, "null_rounding_rad": 0.0011, "null_random_percentile": beyond}
            row |= {"rank": 40, "block_vectors": 10 * row["layer"]}
    (folder / "spectra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(folder).read_text()
    assert "more than chance" in page and "0.0123" in page
    assert "3 of 4" in page
    assert "38 %" in page  # 60 of 160 vectors


def test_every_drawing_is_well_formed(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) >= 8
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing.lower()


@pytest.mark.parametrize("steps", [1, 2])
def test_unfinished_runs_are_reported(tmp_path: Path, steps: int) -> None:
    folder = make_run(tmp_path / "run", steps=steps)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "sft", "st')
    assert "the run is not finished" in write_report(folder).read_text()


def test_large_models_keep_the_page_small(tmp_path: Path) -> None:
    assert write_report(make_run(tmp_path / "run", steps=100, layers=80)).stat().st_size < 3_500_000


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such run folder"):
        read_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        read_run(tmp_path / "empty")
    folder = make_run(tmp_path / "run")
    text = (folder / "spectra.jsonl").read_text().splitlines(keepends=True)
    (folder / "spectra.jsonl").write_text(text[0] + "{oops\n" + "".join(text[1:]))
    with pytest.raises(RunFolderError, match=r"spectra\.jsonl, line 2"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="nothing to report"):
        read_run(folder)
    RunFolder.create(tmp_path / "begun", TrackConfig().to_settings()).close()
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: no complete event yet; nothing to report"):
        read_run(tmp_path / "begun")


def test_spearman_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    for _ in range(30):
        x = [rng.randint(0, 5) for _ in range(12)]
        y = [rng.randint(0, 5) for _ in range(12)]
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0, 437) == pytest.approx([0, 100, 200, 300, 400])
    assert ticks(3, 3) == [3]
    assert ticks(0, 5e-324) == [0]


def test_colours_get_brighter() -> None:
    def light(share: float) -> float:
        code = colour(share)
        r, g, b = (int(code[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    values = [light(i / 20) for i in range(21)]
    assert values == sorted(values)


def test_chart_of_nothing_says_so(tmp_path: Path) -> None:
    assert line_chart([Series("a", [], "c0")], x_label="x", y_label="y", y_format=str, x_range=(0, 1)) is None
    folder = make_run(tmp_path / "run")
    assert "Nothing was measured" not in write_report(folder).read_text()
    (folder / "spectra.jsonl").write_text("")
    assert write_report(folder).read_text().count("Nothing was measured") == 1
