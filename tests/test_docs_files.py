"""docs/files.md tells every file and column that commands leave behind, and every variable of the environment."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from train_toys import save_toy_model

from rlspec import SpectralBasis
from rlspec.cli.main import main
from rlspec.io.jsonl import read_rows
from rlspec.spectra.table import COLUMNS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/files.md").read_text()
#: A run that has all there is: branches, a restoration, an alarm, a budget, a shift that is neither ID nor OOD.
TRACK = (
    "--sft-steps 4 --every 2 --ppo-from 2,4 --ppo-updates 1 --stages sft,ppo,restore --shifts none,both,rule --deals 2 "
    "--turns 1 --turns-per-update 4 --batch-size 2 --track-budget 50% --alarm ood_accuracy --threads 1 --device cpu"
)
pytestmark = pytest.mark.usefixtures("own_cache")


def section(title: str) -> str:
    """From a heading to the next one."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return text


def first_cells(title: str) -> set[str]:
    """What the first column of a section's table names."""
    return {
        name
        for cell in re.findall(r"^\| (`.*?) \|", section(title), re.MULTILINE)
        for name in re.findall("`(.*?)`", cell)
    }


def columns(path: Path) -> set[str]:
    return {name for row in read_rows(path) for name in row}


def untold_files(folder: Path, title: str) -> set[str]:
    """Files of a folder that no path of a section's table stands for; one that ends in / stands for all below it."""
    told = [re.escape(name) for name in first_cells(title)]
    patterns = [re.sub("<.*?>", "[^/]+", name) + (".+" if name.endswith("/") else "") for name in told]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not any(re.fullmatch(pattern, name) for pattern in patterns)}


def invoke(*words: str) -> None:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output


def test_every_file_of_a_saved_basis_is_told(model: Path, tmp_path: Path) -> None:
    SpectralBasis.from_checkpoint(model).save_pretrained(tmp_path / "basis")
    assert untold_files(tmp_path / "basis", "A saved basis") == set()


def test_every_file_and_column_of_a_run_is_told(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke("track", "--model", str(model), "--out", str(run), *TRACK.split())
    assert not untold_files(run, "A run folder")
    metrics = {re.sub("^(ood|rule)_(?!shift)", "id_", name) for name in columns(run / "metrics.jsonl")}
    assert metrics == first_cells("metrics.jsonl")
    assert columns(run / "evals.jsonl") == first_cells("evals.jsonl")
    assert columns(run / "spectra.jsonl") - set(COLUMNS) == {"run", "segment"}


def test_every_file_and_column_of_a_series_is_told(tmp_path: Path) -> None:
    for name in ("base", "run/checkpoint-10"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_toy_model(tmp_path / name)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "cards 1 2 3 4"}) + "\n")
    out = tmp_path / "out"
    places = ["--base", str(tmp_path / "base"), str(tmp_path / "run"), "--out", str(out)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "cards 1 2 3 4"}) + "\n")
    invoke("measure", *places, "--texts", str(texts), "--prompts", str(prompts))
    assert (out / "answers.jsonl").exists()
    invoke("report", str(out))
    assert not untold_files(out, "A measure folder")
    assert columns(out / "scores.jsonl") == first_cells("scores.jsonl")
    assert columns(out / "spectra.jsonl") - set(COLUMNS) == {"checkpoint"}


def test_every_file_of_a_study_is_told(model: Path, tmp_path: Path) -> None:
    from study_toys import tiny_study

    invoke(*tiny_study(model), "--out", str(tmp_path / "study"))
    assert not untold_files(tmp_path / "study", "A study folder")


def test_what_the_page_does_not_tell_is_found(tmp_path: Path) -> None:
    for name in (
        "metrics.jsonl",
        "tb/sft/events",
        "spectra/sft-3.safetensors",
        "spectra/sft-3.txt",
        "new.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert untold_files(tmp_path, "A run folder") == {"spectra/sft-3.txt", "new.json"}


def test_every_variable_of_the_environment_is_told_and_no_other() -> None:
    sources = [*(ROOT / "rlspec").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"\bRLSPEC_[A-Z_]+", path.read_text())}
    assert read == {name for name in first_cells("Environment variables") if name.startswith("RLSPEC_")}
