"""The charts of a report as SVG files."""

from __future__ import annotations

import re
import sys
import xml.dom.minidom
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_toys import make_run
from skips import without_cairosvg
from test_report_series import rows, write, write_scores

from rlspec.cli.main import main
from rlspec.errors import MissingPackageError, OptionError, RunFolderError
from rlspec.report import chart, write_report
from rlspec.report.chart import Series, line_chart
from rlspec.report.figures import picture, write_figures
from rlspec.report.heatmap import colour
from rlspec.report.png import SCALE, plain


def test_every_chart_is_a_picture_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = CliRunner().invoke(main, ["report", str(run), "--figures", str(tmp_path / "figures")])
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "figures").iterdir())
    charts = ["accuracy", "kl-to-the-base", "rotation", "training-loss"]
    maps = ["rotation-by-layer", "singular-value-change-by-layer"]
    assert {file.stem for file in files} == {*charts, *maps}
    page = (run / "report.html").read_text()
    for file in files:
        if file.stem in maps:
            continue
        content = file.read_text()
        root = xml.dom.minidom.parseString(content).documentElement
        assert root is not None and root.tagName == "svg" and str(file) in result.output
        lines = re.findall(r'points="([^"]+)"', content)
        assert lines and all(line in page for line in lines)  # the lines are the page's


CELL = re.compile(
    r'<rect x="[^"]+" y="[^"]+" width="[^"]+" height="[^"]+" fill="#[^"]+"><title>[^<]+</title></rect>'
)


@pytest.mark.parametrize("layers", [4, 80])
def test_heat_maps_are_pictures_with_the_cells_of_the_page(layers: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=layers, steps=20)
    page = write_report(run).read_text()
    cells = []
    for path in write_figures([run], tmp_path / "figures"):
        if "by-layer" not in path.stem:
            continue
        content = path.read_text()
        root = xml.dom.minidom.parseString(content).documentElement
        assert root is not None and ">q: layer by event</text>" in content
        cells += CELL.findall(content)
        # The maps lie beside and below each other, in the picture and apart.
        _, _, width, height = map(float, root.getAttribute("viewBox").split())
        boxes = []
        for group in root.getElementsByTagName("g"):
            x, y = map(float, re.findall(r"[\d.]+", group.getAttribute("transform")))
            own = list(group.getElementsByTagName("rect"))
            places = [
                [float(part.getAttribute(name)) for name in ("x", "y", "width", "height")] for part in own
            ]
            boxes.append((x, y, x + max(p[0] + p[2] for p in places), y + max(p[1] + p[3] for p in places)))
        assert len(boxes) == 3
        assert all(0 <= left < right <= width and 50 < top < low < height for left, top, right, low in boxes)
        for one, other in combinations(boxes, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        stops = re.findall(r'<stop offset="([\d.]+)" stop-color="(#\w+)"', content)
        assert [code for _, code in stops] == [colour(float(at)) for at, _ in stops] and len(stops) > 5
    assert cells == CELL.findall(page) and len(cells) == 2 * 3 * layers * 22


def test_no_figure_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = write(tmp_path / "spectra", rows())
    names = ("text loss", "text-loss", "Text_loss", "text/loss")
    write_scores(folder, [{"checkpoint": "checkpoint-100", "score": name, "value": 1.0} for name in names])
    written = write_figures([folder], tmp_path / "figures")
    scores = sorted(path.name for path in written if path.stem.startswith("score"))
    assert scores == [
        "score-text-loss-2.svg",
        "score-text-loss-3.svg",
        "score-text-loss.svg",
        "score-text_loss.svg",
    ]
    assert len({*written}) == len(written) == len(list((tmp_path / "figures").iterdir()))


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


def test_png_needs_its_package_and_writes_nothing_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(MissingPackageError, match=r"needs cairosvg, .*: pip install 'rlspec\[png\]'"):
        write_figures([make_run(tmp_path / "run")], tmp_path / "figures", image_format="png")
    assert not (tmp_path / "figures").exists()
    with pytest.raises(OptionError, match="image_format='gif': valid are svg, png"):
        write_figures([tmp_path / "run"], tmp_path / "figures", image_format="gif")  # type: ignore[arg-type]
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--format", "png"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2
    assert "needs --figures" in result.stderr and not (tmp_path / "run" / "report.html").exists()


def test_the_style_of_a_picture_is_written_out_in_light_colours(tmp_path: Path) -> None:
    write_figures([make_run(tmp_path / "run")], tmp_path / "figures")
    for path in (tmp_path / "figures").iterdir():
        svg = path.read_text()
        found = plain(svg)
        assert "var(" in svg and "var(" not in found and "@media" in svg and "@media" not in found
        root = xml.dom.minidom.parseString(found).documentElement
        assert root is not None
        assert [root.getAttribute("width"), root.getAttribute("height")] == root.getAttribute(
            "viewBox"
        ).split()[2:]
        assert ".c0 { color: #0072b2; }" in found  # not the dark page's
        assert found.partition("</style>")[2] == svg.partition("</style>")[2]


@pytest.mark.skipif(without_cairosvg(), reason="no cairosvg, or no Cairo library")
def test_a_png_shows_the_lines_where_the_svg_has_them(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    written = write_figures([make_run(tmp_path / "run")], tmp_path / "figures", image_format="png")
    assert {path.suffix for path in written} == {".svg", ".png"} and len(written) == 12
    svg = (tmp_path / "figures" / "accuracy.svg").read_text()
    _, _, width, height = map(float, re.findall(r'viewBox="([^"]+)"', svg)[0].split())
    drawn = image.open(tmp_path / "figures" / "accuracy.png").convert("RGB")
    assert drawn.size == (SCALE * width, SCALE * height)
    assert drawn.getpixel((0, 0)) == (255, 255, 255)
    head = float(re.findall(r"translate\(0 ([\d.]+)\)", svg)[0])
    for name, rgb in (("c0", (0x00, 0x72, 0xB2)), ("c1", (0xD5, 0x5E, 0x00))):
        lines = re.findall(rf'<polyline class="line {name}[^"]*" points="([^"]+)"', svg)
        x, y = map(float, lines[0].split()[1].split(","))
        assert drawn.getpixel((round(SCALE * x), round(SCALE * (y + head)))) == rgb
    content = (tmp_path / "figures" / "rotation-by-layer.svg").read_text()
    sheet = image.open(tmp_path / "figures" / "rotation-by-layer.png").convert("RGB")
    group = content[content.index("<g ") : content.index("</g>")]
    left, top = map(float, re.findall(r"translate\(([\d.]+) ([\d.]+)\)", group)[0])
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]* fill="#(\w+)"', group)
    for x, y, code in (cells[0], cells[-1], cells[len(cells) // 2]):
        place = round(SCALE * (left + float(x) + 3)), round(SCALE * (top + float(y) + 3))
        assert sheet.getpixel(place) == tuple(bytes.fromhex(code))
