"""Search for a repair: scores against transformers, the recommended line against what was scored, resuming, refusals."""

from __future__ import annotations

import csv
import json
import random
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from restore_toys import tensors_of, tune
from train_toys import save_toy_model

from rlspec.cli.main import main
from rlspec.cli.study_rank_text import restore_flags
from rlspec.errors import OptionError
from rlspec.io.jsonl import read_rows, write_rows
from rlspec.io.launch import staging_folder
from rlspec.io.lock import take_lock
from rlspec.restore import RestoreOptions
from rlspec.restore.checkpoint import run_plan
from rlspec.restore.plan import plan_restore
from rlspec.restore.target import Target
from rlspec.study.repair import LossScores, search
from rlspec.study.repair.candidates import coarse, directions, straight_line
from rlspec.study.repair.choice import Trial, difference_interval, front, recommend
from rlspec.study.repair.command import CommandScores
from rlspec.study.repair.losses import mean
from rlspec.study.repair.scores import Costs
from rlspec.study.repair.search import _middle
from rlspec.tasks.general_points import GeneralPoints
from rlspec.train.trace_file import read_traces

SCORER = """
import json, sys
from pathlib import Path
from safetensors.numpy import load_file
weights = load_file(Path(sys.argv[1]) / "model.safetensors")
log = Path(sys.argv[2])
with log.open("a") as file:
    file.write(json.dumps(sorted(p.name for p in log.parent.iterdir())) + "\\n")
total = sum(float(abs(w.astype("float64")).sum()) for w in weights.values())
print("a line that is no JSON")
print(json.dumps({"win_back": total, "keep": 1.0}))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, texts.jsonl, answers.jsonl."""
    folder = tmp_path_factory.mktemp("repair")
    torch.manual_seed(0)
    save_toy_model(folder / "base")
    tune(folder / "base", folder / "tuned", size=5e-2)
    task, rng = GeneralPoints(style="compact"), random.Random(0)
    deals = [task.sample(rng) for _ in range(12)]
    answers = [{"messages": list(task.prompt(deal)), "answer": task.answer(deal)} for deal in deals]
    write_rows(folder / "answers.jsonl", answers)
    write_rows(folder / "texts.jsonl", [{"text": row["answer"]} for row in answers])
    return folder


def losses(given: Path) -> LossScores:
    return LossScores(
        given / "base", given / "tuned", given / "texts.jsonl", given / "answers.jsonl", device="cpu"
    )


def rank(given: Path, out: Path, *more: str) -> Result:
    line = [
        "study",
        "rank",
        "--base",
        str(given / "base"),
        "--tuned",
        str(given / "tuned"),
        "--out",
        str(out),
    ]
    return CliRunner().invoke(main, [*line, *more])


def by_loss(given: Path) -> list[str]:
    return ["--retain", str(given / "texts.jsonl"), "--task-data", str(given / "answers.jsonl")]


