"""Where the report draws: every dot, band and cell lies where the labels of its axes put the value of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_toys import make_run

from rlspec.report import write_report
from rlspec.report.chart import BOTTOM, TOP, Series, line_chart
from rlspec.report.data import RunData
from rlspec.report.heatmap import colour, heatmap
from rlspec.report.maps import maps

Drawing = ElementTree.Element


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", layers=5)
    write_report(folder)
    return folder


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def drawings(page: str) -> list[Drawing]:
    return [ElementTree.fromstring(part) for part in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def drawing(page: str, label: str) -> Drawing:
    (found,) = [part for part in drawings(page) if part.get("aria-label") == label]
    return found


def scale(drawing: Drawing, axis: str) -> Callable[[float], float]:
    """Position -> value, as a reader has it from the first and the last label of the axis."""
    labels = [text for text in drawing.iter("text") if text.get("class") == axis]
    # A label of the y axis stands 4 units below its line, to be centred on it.
    places = [float(text.get(axis, "nan")) - (4 if axis == "y" else 0) for text in labels]
    values = [float(re.sub(r"[^0-9.e-]", "", text.text or "")) for text in labels]
    values = [value / 100 if "%" in (labels[0].text or "") else value for value in values]
    assert len({*places}) > 1, "these are not the labels of an axis"
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    return lambda place: values[0] + slope * (place - places[0])


def points(drawing: Drawing, text: str) -> list[tuple[float, float]]:
    x, y = scale(drawing, "x"), scale(drawing, "y")
    numbers = [float(number) for number in re.findall(r"[-\d.]+", text)]
    return [(x(a), y(b)) for a, b in zip(numbers[::2], numbers[1::2])]


def near(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> bool:
    """Within the tenth of a unit that the page is written in; the largest values are some 400 and 1."""
    return len(found) == len(wanted) and all(
        abs(a - x) < 0.2 and abs(b - y) < 1e-3 for (a, b), (x, y) in zip(found, wanted)
    )


def accuracies_lie_right(page: str, run: Path) -> bool:
    """A line and a band for each accuracy and each segment, in this order."""
    chart = drawing(page, "Accuracy")
    segments: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(run, "metrics"):
        segments.setdefault(row.get("segment", row["stage"]), []).append(row)
    wanted = [(prefix, rows) for prefix in ("id", "ood") for rows in segments.values()]
    lines, bands = list(chart.iter("polyline")), list(chart.iter("polygon"))
    dots = [f"{dot.get('cx')},{dot.get('cy')}" for dot in chart.iter("circle")]
    right = [" ".join(dots) == " ".join((line.get("points") or "").strip() for line in lines)]
    for line, band, (prefix, rows) in zip(lines, bands, wanted, strict=True):
        at = [row["global_step"] for row in rows]
        around = [*zip(at, (row[f"{prefix}_high"] for row in rows))]
        around += [*zip(at, (row[f"{prefix}_low"] for row in rows))][::-1]
        right.append(
            near(
                points(chart, line.get("points") or ""),
                [*zip(at, (row[f"{prefix}_accuracy"] for row in rows))],
            )
        )
        right.append(near(points(chart, band.get("points") or ""), around))
    return all(right)


def test_accuracies_lie_where_the_axes_say(run: Path) -> None:
    assert accuracies_lie_right((run / "report.html").read_text(), run)


def swapped(page: str) -> str:
    """Every point of a line or band with its coordinates exchanged, and every dot."""
    page = re.sub(r'cx="([\d.]+)" cy="([\d.]+)"', r'cx="\2" cy="\1"', page)
    return re.sub(r"([\d.]+),([\d.]+) ", r"\2,\1 ", page)


@pytest.mark.parametrize(
    "mutate",
    [
        swapped,
        lambda page: re.sub(r'cy="[\d.]+"', 'cy="20.0"', page),
        lambda page: re.sub(r"(\d+),(\d)", r"\g<1>0,\2", page),
    ],
    ids=["swapped axes", "flat dots", "stretched"],
)
def test_a_chart_drawn_wrong_is_noticed(mutate: Callable[[str], str], run: Path) -> None:
    page = (run / "report.html").read_text()
    assert mutate(page) != page
    assert not accuracies_lie_right(mutate(page), run)


def test_the_boundary_stands_where_the_second_stage_begins(run: Path) -> None:
    chart = drawing((run / "report.html").read_text(), "Accuracy")
    (line,) = [part for part in chart.iter("line") if part.get("class") == "boundary"]
    first = next(row["global_step"] for row in rows_of(run, "metrics") if row["stage"] == "ppo")
    assert line.get("x1") == line.get("x2")
    assert scale(chart, "x")(float(line.get("x1", "nan"))) == pytest.approx(first, abs=0.2)


def cells_lie_right(
    page: str, run: Path, title: str = "Rotation (mean angle, rad), q: layer by event"
) -> bool:
    """Rows go by layer downwards, columns by event to the right, colours by value."""
    rows = rows_of(run, "spectra")
    angles = {
        (row["module"], row["layer"], row["stage"], row["step"]): row["angle_right_mean_rad"] for row in rows
    }
    events = list(dict.fromkeys((row["stage"], row["step"]) for row in rows))
    chart = next(part for part in drawings(page) if part.get("aria-label") == title)
    cells = {
        (float(cell.get("x", "nan")), float(cell.get("y", "nan"))): cell.get("fill")
        for cell in chart.iter("rect")
    }
    across, down = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    layers = [text for text in chart.iter("text") if text.get("class") == "layer"]
    if (len(across), len(down)) != (len(events), len(layers)):
        return False
    top = max(angles.values())
    right = []
    for y, label in zip(down, layers):
        right.append(y < float(label.get("y", "nan")) <= y + 20)
        for x, event in zip(across, events):
            right.append(cells[x, y] == colour(angles[("q", int(label.text or ""), *event)] / top))
    ends = [text.text for text in chart.iter("text") if text.get("class") == "column"]
    return all(right) and ends == [f"{stage} {step}" for stage, step in (events[0], events[-1])]


def test_cells_lie_by_layer_and_event(run: Path) -> None:
    assert cells_lie_right((run / "report.html").read_text(), run)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda page: re.sub(r'<rect x="([\d.]+)" y="([\d.]+)"', r'<rect x="\2" y="\1"', page),
        lambda page: re.sub(r'<rect x="([\d.]+)"', lambda m: f'<rect x="{900 - float(m[1]):.1f}"', page),
        lambda page: re.sub(
            r'(<rect [^>]*) y="([\d.]+)"', lambda m: f'{m[1]} y="{140 - float(m[2]):.1f}"', page
        ),
    ],
    ids=["swapped axes", "right to left", "upside down"],
)
def test_a_map_drawn_wrong_is_noticed(mutate: Callable[[str], str], run: Path) -> None:
    page = mutate((run / "report.html").read_text())
    assert page != (run / "report.html").read_text()
    assert not cells_lie_right(page, run)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 60])
@pytest.mark.parametrize("name", ["sft", "ppo-from-300", "a/very/long/path/of/a/training/checkpoint"])
def test_the_labels_below_a_map_do_not_touch(name: str, count: int) -> None:
    columns = [f"{name} {100 * i}" for i in range(count)]
    cells = {(0, i): 1.0 for i in range(count)}
    drawn = heatmap(cells, layers=[0], columns=columns, top=1.0, value_format=str, title="t")
    assert len(drawn.ends) == min(count, 2)
    for end, column in zip(drawn.ends, (columns[0], columns[-1])):
        assert end.text == column or (end.text[0] == "…" and column.endswith(end.text[1:]))
    letter = 6.5  # of the page's 12 units, on average
    first, last = drawn.ends[0], drawn.ends[-1]
    if count > 1:
        assert first.x + letter * len(first.text) < last.x - letter * len(last.text)
    assert first.x + letter * len(first.text) <= drawn.width and last.x <= drawn.width


def test_a_cell_of_several_matrices_is_their_mean(tmp_path: Path) -> None:
    def row(name: str, angle: float) -> dict[str, Any]:
        angles = {"angle_left_mean_rad": angle, "angle_right_mean_rad": angle}
        return {
            "segment": "sft",
            "stage": "sft",
            "step": 0,
            "name": name,
            "module": "q",
            "layer": 0,
            **angles,
        }

    rows = [row("q[head 0]", 0.1), row("q[head 1]", 0.4)]
    (title, bar, (drawn,)), *_ = maps(RunData(tmp_path, {}, [], rows, {}, []))
    assert title.startswith("Rotation") and bar.high == "0.25 rad"
    (cell,) = drawn.cells
    assert cell.text.endswith("0.25 rad")


def test_an_interval_above_one_place_of_the_axis_is_a_bar() -> None:
    """A restoration takes no steps: of its two intervals the later is drawn, a few units wide."""
    band = [(300.0, 0.1, 0.2), (300.0, 0.5, 0.7)]
    series = Series("OOD", [(0.0, 0.1), (300.0, 0.6)], "c1", band)
    drawn = line_chart([series], x_label="", y_label="", y_format=str, x_range=(0, 600), y_max=1.0)
    assert drawn is not None
    (line,) = drawn.lines
    middle = line.dots[-1]
    height = drawn.height - TOP - BOTTOM
    wanted = [(middle.x + to, TOP + (1 - y) * height) for to, y in ((-5, 0.7), (-5, 0.5), (5, 0.5), (5, 0.7))]
    assert [number for p in line.outline for number in (p.x, p.y)] == pytest.approx(sum(wanted, ()))
