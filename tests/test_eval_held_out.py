"""`rlspec eval` of a run's checkpoint: which problems its training was kept from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from rlspec.cli.main import main
from rlspec.jobs.loading import evaluation_keys, load_tokenizer
from rlspec.run.folder import RunFolder
from rlspec.tasks import evaluation_problems, get_task


def test_eval_tells_how_many_problems_a_run_s_training_may_have_seen(
    finished: tuple[RunFolder, Result], tmp_path: Path
) -> None:
    run, _ = finished
    settings, figures = run.settings(), tmp_path / "figures.json"
    checkpoint = next((run.path / "checkpoints").iterdir())
    shifts = ("--shift", ",".join(settings["shifts"]), "--turns", 1, "--json", figures)

    def seen(*options: Any) -> tuple[dict[str, int], str]:
        words = ["eval", "--model", checkpoint, *shifts, *options]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        rows = json.loads(figures.read_text())["not_held_out"]
        return {row["shift"]: row["problems"] for row in rows}, result.output

    deals, seed = int(settings["deals"]), int(settings["seed"])
    found, told = seen("--deals", deals, "--seed", seed)
    assert found == {} and "held out" not in told and "kept from" not in told
    task = get_task(settings["task"], tokenizer=load_tokenizer(checkpoint))
    kept = evaluation_keys(task, settings["shifts"], deals, seed)
    found, told = seen("--deals", 6, "--seed", seed + 1)
    right = {
        shift: sum(p.key not in kept for p in evaluation_problems(task, 6, shift=shift, seed=seed + 1))
        for shift in settings["shifts"]
    }
    assert found == {shift: count for shift, count in right.items() if count} and sum(right.values()) > 6
    line = f"{right['none']} of these 6 problems of none were not kept from the training of {checkpoint}"
    assert line in told