def direct(folder: Path, texts: list[str], dtype: torch.dtype = torch.float32) -> float:
    """Mean token loss, each text by itself, by transformers' own loss."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return total / count


def test_losses_are_those_of_transformers(given: Path) -> None:
    scores = losses(given)
    texts = [row["text"] for row in read_rows(given / "texts.jsonl")]
    for found, folder in ((scores.base, "base"), (scores.tuned, "tuned")):
        assert found().general == pytest.approx(direct(given / folder, texts[::2]), abs=1e-5)
        assert found(confirm=True).general == pytest.approx(direct(given / folder, texts[1::2]), abs=1e-5)
    assert abs(scores.base().general - scores.tuned().general) > 1e-4


def test_losses_in_the_dtype_that_is_stored(given: Path, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        shutil.copytree(given / name, tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(given / name, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    texts = [row["text"] for row in read_rows(given / "texts.jsonl")][::2]
    files = (given / "texts.jsonl", given / "answers.jsonl")
    exact, stored = (
        LossScores(tmp_path / "base", tmp_path / "tuned", *files, device="cpu", dtype=dtype)
        for dtype in ("float32", "stored")
    )
    for name in ("base", "tuned"):
        found, other = (getattr(scores, name)().general for scores in (stored, exact))
        there = direct(tmp_path / name, texts, torch.bfloat16)
        # Batches round otherwise than single texts, by far less than bfloat16 and float32 are apart on one text.
        assert found == pytest.approx(there, rel=2e-3) and found == pytest.approx(other, rel=2e-2)
        assert found != other
    assert stored.identity != exact.identity
    with pytest.raises(OptionError, match="dtype='bf16'"):
        LossScores(tmp_path / "base", tmp_path / "tuned", *files, dtype="bf16")


@pytest.mark.parametrize("candidate", [directions(0.2), straight_line(0.5), coarse()[-1]])
def test_what_was_scored_is_what_the_restore_line_writes(candidate: Any, given: Path, tmp_path: Path) -> None:
    scores = losses(given)
    weights = scores.weights(candidate.options)
    line = ["restore", "--base", str(given / "base"), "--tuned", str(given / "tuned")]
    result = CliRunner().invoke(main, [*line, "--out", str(tmp_path / "out"), *restore_flags(candidate)])
    assert result.exit_code == 0, result.output
    written, tuned = tensors_of(tmp_path / "out"), tensors_of(given / "tuned")
    assert weights and all(torch.equal(written[name], weights[name]) for name in weights)
    assert all(torch.equal(written[name], tuned[name]) for name in written.keys() - weights.keys())
    texts = [row["text"] for row in read_rows(given / "texts.jsonl")]
    there = direct(tmp_path / "out", texts[::2])
    assert scores.restored(candidate.options).general == pytest.approx(there, abs=1e-5)
    assert scores.tuned().general == pytest.approx(direct(given / "tuned", texts[::2]), abs=1e-5)  # put back


def test_the_random_control_moves_each_tensor_as_far_in_another_direction(given: Path) -> None:
    scores, options = losses(given), directions(0.2).options
    tuned, ours, random_ = (
        tensors_of(given / "tuned"),
        scores.weights(options),
        scores.random_weights(options),
    )
    assert ours.keys() == random_.keys()
    for name in ours:
        a, b = (w[name].double() - tuned[name].double() for w in (ours, random_))
        assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-4)
        assert abs(float((a * b).sum() / a.norm() / b.norm())) < 0.2


def test_the_printed_line_is_the_recommended_setting(given: Path, tmp_path: Path) -> None:
    result = rank(given, tmp_path / "out", *by_loss(given), "--budget", "12", "--tolerance", "1")
    assert result.exit_code == 0, result.output
    assert "Confirmed on data that the search did not see" in result.stdout
    assert "95 % interval" in result.stdout
    words = shlex.split(result.stdout.splitlines()[-1])
    assert words[:2] == ["rlspec", "restore"]
    words[words.index("REPAIRED")] = str(tmp_path / "repaired")
    made = CliRunner().invoke(main, words[1:])
    assert made.exit_code == 0, made.output
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        (best,) = [row for row in csv.DictReader(file) if row["recommended"] == "1"]
    texts = [row["text"] for row in read_rows(given / "texts.jsonl")]
    assert float(best["general"]) == pytest.approx(direct(tmp_path / "repaired", texts[::2]), abs=1e-5)


def test_a_search_that_was_stopped_ends_with_the_same_table(given: Path, tmp_path: Path) -> None:
    whole = rank(given, tmp_path / "whole", *by_loss(given), "--budget", "10")
    assert whole.exit_code == 0, whole.output
    scores, seen = losses(given), 0

    def stop(trial: Trial) -> None:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(given / "base", given / "tuned", scores, tmp_path / "cut", evaluations=10, on_trial=stop)
    ledger = tmp_path / "cut" / "ledger.jsonl"
    held = ledger.read_bytes()
    ledger.write_bytes(held + b'{"of": {"model"')  # killed while it wrote
    again = rank(given, tmp_path / "cut", *by_loss(given), "--budget", "10")
    assert again.exit_code == 0, again.output
    assert ledger.read_bytes().startswith(held) and again.stdout == whole.stdout
    for name in ("ledger.jsonl", "table.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_ledger_of_other_data_is_refused(given: Path, tmp_path: Path) -> None:
    assert rank(given, tmp_path / "out", *by_loss(given), "--budget", "1").exit_code == 0
    other = ["--retain", str(given / "answers.jsonl"), "--task-data", str(given / "texts.jsonl")]
    result = rank(given, tmp_path / "out", *other, "--budget", "1")
    assert result.exit_code == 2 and "is of a search of other models or data; give --out" in result.stderr


def test_two_searches_in_one_folder_are_one_too_many(given: Path, tmp_path: Path) -> None:
    """The candidate of one would be scored as the other's."""
    (tmp_path / "out").mkdir()
    with take_lock(tmp_path / "out"):
        result = rank(given, tmp_path / "out", *by_loss(given), "--budget", "1")
    assert result.exit_code == 2 and "is in use by another rlspec process" in result.stderr
    assert rank(given, tmp_path / "out", *by_loss(given), "--budget", "1").exit_code == 0


