"""Scores of a series of checkpoints: by a command, on texts, and the alarm over them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from distributed_toys import save
from series_toys import measure, script
from train_toys import save_toy_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlspec.cli.main import main
from rlspec.errors import OptionError
from rlspec.jobs.series.evaluation import run_command
from rlspec.jobs.series.falls import find_fall
from rlspec.jobs.series.scores import Scorer
from rlspec.tasks.commands import last_json
from rlspec.train.texts import text_losses

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = ["cards 1 2 3 4", "number 24"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for i, name in enumerate(("base", "run/checkpoint-10", "run/checkpoint-20", "run/checkpoint-30")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_toy_model(tmp_path / name, initializer_range=0.1 + 0.05 * i)
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "out" / "scores.jsonl").read_text().splitlines()]


def test_a_command_and_texts_score_each_checkpoint_once_and_the_alarm_names_the_peak(run: Path) -> None:
    command = script(
        run,
        "print('loading')\nprint(json.dumps({'ood': [i < {10: 20, 20: 60, 30: 2}[step] for i in range(60)]}))",
    )
    more = ("--eval", command, "--texts", str(run / "retain.jsonl"), "--alarm", "ood")
    result = measure(run, *more)
    assert result.exit_code == 0, result.output
    found = {(row["checkpoint"], row["score"]): row["value"] for row in rows(run)}
    assert [found[f"checkpoint-{step}", "ood"] for step in (10, 20, 30)] == [20 / 60, 1, 2 / 60]
    losses = []
    for place in ("base", "run/checkpoint-10"):
        model = AutoModelForCausalLM.from_pretrained(run / place, dtype=torch.float32)
        losses.append(sum(text_losses(model, AutoTokenizer.from_pretrained(run / place), TEXTS)) / len(TEXTS))
    assert found["base", "text_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert found["checkpoint-10", "forgetting"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert "ood fell from 100.0 % at step 20 to 3.3 % at step 30" in result.output
    assert result.output.rstrip().endswith("go back to checkpoint-20")
    before = rows(run)
    (run / "score.py").write_text("raise SystemExit('asked again')")
    again = measure(run, *more)
    assert again.exit_code == 0 and rows(run) == before and again.output == result.output


def test_checkpoints_of_weights_alone_are_read_with_the_tokenizer_of_their_base(run: Path) -> None:
    texts = ("--texts", str(run / "retain.jsonl"))
    assert measure(run, *texts).exit_code == 0
    whole = [(row["score"], row["value"]) for row in rows(run)]
    shutil.rmtree(run / "out")
    for file in (run / "run").rglob("tokenizer*"):
        file.unlink()
    result = measure(run, *texts)
    assert result.exit_code == 0, result.output
    assert [(row["score"], row["value"]) for row in rows(run)] == whole


def test_a_command_that_fails_is_told_in_one_line_that_names_it(run: Path) -> None:
    for text, told in [
        ("raise SystemExit('no card')", "ended with code 1: no card"),
        ("print('done')", "printed no line of JSON that is an object"),
        ("print('[1]')", "printed no line of JSON that is an object"),
    ]:
        with pytest.raises(OptionError, match=rf"score\.py .*checkpoint-10: {told}") as raised:
            run_command(script(run, text), run / "run" / "checkpoint-10")
        assert "\n" not in str(raised.value)
    with pytest.raises(OptionError, match="none-such .*: cannot be run"):
        run_command("none-such {checkpoint}", run)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--alarm", "ood"), "--alarm 'ood': no such score; --eval, --texts or --prompts gives scores"),
        (("--alarm", "ood", "--texts", "retain.jsonl"), "no such score; there are text_loss, forgetting"),
        (("--prompts", "none"), "none: no such file"),
        (("--prompts", "few.jsonl"), "few.jsonl, line 1: wanted {"),
        (("--texts", "few.jsonl"), "few.jsonl: no text has two tokens"),
        (("--texts", "none"), "--texts 'none': no such file"),
        (("--csv", "none/table.csv"), "--csv 'none/table.csv': no such folder as none"),
        (("--eval", "x"), "--eval 'x' has no {checkpoint}"),
        (("--eval", "x '{checkpoint}"), "No closing quotation"),
    ],
)
def test_wrong_flags_are_told_before_the_work(
    more: tuple[str, ...], told: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    (run / "few.jsonl").write_text(json.dumps({"text": "cards"}) + "\n")
    result = measure(run, *more)
    assert result.exit_code == 2 and told in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and not (run / "out").exists()


def test_checkpoints_that_transformers_cannot_load_are_told_before_the_work(run: Path) -> None:
    texts = ("--texts", str(run / "retain.jsonl"))
    shutil.copytree(run / "run", run / "kept")
    place = run / "run" / "checkpoint-40"
    save(AutoModelForCausalLM.from_pretrained(run / "base").state_dict(), place)
    whole = run / "run" / "checkpoint-30"
    for broken, told in [
        (place, f"{place}: a checkpoint of torch.distributed.checkpoint"),
        (whole, f"{whole}: no config.json in it"),
    ]:
        result = measure(run, *texts)
        assert result.exit_code == 2 and not (run / "out").exists()
        assert result.stderr.startswith(f"Error: --texts '{run / 'retain.jsonl'}' wants checkpoints that")
        assert told in result.stderr and result.stderr.count("\n") == 1
        if broken == place:
            shutil.rmtree(place)
            (whole / "config.json").unlink()
    shutil.rmtree(run / "run")
    shutil.copytree(run / "kept", run / "run")
    (single,) = whole.glob("*.safetensors")
    words = ["measure", str(single), "--base", str(run / "base"), "--out", str(run / "out"), *texts]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and f"{single}: a file; give the folder" in result.stderr
    assert not (run / "out").exists()
    assert measure(run, *texts).exit_code == 0
    (whole / "config.json").unlink()

    def scorer(out: str) -> Scorer:
        return Scorer(run / "base", run / out, texts=run / "retain.jsonl")

    scorer("out").check([run / "run"])  # its scores are there: it is not loaded again
    with pytest.raises(OptionError, match=r"checkpoint-30: no config\.json"):
        scorer("other").check([run / "run"])


def test_a_command_of_the_user_s_may_read_what_transformers_cannot_load(run: Path) -> None:
    shutil.rmtree(run / "run")
    save(AutoModelForCausalLM.from_pretrained(run / "base").state_dict(), run / "run" / "checkpoint-10")
    text = (
        "import pathlib\nprint(json.dumps({'files': len(list(pathlib.Path(sys.argv[1]).glob('*.distcp')))}))"
    )
    result = measure(run, "--eval", script(run, text))
    assert result.exit_code == 0, result.output
    assert [(row["score"], row["value"]) for row in rows(run)] == [("files", 1.0)]


def scored(checkpoint: str, step: int, solved: int, by: str = "x") -> dict[str, Any]:
    results = [float(i < solved) for i in range(60)]
    return {
        "checkpoint": checkpoint, "step": step, "score": "ood", "value": solved / 60, "n": 60,
        "results": results, "by": by,
    }  # fmt: skip


def test_two_trainings_are_two_series_for_the_alarm() -> None:
    apart = [scored("a/checkpoint-9", 9, 55), scored("b/checkpoint-9", 9, 20)]
    assert find_fall(apart, "ood") is None
    falling = [*apart, scored("b/checkpoint-20", 20, 1)]
    found = find_fall(falling, "ood")
    assert (
        found is not None and found[1] == "b/checkpoint-9" and (found[0].peak_step, found[0].step) == (9, 20)
    )


def test_what_has_no_step_falls_only_where_nothing_has_one() -> None:
    unnumbered = [scored("best", 9, 55) | {"step": None}, scored("final", 9, 1) | {"step": None}]
    found = find_fall(unnumbered, "ood")
    assert found is not None and found[1] == "best"
    numbered = [scored("checkpoint-9", 9, 30), scored("checkpoint-20", 20, 31)]
    assert find_fall([*numbered, *unnumbered], "ood") is None


def test_scores_that_no_test_tells_from_chance_are_refused_for_an_alarm() -> None:
    numbers = [scored("checkpoint-9", 9, 55) | {"n": None, "results": None}]
    with pytest.raises(
        OptionError, match="'ood': a number for each checkpoint, which no test tells from chance"
    ):
        find_fall(numbers, "ood")


def test_another_command_s_scores_are_not_those_of_this_one(run: Path) -> None:
    for solved in (55, 20):
        command = (
            script(run, f"print(json.dumps({{'ood': [i < {solved} for i in range(60)]}}))") + f" {solved}"
        )
        result = measure(run, "--eval", command, "--alarm", "ood")
        assert result.exit_code == 0, result.output
        assert "ood: no fall from a peak that chance does not explain" in result.output
    assert len(rows(run)) == 6


def test_what_a_command_prints_may_be_indented_and_be_followed_by_other_lines() -> None:
    several = json.dumps({"ood": {"value": 0.5, "n": 4}, "id": [{"deal": 1}]}, indent=2)
    for text, found in [
        ('{"ood": 0.5}\n3\n', {"ood": 0.5}),
        (f"log\n{several}\ndone\n", json.loads(several)),
        ('  {"ood": 1}\r\n', {"ood": 1}),
        ('{"ood": 1}\n[\n  {"deal": 1}\n]\n', {"ood": 1}),
    ]:
        assert last_json(text) == found
    for text in ("", "[1]\n0.5\n", '{"ood": 1} and more', '{\n"ood": 1\n} and more', "{\n", "{'ood': 1}"):
        with pytest.raises(LookupError):
            last_json(text)


def test_a_checkpoint_deleted_since_it_was_measured_stops_no_score(run: Path) -> None:
    assert measure(run).exit_code == 0
    shutil.rmtree(run / "run" / "checkpoint-10")
    again = ("--eval", script(run, "print(json.dumps({'ood': step}))"), "--texts", str(run / "retain.jsonl"))
    code = "import sys; from rlspec.cli.main import main; main(sys.argv[1:])"
    words = ["measure", "--base", str(run / "base"), str(run / "run"), "--out", str(run / "out"), *again]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no longer on the disk, so without new scores: checkpoint-10\n" in done.stderr
    found = {(row["checkpoint"], row["score"]) for row in rows(run)}
    assert {checkpoint for checkpoint, score in found if score == "ood"} == {"checkpoint-20", "checkpoint-30"}
    assert ("checkpoint-30", "text_loss") in found and ("checkpoint-10", "text_loss") not in found
