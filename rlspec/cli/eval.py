"""`rlspec eval`: success rates of a checkpoint on fixed problems, alone or against a second one."""

from __future__ import annotations

from pathlib import Path

import click

from rlspec.run.config import TrackConfig
from rlspec.run.values import split_names

_DEFAULTS = TrackConfig()


@click.command("eval", short_help="Evaluate a checkpoint, or compare two on the same deals.")
@click.option(
    "--model", default=_DEFAULTS.model, show_default=True, help="A Hugging Face folder, or embedded."
)
@click.option("--compare", help="A second folder, evaluated on the same deals (McNemar test per shift).")
@click.option("--task", default=_DEFAULTS.task, show_default=True, help="Task to evaluate on.")
@click.option(
    "--shift",
    "shifts",
    default=",".join(_DEFAULTS.shifts),
    show_default=True,
    help="Shifts, separated by commas: none (in distribution), rule, cards, both, target.",
)
@click.option("--deals", default=_DEFAULTS.deals, show_default=True, help="Problems per shift.")
@click.option("--turns", default=_DEFAULTS.turns, show_default=True, help="Verification turns per episode.")
@click.option("--seed", default=_DEFAULTS.seed, show_default=True, help="Seed of problems and sampling.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--device", default=_DEFAULTS.device, show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
def command(
    model: str,
    compare: str | None,
    task: str,
    shifts: str,
    deals: int,
    turns: int,
    seed: int,
    json_file: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Let a checkpoint solve DEALS problems per shift; print the share solved and its 95 %
    Wilson interval."""
    # The same checks as a run's settings.
    config = TrackConfig(
        model=model,
        task=task,
        shifts=split_names(shifts),
        deals=deals,
        turns=turns,
        seed=seed,
        device=device,
        threads=threads,
    )
    from rlspec.jobs.eval import evaluate_models, evaluation_lines

    result = evaluate_models(config, compare=compare, json_file=json_file)
    for line in evaluation_lines(result):
        click.echo(line)