def scorer(tmp_path: Path, text: str = SCORER) -> str:
    (tmp_path / "scorer.py").write_text(text)
    (tmp_path / "log").mkdir(exist_ok=True)
    return shlex.join([sys.executable, str(tmp_path / "scorer.py"), "{model}", str(tmp_path / "log" / "log")])


def test_what_a_killed_search_had_written_of_a_candidate_stops_no_other(given: Path, tmp_path: Path) -> None:
    names = {"win_back": ["win_back"], "keep": ["keep"], "beside": tmp_path / "log" / "out"}
    scores = CommandScores(given / "base", given / "tuned", scorer(tmp_path), **names)
    options = RestoreOptions()
    place, state = staging_folder(scores._place)[0], staging_folder(scores._place)[1] / "state.json"

    def kill() -> None:
        for _ in range(6000):
            if json.loads(state.read_text())["finished"]:
                raise KeyboardInterrupt
            time.sleep(0.01)

    plan = plan_restore(given / "base", given / "tuned", options)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, Target(place, given / "base", given / "tuned"), on_commit=kill)
    assert state.exists()
    assert scores.restored(options).general != 0
    assert not [path.name for path in (tmp_path / "log").iterdir() if "partial" in path.name]


def test_a_command_sees_one_checkpoint_at_a_time_and_none_is_left(given: Path, tmp_path: Path) -> None:
    command = scorer(tmp_path)
    result = rank(given, tmp_path / "log" / "out", "--eval", command, "--budget", "3")
    assert result.exit_code == 0, result.output
    seen = [json.loads(line) for line in (tmp_path / "log" / "log").read_text().splitlines()]
    assert len(seen) == 5  # base, tuned and three restored
    assert [".out.candidate" in names for names in seen] == [False, False, True, True, True]
    assert not (tmp_path / "log" / ".out.candidate").exists()
    assert "Unconfirmed" in result.stdout or "No recommendation" in result.stdout
    totals = sum(float(w.double().abs().sum()) for w in tensors_of(given / "tuned").values())
    rows = (tmp_path / "log" / "out" / "table.csv").read_text().splitlines()
    assert float(rows[2].split(",")[7]) == pytest.approx(totals)
    told = next(line for line in result.stdout.splitlines() if line.endswith("   tuned"))
    assert float(told.split()[0]) == pytest.approx(totals, abs=1e-4)  # as the command printed it


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("print('done')", "printed no line that is a JSON object"),
        ('print(\'{"win_back": NaN, "keep": 1}\')', "win_back=win_back is nan, wanted a finite number"),
        ("print('{\"win_back\": 1}')", "keep=keep is no such score"),
    ],
)
def test_a_command_that_fails_is_told_in_one_line(text: str, told: str, given: Path, tmp_path: Path) -> None:
    result = rank(given, tmp_path / "out", "--eval", scorer(tmp_path, text))
    told = told.replace("win_back=", "--win-back ").replace("keep=", "--keep ")
    assert result.exit_code == 2 and told in result.stderr and "scorer.py" in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "x"], "--budget 'x' is not valid"),
        (["--budget", "0"], "--budget 0: wanted one evaluation at least"),
        (["--tolerance", "2"], "--tolerance 2.0 is not in [0, 1]"),
        (["--eval", "python x.py {model}"], "Give either --eval, or --retain and --task-data"),
    ],
)
def test_bad_options(options: list[str], told: str, given: Path, tmp_path: Path) -> None:
    result = rank(given, tmp_path / "out", *by_loss(given), *options)
    assert result.exit_code == 2 and told in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_a_command_needs_a_place_for_the_model(given: Path, tmp_path: Path) -> None:
    result = rank(given, tmp_path / "out", "--eval", "python x.py")
    assert result.exit_code == 2 and "has no {model}" in result.stderr


