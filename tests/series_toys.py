"""Checkpoints on disk as a trainer leaves them, for the tests of series."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from restore_toys import save_model, tune
from transformers import AutoModelForCausalLM

from rlspec.cli.main import main


def make_run(folder: Path) -> Path:
    """A base, and the folder of a trainer with three checkpoints of it, one of them in shards."""
    save_model(folder / "base", "llama")
    for i, step in enumerate((1000, 20, 300)):
        tune(folder / "base", folder / "run" / f"checkpoint-{step}", size=1e-3 * step, seed=i)
    loaded(folder / "run" / "checkpoint-300").save_pretrained(folder / "sharded", max_shard_size="60KB")
    shutil.rmtree(folder / "run" / "checkpoint-300")
    (folder / "sharded").rename(folder / "run" / "checkpoint-300")
    return folder / "run"


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "spectra.jsonl").read_text().splitlines()]


def script(folder: Path, text: str) -> str:
    """A command for --eval: Python that knows ``step``, the checkpoint's."""
    path = folder / "score.py"
    path.write_text(f"import json, sys\nstep = int(sys.argv[1].rpartition('-')[2])\n{text}\n")
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {{checkpoint}}"


def measure(run: Path, *more: str) -> Result:
    """`rlspec measure` of ``run/run`` against ``run/base``, in ``run/out``."""
    words = ["measure", "--base", str(run / "base"), str(run / "run"), "--out", str(run / "out"), *more]
    return CliRunner().invoke(main, words)
