"""Several runs on one page: their figures are the rows', their curves share an axis, and no file is lost to it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from report_toys import make_tree
from test_report_geometry import drawing, points
from test_report_series import rows, write, write_scores
from test_report_verdict import EARLY, TREE

from rlspec.cli.main import main
from rlspec.errors import OptionError, RunFolderError
from rlspec.report import write_comparison, write_report
from rlspec.report.comparison import MOST, compared_figures, differences, named
from rlspec.report.data import read_run
from rlspec.report.series import read_series

ANGLES = {("sft", 300): 0.3, (EARLY, 20): 0.25}


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run of PPO, and one of another seed, by GRPO from one step."""
    one = {event: count for event, count in TREE.items() if event[0] == "sft"}
    one |= {("ppo", 0): 10, ("ppo", 4): 40}
    settings = {"seed": 7, "ppo_from": (300,), "ppo_updates": 4, "further": {"advantages": "grpo"}}
    return [
        make_tree(tmp_path / "first", TREE, angles=ANGLES),
        make_tree(tmp_path / "second", one, angles={("sft", 300): 0.2}, finished=False, **settings),
    ]


def test_figures_stand_side_by_side(runs: list[Path]) -> None:
    head, found = compared_figures(named(["a", "b"], [read_run(run) for run in runs]))
    assert head[:2] == ["run", "segment"]
    chosen = ["OOD peak", "OOD at the end", "OOD gained, points", "rotation, rad", "KL, nats"]
    assert [row[:2] + [row[head.index(name)] for name in chosen] for row in found] == [
        ["a", "SFT", "55.0 % (step 50)", "10.0 %", "-10.0", "0.3000", "0.100"],
        ["a", "PPO from step 100", "56.0 % (step 20)", "56.0 %", "+51.0", "0.2500", "0.100"],
        ["a", "PPO from step 300", "24.0 % (step 20)", "24.0 %", "+14.0", "0.0000", "0.100"],
        ["b", "SFT", "55.0 % (step 50)", "10.0 %", "-10.0", "0.2000", "0.100"],
        ["b", "GRPO", "40.0 % (step 4)", "40.0 %", "+30.0", "0.0000", "0.100"],
    ]


def test_settings_that_differ_are_told_and_no_others(runs: list[Path]) -> None:
    found = {row[0]: row[1:] for row in differences(named(["a", "b"], [read_run(run) for run in runs]))}
    assert found["trained by"] == ["SFT and PPO", "SFT and GRPO"]
    assert found["seed"] == ["0", "7"] and found["ppo_from"] == ["100, 300", "300"]
    assert "model" not in found and "deals" not in found


def test_curves_of_all_runs_lie_on_one_axis(runs: list[Path]) -> None:
    """A line for each segment of each run, each run in its colour, where the labels of the axes put its values."""
    chart = drawing(write_comparison(runs).read_text(), "Rotation")
    lines = [(line.get("class"), points(chart, line.get("points") or "")) for line in chart.iter("polyline")]
    assert [name for name, _ in lines] == [
        "line c0 d0",
        "line c0 d1",
        "line c0 d2",
        "line c1 d0",
        "line c1 d1",
    ]
    ends = [line[-1] for _, line in lines]
    assert ends[0][0] == pytest.approx(300, abs=0.5) and ends[0][1] == pytest.approx(0.3, abs=2e-3)
    assert ends[3][0] == pytest.approx(300, abs=0.5) and ends[3][1] == pytest.approx(0.2, abs=2e-3)
    assert ends[4][0] == pytest.approx(300 + 4 * 16, abs=0.5)


def test_intervals_of_many_runs_do_not_hide_the_lines(runs: list[Path], tmp_path: Path) -> None:
    more = [make_tree(tmp_path / f"more{i}", TREE) for i in range(2)]
    for folders, banded in (([*runs, more[0]], True), ([*runs, *more], False)):
        chart = drawing(write_comparison(folders).read_text(), "ID accuracy")
        assert bool(list(chart.iter("polygon"))) == banded and len(list(chart.iter("polyline"))) > 4