def test_a_command_of_unmatched_quotes_is_one_line(given: Path, tmp_path: Path) -> None:
    result = rank(given, tmp_path / "out", "--eval", "python 'x.py {model}")
    assert result.exit_code == 2 and "No closing quotation" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_last_row_of_a_file_without_a_last_newline_counts(given: Path, tmp_path: Path) -> None:
    text = (given / "answers.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(text.rstrip("\n"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(given / "base")
    assert read_traces(tmp_path / "cut.jsonl", tokenizer) == read_traces(given / "answers.jsonl", tokenizer)


def test_a_row_that_is_no_text_is_named(given: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "( 1 + 2"}\n{"content": "x"}\n')
    with pytest.raises(OptionError, match=r"bad\.jsonl, line 2: wanted .* found the fields content"):
        LossScores(given / "base", given / "tuned", tmp_path / "bad.jsonl", given / "answers.jsonl")


def test_the_rule_and_the_curve() -> None:
    base, tuned = Costs(1.0, 5.0), Costs(2.0, 1.0)
    points = {0.1: (1.8, 1.0), 0.2: (1.4, 1.19), 0.3: (1.2, 1.21), 0.4: (1.5, 1.3)}
    trials = [Trial(directions(rank), Costs(*point)) for rank, point in points.items()]
    best = recommend(trials, base, tuned, 0.05)  # the limit is 1 + 0.05 * 4 = 1.2
    assert best is trials[1] and recommend(trials, base, tuned, 0.0) is trials[0]
    assert recommend([Trial(directions(0.5), Costs(2.0, 1.0))], base, tuned, 0.05) is None
    assert front(trials) == [trials[2], trials[1], trials[0]]


def test_a_search_without_a_recommended_restoration_stays_where_the_task_is_kept() -> None:
    line, near, far = straight_line(0.5), directions(0.1), directions(0.5)
    control = Trial(line, Costs(1.1, 1.1))
    trials = [control, Trial(far, Costs(1.0, 4.0)), Trial(near, Costs(1.8, 1.3))]
    assert _middle(trials, control) == _middle(trials, None) == near  # least general cost: far
    assert _middle(trials, trials[1]) == far and _middle(trials[:1], control) is None


def test_the_interval_is_paired() -> None:
    draw = torch.Generator().manual_seed(0)
    hard = (torch.rand(200, generator=draw, dtype=torch.float64) * 1000).tolist()
    noise = torch.randn(200, generator=draw, dtype=torch.float64)
    a, b = [(h + float(n) + 1, 10) for h, n in zip(hard, noise)], [(h, 10) for h in hard]
    low, high = difference_interval(a, b)
    change = mean(a) - mean(b)
    error = float(noise.std()) / 10 / 200**0.5
    assert low == pytest.approx(change - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(change + 1.96 * error, abs=0.3 * error)
