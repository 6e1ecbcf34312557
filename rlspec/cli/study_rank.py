"""`rlspec study rank` for anybody's model: search the restoration that wins the most back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlspec.cli.exits import stopped
from rlspec.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from rlspec.study.repair.choice import Trial
    from rlspec.study.repair.scores import Scores

_PATH = click.Path(path_type=Path)
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@click.command("rank")
@click.option("--base", type=_PATH, required=True, help="The reference: a safetensors folder.")
@click.option("--tuned", type=_PATH, required=True, help="The fine-tuned checkpoint.")
@click.option("--out", type=_PATH, required=True, help="Folder of the search, which goes on where it was.")
@click.option("--retain", type=_PATH, help="General texts (JSON lines), whose loss is to be won back.")
@click.option("--task-data", type=_PATH, help="Task data (JSON lines), whose loss is to stay.")
@click.option("--confirm-retain", type=_PATH, help="For the confirmation.  [default: every other row]")
@click.option("--confirm-task", type=_PATH, help="For the confirmation.  [default: every other row]")
@click.option("--eval", "eval_", help="Instead: a command with {model} in it that prints scores as JSON.")
@click.option("--confirm-eval", help="The same on other data, for the confirmation.")
@click.option("--win-back", multiple=True, default=("win_back",), show_default=True, help="Name of a score.")
@click.option("--keep", multiple=True, default=("keep",), show_default=True, help="Name of a score.")
@click.option("--lower-is-better", is_flag=True, help="The scores of the command are losses.")
@click.option("--budget", default="30", show_default=True, help="Evaluations, or a time: 600s, 20m, 2h.")
@click.option("--tolerance", default=0.05, show_default=True, help="Share of the task's gain to give up.")
@click.option("--device", default="auto", show_default=True, help="Where losses are computed.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "stored"]),
    default="auto",
    show_default=True,
    help="Of losses: float32, the checkpoint's own, or auto: the checkpoint's own on a GPU.",
)
def rank_any(
    base: Path,
    tuned: Path,
    out: Path,
    retain: Path | None,
    task_data: Path | None,
    confirm_retain: Path | None,
    confirm_task: Path | None,
    eval_: str | None,
    confirm_eval: str | None,
    win_back: tuple[str, ...],
    keep: tuple[str, ...],
    lower_is_better: bool,
    budget: str,
    tolerance: float,
    device: str,
    dtype: str,
) -> None:
    """Search the restoration of TUNED that wins the most general score back for the least of the task's.

    Scores are mean token losses on --retain and --task-data, or what the --eval command prints. The table, the
    recommended setting, its confirmation on unseen data and the `rlspec restore` line that makes it are printed;
    OUT gets table.csv too."""
    evaluations, seconds = _budget(budget)
    by_loss = retain is not None and task_data is not None
    if (eval_ is not None) == by_loss or (eval_ is not None and (retain or task_data)):
        raise click.UsageError("Give either --eval, or --retain and --task-data.")
    for name, place in (("base", base), ("tuned", tuned)):
        if out.resolve().is_relative_to(place.resolve()):
            raise CheckpointError(f"--out {out} is or lies in the {name} checkpoint {place}")
    from rlspec.cli.study_rank_text import as_csv, given, lines, told
    from rlspec.io.files import write_atomically, write_error
    from rlspec.study.repair import CommandScores, LossScores, search

    scores: Scores
    if eval_ is not None:
        scores = CommandScores(
            base,
            tuned,
            eval_,
            win_back=win_back,
            keep=keep,
            beside=out,
            confirm=confirm_eval,
            lower_is_better=lower_is_better,
        )
    else:
        assert retain is not None and task_data is not None
        scores = LossScores(
            base,
            tuned,
            retain,
            task_data,
            confirm_retain=confirm_retain,
            confirm_task=confirm_task,
            device=device,
            dtype=dtype,
        )

    def on_trial(trial: Trial) -> None:
        general, task = given(trial.score, scores.sign)
        click.echo(f"{general:9.4f} {task:9.4f}   {told(trial.candidate)}", err=True)

    try:
        found = search(
            base,
            tuned,
            scores,
            out,
            evaluations=evaluations,
            seconds=seconds,
            tolerance=tolerance,
            on_trial=on_trial,
        )
    except KeyboardInterrupt as stop:
        click.echo("Stopped; the same command goes on where it was", err=True)
        raise SystemExit(stopped(stop)) from None
    for line in lines(found, base, tuned):
        click.echo(line)
    try:
        write_atomically(out / "table.csv", as_csv(found).encode())
    except OSError as error:
        raise write_error(out / "table.csv", error) from None


def _budget(text: str) -> tuple[int | None, float | None]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or (not match[2] and "." in match[1]):
        raise OptionError(f"budget={text!r} is not valid: a number of evaluations, or a time such as 20m")
    return (None, float(match[1]) * _SECONDS[match[2]]) if match[2] else (int(match[1]), None)
