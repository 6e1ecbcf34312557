"""What can be seen on a page: colours and dashes that are told apart, labels that neither touch nor leave the picture,
and what a screen reader is told."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from colours import contrast, least_distance
from report_toys import make_run, make_tree
from test_report_geometry import drawings
from test_report_series import rows, write
from test_report_verdict import TREE

from rlspec.report import write_comparison, write_report
from rlspec.report.chart import (
    COLOURS,
    DASHES,
    LEFT,
    TOP,
    WIDTH,
    Boundary,
    Chart,
    Series,
    line_chart,
    on_one_axis,
)
from rlspec.report.curves import branch_legend
from rlspec.report.data import read_run
from rlspec.report.pages import environment

STYLE = environment().get_template("page.css").render()
#: The palette that this one took the place of: its light blue was too pale, its olive and its gold the same to many.
BEFORE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6b6b6b", "#882255", "#7a8b1f")
LETTER = 7.7  # of the widest common font of 12 units, a digit; a letter is less on average


def theme(dark: bool) -> dict[str, str]:
    """Name -> colour of one of the two."""
    return dict(re.findall(r"--(\w+): (#\w{6})", STYLE.split("@media")[1 if dark else 0]))


def stand_out(colours: list[str], paper: str) -> bool:
    return all(contrast(colour, paper) >= 3 for colour in colours)


def differ(colours: list[str]) -> bool:
    return all(least_distance(*pair) >= 0.08 for pair in combinations(colours, 2))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_stand_out_and_differ_for_the_colour_blind_too(dark: bool) -> None:
    found = theme(dark)
    lines = [found[name] for name in COLOURS]
    assert stand_out(lines, found["paper"]) and differ(lines)
    assert all(contrast(found[ink], found[on]) >= 4.5 for ink in ("ink", "dim") for on in ("paper", "soft"))


def test_the_palette_before_would_not_pass() -> None:
    """The broken twin; and the scales are those that they are called."""
    assert not stand_out([*BEFORE], "#ffffff") and not differ([*BEFORE])
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#777777") == 1
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the usual example of WCAG
    assert least_distance("#000000", "#ffffff") == pytest.approx(1, abs=1e-6)
    assert least_distance("#b8860b", "#7a8b1f") < 0.03  # red and green, to a deuteranope


def test_no_two_branches_have_a_dash_that_could_be_the_others(tmp_path: Path) -> None:
    patterns = {
        name: tuple(map(float, found.split()))
        for name, found in re.findall(r"\.(d\d) \{ stroke-dasharray: ([\d ]+);", STYLE)
    }
    assert tuple(patterns) == DASHES
    for (_, one), (_, other) in combinations(patterns.items(), 2):
        # Another number of strokes, or strokes of twice the length, or gaps of twice the share.
        share = [sum(p[1::2]) / sum(p) for p in (one, other)]
        assert (
            len(one) != len(other)
            or max(one[0], other[0]) >= 2 * min(one[0], other[0])
            or max(share) >= 2 * min(share)
        ), (one, other)
    starts = (0, 50, 100, 200, 300)
    ood = {("sft", 0): 20, ("sft", 300): 10} | {(f"ppo-from-{i}", at): 10 for i in starts for at in (0, 20)}
    run = read_run(make_tree(tmp_path / "run", ood, ppo_from=starts, sft_steps=300, finished=False))
    dashes = [dash for dash, _ in branch_legend(run)]
    assert dashes == ["d0", *DASHES[: len(starts)]]
    page = write_report(run.folder).read_text()
    assert all(
        f'<line class="line {dash}"' in page and f'<polyline class="line c0 {dash}"' in page
        for dash in dashes
    )


def drawn(boundaries: list[Boundary], top: float = 1.0, zoomed: bool = False) -> Chart:
    found = line_chart(
        [Series("a", [(0, 0.99999 * top), (600, top)], "c0")], x_label="x", y_label="y", y_format=lambda v: f"{v:.3g}",
        x_range=(0, 600), boundaries=boundaries, zoomed=zoomed,
    )  # fmt: skip
    assert found is not None
    return found


@pytest.mark.parametrize("places", [(0, 10, 20, 30), (100, 300), (570, 580, 600), (600, 0, 590)])
def test_texts_of_branches_neither_touch_nor_leave_the_picture(places: tuple[int, ...]) -> None:
    chart = drawn([Boundary(x, f"PPO from step {x}, restoration") for x in places])
    assert {boundary.text for boundary in chart.boundaries} == {
        f"PPO from step {x}, restoration" for x in places
    }
    boxes = []
    for boundary in chart.boundaries:
        half = 6.5 * len(boundary.text) / 2
        boxes.append((boundary.text_x - half, boundary.text_x + half, boundary.text_y))
        assert boxes[-1][0] >= 0 and boxes[-1][1] <= WIDTH and 0 < boundary.text_y < chart.top
    for (left, right, y), (other_left, other_right, other_y) in combinations(boxes, 2):
        assert right < other_left or other_right < left or abs(y - other_y) >= 12
    # The plot is as high as it was, below the texts.
    assert chart.height - chart.top == drawn([]).height - TOP and drawn([]).top == TOP
    assert min(dot.y for line in chart.lines for dot in line.dots) >= chart.top


@pytest.mark.parametrize("top", [1.0, 1e-5, 1.2345e-7, 123456.0, 1e20])
@pytest.mark.parametrize("zoomed", [False, True])
def test_no_label_of_the_upright_axis_is_cut_off_and_no_two_are_the_same(top: float, zoomed: bool) -> None:
    chart = drawn([], top, zoomed)
    texts = [tick.text for tick in chart.y_ticks]
    assert len({*texts}) == len(texts) > 1
    # Right of the axis's name, which is upright at 13 units, and left of the axis by 7.
    assert chart.left - 7 - LETTER * max(map(len, texts)) >= 13 + 6
    assert all(tick.x == chart.left for tick in chart.y_ticks)
    assert not all(LEFT - 7 - LETTER * len(f"{top:.10g}") >= 0 for top in (1.2345e-7,))  # the margin that was


def test_charts_of_a_page_have_one_left_edge(tmp_path: Path) -> None:
    wide = Series("a", [(0, 1.234e-7), (1, 1.2341e-7)], "c0")
    narrow = Series("a", [(0, 1.0), (1, 2.0)], "c0")

    def draw(series: Series, left: float = LEFT) -> Chart | None:
        return line_chart(
            [series], x_label="", y_label="", y_format=lambda v: f"{v:.3g}", x_range=(0, 1), zoomed=True, left=left
        )  # fmt: skip

    alone = draw(narrow)
    both = on_one_axis(
        [lambda **more: draw(wide, **more), lambda **more: draw(narrow, **more), lambda **_: None]
    )
    assert alone is not None and both[0] is not None and both[1] is not None and both[2] is None
    assert both[0].left == both[1].left > alone.left
    assert both[1].lines[0].dots[0].x == both[0].lines[0].dots[0].x
    page = write_report(make_run(tmp_path / "run")).read_text()
    grids = re.findall(r'<line class="grid" x1="([\d.]+)"', page)
    assert len({*grids}) == 1 < len(grids)


def test_many_dots_do_not_hide_their_line() -> None:
    radii = []
    for count in (20, 100):
        chart = line_chart(
            [Series("a", [(i, i) for i in range(count)], "c0")], x_label="", y_label="", y_format=str, x_range=(0, count)
        )  # fmt: skip
        assert chart is not None
        radii.append(chart.lines[0].radius)
        assert 2 * radii[-1] < (WIDTH - LEFT) / count
    assert radii[0] > radii[1]


def test_a_screen_reader_is_told_what_every_drawing_and_table_is(tmp_path: Path) -> None:
    run = make_tree(tmp_path / "run", TREE)
    series = write(tmp_path / "series", rows())
    for page in (write_report(run), write_report(series), write_comparison([run, series])):
        text = page.read_text()
        assert text.count("<main>") == text.count("</main>") == text.count("<h1>") == 1
        shown = [part for part in drawings(text) if part.get("aria-hidden") != "true"]
        labels = [part.get("aria-label") for part in shown]
        assert all(part.get("role") == "img" for part in shown) and all(labels)
        assert len({*labels}) == len(labels)
        tables = re.findall(r"<table>.*?</table>", text, flags=re.DOTALL)
        captions = [re.findall(r"<caption>(.+?)</caption>", table) for table in tables]
        assert all(len(found) == 1 for found in captions) and len({*map(str, captions)}) == len(tables) > 0
        for table in tables:
            head, body = table.split("<tbody>")
            assert head.count("<th ") == head.count('<th scope="col">') > 0
            assert body.count("<tr>") == body.count('<th scope="row">')
