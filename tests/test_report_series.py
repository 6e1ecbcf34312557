"""The report of spectra without a run: what `rlspec measure` and the callback leave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlspec.cli.main import main
from rlspec.errors import RunFolderError
from rlspec.report.curves import spectral_curves
from rlspec.report.html import write_report
from rlspec.report.series import checkpoints, correlations_with_scores, read_series, sentence
from rlspec.report.tables import nulls
from rlspec.tasks.stats import spearman, spearman_fisher_interval


def rows(count: int = 3, layers: int = 2, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "checkpoint": f"checkpoint-{100 * i}", "stage": "", "step": 100 * i, "module": module, "layer": layer,
            "name": f"model.layers.{layer}.self_attn.{module}_proj.weight", "angle_left_mean_rad": 0.01 * i,
            "angle_right_mean_rad": 0.03 * i, "angle_left_max_rad": 0.1 * i + 0.01 * layer,
            "angle_right_max_rad": 0.05 * i, "angle_error_bound_rad": 1e-5, "sigma_change_rel_mean": 0.002 * i,
            "delta_relative": 0.04 * i, "note": None, **more,
        }
        for i in range(1, count + 1) for layer in range(layers) for module in "qv"
    ]  # fmt: skip


def write(folder: Path, content: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "spectra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def test_the_page_tells_what_the_rows_hold(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(write(tmp_path / "spectra", rows()))])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "spectra" / "report.html").read_text()
    assert "At checkpoint-300 the leading directions of 4 matrices have turned by 0.06 rad on average" in page
    assert "checkpoint-100" in page and "0.3100 ± 1e-05" in page and page.count("<script") == 1


def test_figures_are_means_and_the_largest_angle_is_named(tmp_path: Path) -> None:
    run = read_series(write(tmp_path / "spectra", rows()))
    assert [row[0] for row in checkpoints(run)] == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
    assert checkpoints(run)[1] == [
        "checkpoint-200", "4", "0.0400", "0.2100 ± 1e-05", "model.layers.1.self_attn.q_proj.weight", "0.40 %", "0.0800",
    ]  # fmt: skip


def test_rows_that_were_measured_anew_count_once(tmp_path: Path) -> None:
    """A kill leaves the ones before beside them."""
    whole = read_series(write(tmp_path / "whole", rows()))
    old = [row | {"delta_relative": 9.0, "locking_end": "checkpoint-200"} for row in rows()[:6]]
    twice = read_series(write(tmp_path / "twice", [*old, *rows()]))
    assert checkpoints(twice) == checkpoints(whole) and len(twice.spectra) == len(rows())


def test_where_no_angle_was_measured_none_is_told(tmp_path: Path) -> None:
    measured = {name for name in rows(1)[0] if name.endswith("_rad") or name.startswith(("sigma", "delta"))}
    folder = write(tmp_path / "spectra", [row | dict.fromkeys(measured) for row in rows(1)])
    assert checkpoints(read_series(folder)) == [["checkpoint-100", "4", "–", "–", "–", "–", "–"]]
    page = write_report(folder).read_text()
    assert "no angle was measured" in page and "Over the training" not in page and "; 1 checkpoint<" in page


def test_random_updates_stand_beside_the_rotation(tmp_path: Path) -> None:
    chance = {"null_random_rad": 0.05, "null_random_percentile": 100.0, "null_rounding_rad": 1e-4}
    told = sentence(read_series(write(tmp_path / "spectra", rows(**chance))))
    assert "Random updates of the same size turn them by 0.05 rad" in told and "in 4 of 4 matrices" in told


def test_subspace_locking_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    """By the mean of both sides, or of the one that has it."""
    content = rows()
    for row in content:
        row |= {"locking_left": 1.0 if row["step"] == 300 else 0.8, "locking_right": None}
        row |= {"locking_right": row["locking_left"] - 0.1} if row["module"] == "q" else {}
    drawn = dict(spectral_curves(read_series(write(tmp_path / "locked", content))))
    title = "Leading subspaces that are not yet the last checkpoint's"
    found = drawn[title]
    assert found is not None and [line.label for line in found.lines] == ["q", "v"]
    shares = {"q": ("25 %", "25 %", "5 %"), "v": ("20 %", "20 %", "0 %")}
    assert [dot.text for line in found.lines for dot in line.dots] == [
        f"{module}, step {100 * (i + 1)}: {share}"
        for module, row in shares.items()
        for i, share in enumerate(row)
    ]
    assert dict(spectral_curves(read_series(write(tmp_path / "plain", rows()))))[title] is None


def test_checkpoints_without_a_step_stand_in_the_order_of_the_table(tmp_path: Path) -> None:
    content = [row | {"step": None} for row in rows()]
    run = read_series(write(tmp_path / "spectra", content))
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    assert [row[0] for row in checkpoints(run)] == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]


def test_checkpoints_without_a_step_are_told_by_name(tmp_path: Path) -> None:
    """The first of them too, whose place is that of a run's base, and in every text and table."""
    drawn = {"null_random_rad": 0.1, "null_rounding_rad": 0.01, "null_random_percentile": 100.0}
    run = read_series(write(tmp_path / "spectra", [row | {"step": None} | drawn for row in rows()]))
    names = ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
    chart = dict(spectral_curves(run))["Rotation"]
    assert chart is not None and chart.x_label == "place in the series"
    texts = [dot.text for line in chart.lines for dot in line.dots]
    assert [text.partition(":")[0] for text in texts] == [f"{m}, {name}" for m in "qv" for name in names]
    assert [row[1] for row in nulls(run) if row[0] == "q"] == names


