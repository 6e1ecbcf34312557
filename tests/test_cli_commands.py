"""The command line: help without torch, `env`, `eval`, and one clear line for every kind of bad input."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from train_toys import save_toy_model

import rlspec
from rlspec.cli.main import COMMANDS, main
from rlspec.jobs.loading import load_model
from rlspec.ops.table import TABLE, summary
from rlspec.tasks import wilson_interval


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings, so it has no lm_head of its own."""
    return save_toy_model(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=True)


def invoke(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def modules_after(*arguments: str, first: str = "") -> set[str]:
    """The modules that a process has imported once the command ends; it executes ``first`` before."""
    code = (
        f"import sys\n{first}\nfrom rlspec.cli.main import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print('modules:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("track", "--help"), ("eval", "--help")])
def test_help_and_version_load_no_torch(arguments: tuple[str, ...]) -> None:
    modules = modules_after(*arguments)
    assert "rlspec.cli.main" in modules
    assert not modules & {"torch", "transformers", "numpy"}


def test_the_import_check_would_notice_numpy() -> None:
    assert "numpy" in modules_after("--help", first="import numpy")


def test_the_version_is_that_of_the_installed_package() -> None:
    wanted = importlib.metadata.version("rlspec")
    assert rlspec.__version__ == wanted and invoke("--version").output == f"rlspec {wanted}\n"


def test_help_lists_the_commands_and_the_options_of_track() -> None:
    text = invoke("--help").output
    assert all(f"  {name} " in text for name in COMMANDS)
    text = invoke("track", "--help").output
    options = (
        "every model out stages sft-steps ppo-updates rank modules task seed resume device config ppo-every"
    )
    options += " deals turns shifts learning-rate ppo-learning-rate batch-size dtype threads checkpoint-every"
    options += " engine alarm"
    assert all(f"--{name} " in text for name in options.split())


def test_env_names_versions_and_backends() -> None:
    text = invoke("env").output
    names = (
        "rlspec",
        "python",
        "torch",
        "transformers",
        "triton",
        "CPU",
        "threads",
        "device",
        "backends",
        "extension",
        "cache",
    )
    assert [name for name in names if not any(line.startswith(name) for line in text.splitlines())] == []
    assert torch.__version__ in text


def test_env_tells_who_does_small_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = (line for line in invoke("env").output.splitlines() if line.startswith("small solves on cpu"))
    assert line.split()[-1] == "host"
    monkeypatch.setenv("RLSPEC_SOLVER", "magma")
    refused = invoke("env")
    assert refused.exit_code == 2
    assert "RLSPEC_SOLVER=magma: unknown solver; valid: host, jacobi, cusolver, triton" in refused.output


def test_env_tells_what_runs_each_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = invoke("env").output.splitlines()
    for op in TABLE:
        (line,) = (line for line in lines if line.startswith(f"{op} on cpu "))
        assert line.split(maxsplit=3)[3] == summary(op, torch.device("cpu"))
    monkeypatch.setenv("RLSPEC_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = invoke("env")  # a bug report is asked for just then
    assert refused.exit_code == 0
    told = " ".join(refused.output.split())  # columns are as wide as the longest name
    for op in TABLE:
        assert f"{op} on cpu none (RLSPEC_BACKEND=triton, but " in told


def test_eval_table_json_and_comparison(model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ("--shift", "none,rule,both", "--deals", 5, "--turns", 2, "--seed", 3, "--json", figures)
    result = invoke("eval", "--model", model, "--compare", model, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert [row["shift"] for row in found["evals"]] == ["none", "rule", "both"] * 2
    for row in found["evals"]:
        assert (row["n"], row["turns"], row["seed"], len(row["outcomes"])) == (5, 2, 3, 5)
        assert (row["low"], row["high"]) == wilson_interval(row["successes"], 5)
    # A model against itself, on the same deals and with the same luck.
    assert [(test["gained"], test["lost"], test["p_value"]) for test in found["tests"]] == [(0, 0, 1.0)] * 3
    assert "95 % interval" in result.output and "McNemar p = 1" in result.output


def test_eval_holds_one_model_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def load(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in loaded))
        found = load_model(*arguments)
        loaded.append(weakref.ref(found))
        return found

    monkeypatch.setattr("rlspec.jobs.eval.load_model", load)
    options = ("--shift", "none", "--deals", 2, "--turns", 1)
    assert invoke("eval", "--model", model, "--compare", model, *options).exit_code == 0
    assert alive == [0, 0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_code(
    number: int, code: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlspec.jobs.eval.evaluate", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(number)
    result = invoke("eval", "--model", model)
    assert (result.exit_code, result.stderr) == (code, "Stopped\n")
    assert signal.getsignal(number) is before


def test_report_of_no_run(tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 2 and result.stderr.startswith(f"Error: {tmp_path} holds no run")


def broken(change: Callable[[Path], None]) -> Callable[[Path, Path], Path]:
    def make(model: Path, folder: Path) -> Path:
        shutil.copytree(model, folder)
        change(folder)
        return folder

    return make


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda model, folder: folder, "no such folder"),
        (lambda model, folder: folder.mkdir() or folder, "no config.json"),
        (broken(lambda folder: (folder / "model.safetensors").unlink()), "safetensors"),
        (broken(cut), "model.safetensors"),
        (broken(poison), "model.layers.0.self_attn.k_proj.weight"),
        (broken(without_a_norm), "model.norm.weight"),
        (broken(without_tokenizer), "no tokenizer"),
    ],
    ids=["missing", "empty", "no weights", "truncated", "NaN", "weight missing", "no tokenizer"],
)
def test_bad_checkpoints(make: Callable[[Path, Path], Path], named: str, model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "model")
    check_refused(tmp_path / "out", named, "--model", folder)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--modules", "lm_head"), "no lm_head in this model"),
        (("--modules", "q,w"), "unknown module 'w'; valid: q, k, v, o, mlp, embed, lm_head"),
        (("--shifts", "none,suit"), "unknown shift 'suit'"),
        (("--task", "chess"), "unknown task 'chess'; valid: general_points"),
        (("--every", "0"), "--every 0 must be at least 1"),
        (("--stages", "sft,dpo"), "--stages 'sft,dpo': unknown stage 'dpo'; valid: sft, ppo"),
        (("--rank", "much"), "--rank 'much' is not valid"),
        (("--device", "abacus"), "--device 'abacus': unknown device; valid: auto, cpu, cuda"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: No such file"),
    ],
)
def test_bad_options(options: tuple[str, ...], named: str, model: Path, tmp_path: Path) -> None:
    check_refused(tmp_path / "out", named, "--model", model, *options)


def check_refused(out: Path, named: str, *options: Any) -> None:
    """`track` ends with one line on stderr that holds ``named``, code 2, and nothing written."""
    before = sorted(out.parent.rglob("*"))
    result = invoke("track", "--out", out, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr
    assert result.stdout == ""
    assert sorted(out.parent.rglob("*")) == before


def test_eval_refuses_an_unknown_shift_and_lists_the_valid(model: Path) -> None:
    result = invoke("eval", "--model", model, "--shift", "suit")
    assert result.exit_code == 2
    assert "valid: none, rule, cards, both, target" in result.stderr