def test_the_page_is_written_beside_the_reports(runs: list[Path], tmp_path: Path) -> None:
    before = write_report(runs[0]).read_bytes()
    result = report(*runs, "--figures", tmp_path / "figures")
    target = runs[0] / "comparison.html"
    assert result.exit_code == 0 and result.output.splitlines()[0] == str(target)
    assert (runs[0] / "report.html").read_bytes() == before and not (runs[1] / "comparison.html").exists()
    page = target.read_text()
    assert "</svg>first</span>" in page and "</svg>second</span>" in page and "not finished: second" in page
    files = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    assert "ood-accuracy-both" in files and "rotation" in files
    assert report(*runs).exit_code == 0  # an earlier comparison is replaced
    assert report(*runs, "--out", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text() == page


@pytest.mark.parametrize("count", [1, 2])
def test_no_file_of_another_kind_is_replaced(count: int, runs: list[Path], tmp_path: Path) -> None:
    write_report(runs[0])
    write_comparison(runs)
    other = runs[0] / ("comparison.html" if count == 1 else "report.html")
    for place in (other, runs[0] / "metrics.jsonl"):
        before = place.read_bytes()
        result = report(*runs[:count], "--out", place)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and place.read_bytes() == before
        assert f"{place}: what is there is no" in result.stderr and "another place for --out" in result.stderr
    for place in (tmp_path, tmp_path / "none" / "page.html"):
        result = report(*runs[:count], "--out", place)
        assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_a_report_goes_where_it_is_asked_to(runs: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        assert report(runs[0], "--out", tmp_path / "page.html").exit_code == 0
    assert not (runs[0] / "report.html").exists()
    assert (tmp_path / "page.html").read_bytes() == write_report(runs[0]).read_bytes()


def test_spectra_alone_are_compared_too_and_with_a_run(runs: list[Path], tmp_path: Path) -> None:
    spectra = [write(tmp_path / "x", rows(3)), write(tmp_path / "y", rows(2))]
    head, found = compared_figures(named(["x", "y"], [read_series(folder) for folder in spectra]))
    assert head == ["run", "rotation, rad", "σ change", "‖ΔW‖/‖W‖"]
    assert [row[head.index("rotation, rad")] for row in found] == ["0.0600", "0.0400"]
    page = write_comparison(spectra).read_text()
    assert "accuracy" not in page and ">Rotation</figcaption>" in page
    assert "</svg>x</span>" in write_comparison([runs[0], spectra[0]]).read_text()


def test_scores_are_drawn_and_listed_beside_each_other(tmp_path: Path) -> None:
    folders = []
    for name, loss in (("x", 2.0), ("y", 2.5)):
        folders.append(write(tmp_path / name, rows(3)))
        scores = [
            {"checkpoint": f"checkpoint-{100 * i}", "step": 100 * i, "score": "text_loss", "value": value}
            for i, value in ((1, loss + 0.25), (2, loss - 0.25), (3, loss))
        ]
        write_scores(folders[-1], scores)
    only_one = {"checkpoint": "checkpoint-100", "step": 100, "score": "solved", "value": 0.75}
    with (folders[1] / "scores.jsonl").open("a") as file:
        file.write(json.dumps(only_one) + "\n")
    head, found = compared_figures(named(["x", "y"], [read_series(folder) for folder in folders]))
    assert head[-4:] == ["‖ΔW‖/‖W‖", "text_loss at the end", "text_loss, range", "solved, range"]
    assert [row[-3:] for row in found] == [
        ["2", "1.75 to 2.25", "–"], ["2.5", "2.25 to 2.75", "0.75 to 0.75"]
    ]  # fmt: skip
    page = write_comparison(folders).read_text()
    chart = drawing(page, "Score text_loss")
    lines = [points(chart, line.get("points") or "") for line in chart.iter("polyline")]
    assert [[round(y, 2) for _, y in line] for line in lines] == [[2.25, 1.75, 2.0], [2.75, 2.25, 2.5]]
    assert [line.get("class") for line in drawing(page, "Score solved").iter("polyline")] == ["line c1 d0"]


def test_accuracies_of_other_tasks_are_not_taken_for_the_same(runs: list[Path]) -> None:
    assert "not the same task" not in write_comparison(runs).read_text()
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"ood_shift": "both"', '"ood_shift": "target"'))
    assert (
        "OOD is not the same task in all of these runs (both, target)" in write_comparison(runs).read_text()
    )


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = runs[1].rename(tmp_path / "other" / "first")
    page = write_comparison([runs[0], twin]).read_text()
    assert f"</svg>{tmp_path.name}/first</span>" in page and "</svg>other/first</span>" in page


def test_each_run_has_a_colour_of_its_own(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"run{i}", rows(2)) for i in range(MOST + 1)]
    page = write_comparison(folders[:MOST]).read_text()
    style = page[: page.index("</style>")]
    for theme in style.split("@media")[:2]:
        assert len(set(re.findall(r"--c\d: (#\w+)", theme))) == MOST
    for i in range(MOST):
        assert f'<polyline class="line c{i} d0"' in page and f".c{i} {{ color: var(--c{i}); }}" in style
    with pytest.raises(OptionError, match=f"{MOST + 1} folders to compare, wanted 2 to {MOST}"):
        write_comparison(folders)


def test_what_cannot_be_compared_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    twice = report(runs[0], runs[1], runs[0] / ".." / "first")
    assert twice.exit_code == 2 and "given twice" in twice.stderr and twice.stderr.count("\n") == 1
    nothing = report(runs[0], tmp_path)
    assert nothing.exit_code == 2 and "holds no run" in nothing.stderr
    assert not (runs[0] / "comparison.html").exists()
    with pytest.raises(RunFolderError, match="no such run folder"):
        write_comparison([runs[0], tmp_path / "none"])