def test_beside_steps_those_without_one_come_last_each_by_itself(tmp_path: Path) -> None:
    """Nobody knows when they were: no line leads to them, and no step is told of them."""
    steps = {100: 100, 200: None, 300: None}
    names = {100: "checkpoint-100", 200: "best", 300: "checkpoint"}
    mixed = [row | {"step": steps[row["step"]], "checkpoint": names[row["step"]]} for row in rows()]
    folder = write(tmp_path / "spectra", mixed)
    run = read_series(folder)
    assert [row[0] for row in checkpoints(run)] == list(names.values())
    chart = dict(spectral_curves(run))["Rotation"]
    assert chart is not None and chart.x_label == "step"
    dots = [[dot.text.partition(":")[0] for dot in line.dots] for line in chart.lines]
    expected = [[f"{m}, {end}"] for m in "qv" for end in ("checkpoint, step 100", "best", "checkpoint")]
    assert dots == expected
    page = write_report(folder).read_text()
    assert "best (without a step)</span>" in page and "step 101" not in page and "step 102" not in page


@pytest.mark.parametrize(
    ("first", "second", "stage"),
    [
        ("ppo-from-100-{}", "ppo-from-300-{}", "ppo"),
        ("a/checkpoint-{}", "b/checkpoint-{}", ""),
        ("a/global_step_{}/actor", "b/global_step_{}/actor", ""),
    ],
)
def test_checkpoints_of_one_step_from_two_trainings_stay_apart(
    first: str, second: str, stage: str, tmp_path: Path
) -> None:
    content = [row | {"checkpoint": first.format(row["step"]), "stage": stage} for row in rows()]
    far = {"stage": stage, "angle_left_mean_rad": 1.0, "angle_right_mean_rad": 1.0}
    content += [row | far | {"checkpoint": second.format(row["step"])} for row in rows()]
    folder = write(tmp_path / "spectra", content)
    found = [(row[0], row[1], row[2]) for row in checkpoints(read_series(folder))]
    one = [(first.format(100 * i), "4", f"{0.02 * i:.4f}") for i in (1, 2, 3)]
    assert found == one + [(second.format(100 * i), "4", "1.0000") for i in (1, 2, 3)]
    page = write_report(folder).read_text()
    turned = page[page.index('aria-label="Rotation"') :]
    dashes = re.findall(r'<polyline class="line c\d (d\d)"', turned[: turned.index("</svg>")])
    assert sorted(dashes) == ["d0", "d0", "d1", "d1"]  # of q and v
    for name in (first, second):
        assert f'"/></svg>{name.replace("-{}", "").replace("_{}", "")}</span>' in page


