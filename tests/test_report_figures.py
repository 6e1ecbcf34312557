"""The charts of a report as SVG files."""

from __future__ import annotations

import re
import xml.dom.minidom
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_toys import make_run

from rlspec.cli.main import main
from rlspec.errors import RunFolderError
from rlspec.report import chart
from rlspec.report.chart import Series, line_chart
from rlspec.report.figures import picture, write_figures


def test_every_chart_is_a_picture_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = CliRunner().invoke(main, ["report", str(run), "--figures", str(tmp_path / "figures")])
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.stem for file in files] == ["accuracy", "kl-to-the-base", "rotation", "training-loss"]
    page = (run / "report.html").read_text()
    for file in files:
        content = file.read_text()
        root = xml.dom.minidom.parseString(content).documentElement
        assert root is not None and root.tagName == "svg" and str(file) in result.output
        lines = re.findall(r'points="([^"]+)"', content)
        assert lines and all(line in page for line in lines)  # the lines are the page's


def test_names_in_a_picture_are_texts() -> None:
    series = [Series("</text><script>x</script>", [(0, 1), (1, 2)], "c0")]
    drawn = line_chart(series, x_label="x", y_label="y", y_format=str, x_range=(0, 1))
    assert drawn is not None
    content = picture("<b>", drawn, [])
    assert "<script" not in content and xml.dom.minidom.parseString(content)


def test_a_long_legend_takes_more_lines_and_no_text_leaves_the_picture() -> None:
    series = [Series(f"a line with a long name, number {i}", [(0, 1), (1, i)], "c0") for i in range(9)]
    drawn = line_chart(series, x_label="x", y_label="y", y_format=str, x_range=(0, 1))
    assert drawn is not None
    content = picture("t", drawn, [])
    _, _, width, height = map(float, re.findall(r'viewBox="([^"]+)"', content)[0].split())
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">(a line[^<]+)', content)
    assert len(places) == 9 and len({y for _, y, _ in places}) > 1
    assert all(float(x) + 6.6 * len(text) <= width and float(y) < height for x, y, text in places)


@pytest.mark.parametrize("steps", [1, 300, 10_000, 100_000, 10_000_000])
def test_no_label_of_the_axis_leaves_the_picture(steps: int) -> None:
    series = [Series("a", [(0, 1), (steps, 2)], "c0")]
    drawn = line_chart(series, x_label="x", y_label="y", y_format=str, x_range=(0, steps))
    assert drawn is not None and drawn.x_ticks[-1].x == chart.WIDTH - chart.RIGHT
    letter = 7.5  # wider than a digit of the page's 12 units
    assert all(tick.x + letter * len(tick.text) / 2 <= chart.WIDTH for tick in drawn.x_ticks)


def test_a_goal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_figures([make_run(tmp_path / "run")], tmp_path / "file")