def test_what_has_no_step_comes_after_what_has_one(tmp_path: Path) -> None:
    last = [row | {"checkpoint": "final", "step": None} for row in rows(1)]
    run = read_series(write(tmp_path / "spectra", [*last, *rows()]))
    assert {row["checkpoint"]: row["step"] for row in run.metrics} == {
        "final": 301, "checkpoint-100": 100, "checkpoint-200": 200, "checkpoint-300": 300
    }  # fmt: skip


def test_a_series_of_an_80_layer_model_stays_a_page(tmp_path: Path) -> None:
    page = write_report(write(tmp_path / "spectra", rows(100, 80)))
    assert page.stat().st_size < 5_000_000
    assert len(re.findall("<figure>", page.read_text())) == 5


def test_a_page_of_every_projection_of_a_large_model_is_no_larger(tmp_path: Path) -> None:
    content = rows(100, 80)[::2]  # of q
    modules = ("q", "k", "v", "o", "gate", "up", "down")
    whole = [row | {"module": module} for row in content for module in modules]
    whole += [row | {"module": "lm_head", "layer": None} for row in content if row["layer"] == 0]
    page = write_report(write(tmp_path / "spectra", whole))
    text = page.read_text()
    assert page.stat().st_size < 5_000_000 and 15_000 < text.count("<rect") <= 30_000
    assert "of 100 checkpoints, evenly spaced" in text
    drawn = text[text.index(", lm_head: by event") :]
    assert (
        "layer 0" not in drawn[: drawn.index("</svg>")] and ">step 10000: " in drawn[: drawn.index("</svg>")]
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no row yet"),
        ("[]\n", "line 1: a row must be a JSON object"),
        ('{"stage": "", "step": 1}\n', "line 1: wanted an object with stage, step, module"),
        ('{"stage": "", "step": "x", "module": "q"}\n', "line 1: 'step' is 'x', wanted a number"),
        (
            '{"step": 1, "module": "q", "angle_left_mean_rad": "wide"}\n',
            "angle_left_mean_rad' is 'wide', wanted a number",
        ),
    ],
)
def test_what_is_no_table_of_spectra_is_one_line(tmp_path: Path, content: str, told: str) -> None:
    folder = tmp_path / "spectra"
    folder.mkdir()
    (folder / "spectra.jsonl").write_text(content)
    with pytest.raises(RunFolderError) as error:
        write_report(folder)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_names_of_checkpoints_are_texts_on_the_page(tmp_path: Path) -> None:
    content = [row | {"checkpoint": "<script>alert(1)</script>", "step": 1} for row in rows(1)]
    page = write_report(write(tmp_path / "spectra", content)).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def write_scores(folder: Path, content: list[dict[str, Any]]) -> None:
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.mark.parametrize("by_label", [True, False])
def test_scores_are_drawn_and_listed_beside_the_spectra(tmp_path: Path, by_label: bool) -> None:
    """Those of `rlspec measure` name the checkpoint, and have the base's too; those of the callback the step."""
    content = rows()
    if not by_label:
        content = [{name: value for name, value in row.items() if name != "checkpoint"} for row in content]
    folder = write(tmp_path / "spectra", content)
    scores = [("text_loss", 2.5), ("text_loss", 2.75), ("text_loss", 3.0), ("forgetting", -0.1)]
    write_scores(
        folder,
        [
            {"step": 100 * i, "score": name, "value": value}
            | ({"checkpoint": f"checkpoint-{100 * i}"} if by_label else {})
            for i, (name, value) in zip((1, 2, 3, 3), scores)
        ]
        + [{"checkpoint": "base", "step": None, "score": "of_the_base", "value": 1.0}],
    )
    run = read_series(folder)
    assert list(run.scores) == ["text_loss", "forgetting"]
    assert [row[-2:] for row in checkpoints(run)] == [["2.5", "–"], ["2.75", "–"], ["3", "-0.1"]]
    charts = {title: chart for title, chart in spectral_curves(run) if chart is not None}
    (line,) = charts["Score text_loss"].lines
    assert [dot.text.rsplit(": ")[-1] for dot in line.dots] == ["2.5", "2.75", "3"]
    # The axis is around the values, not from 0.
    heights = [dot.y for dot in line.dots]
    assert heights[0] - heights[2] > 100 and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    page = write_report(folder).read_text()
    assert (
        "Score forgetting" in page and '<th scope="col">text_loss</th><th scope="col">forgetting</th>' in page
    )
    assert "of_the_base" not in page


def test_what_goes_with_the_scores_is_a_table_of_five_checkpoints_or_more(tmp_path: Path) -> None:
    content = [
        row | {"checkpoint": f"checkpoint-{step}", "step": step, "angle_left_mean_rad": 0.1 * step}
        for step in range(1, 7)
        for row in rows(1)
    ]
    folder = write(tmp_path / "spectra", content)
    values = [5.0, 4.0, 2.0, 3.0, 1.0]
    write_scores(
        folder,
        [
            {"checkpoint": f"checkpoint-{step}", "step": step, "score": name, "value": value}
            for name, some in (("ood", values), ("few", values[:4]))
            for step, value in enumerate(some, start=1)
        ],
    )
    run = read_series(folder)
    found = {(row[0], row[1]): row[2:] for row in correlations_with_scores(run)}
    assert set(found) == {("ood", "step"), ("ood", "angle_left_mean_rad")}  # nothing else varies
    rho = spearman(range(5), values)
    assert rho is not None
    low, high = spearman_fisher_interval(rho, 5) or (0.0, 0.0)
    assert found["ood", "step"] == [f"{rho:+.2f}", f"{low:+.2f} to {high:+.2f}", "5"]
    assert "Rank correlations with the scores" in write_report(folder).read_text()


@pytest.mark.parametrize(
    "line", ['{"score": "a", "value": "b"}', '{"score": 3, "value": 1}', "[1]", '{"value": NaN}']
)
def test_a_line_that_is_no_score_is_named(tmp_path: Path, line: str) -> None:
    folder = write(tmp_path / "spectra", rows())
    (folder / "scores.jsonl").write_text(f'{{"step": 100, "score": "a", "value": 1}}\n{line}\n')
    with pytest.raises(RunFolderError, match=r"scores\.jsonl, line 2"):
        write_report(folder)


def test_no_module_loses_its_line(tmp_path: Path) -> None:
    modules = ["q", "k", "v", "o", "mlp", "embed", "lm_head"]
    content = [row | {"module": module} for module in modules for row in rows(layers=1)[::2]]
    charts = dict(spectral_curves(read_series(write(tmp_path / "spectra", content))))
    drawn = charts["Rotation"]
    assert drawn is not None and [line.label for line in drawn.lines] == modules
    assert len({line.colour for line in drawn.lines}) == len(modules)


def test_branches_of_a_run_start_where_they_did(tmp_path: Path) -> None:
    places = [
        ("sft-100", "sft", 100),
        ("sft-300", "sft", 300),
        ("ppo-from-100-5", "ppo", 5),
        ("restore-1", "restore", 1),
    ]
    content = [
        row | {"checkpoint": f"run/{name}", "stage": stage, "step": step}
        for name, stage, step in places
        for row in rows(1)
    ]
    run = read_series(write(tmp_path / "spectra", content))
    assert [event["global_step"] for event in run.metrics] == [100, 300, 105, 301]
