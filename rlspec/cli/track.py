"""`rlspec track`: train a model and track its weights' spectra, into one run folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from rlspec.cli.exits import stopped
from rlspec.cli.settings import HeadedCommand, options_for
from rlspec.run.config import FURTHER, OWN
from rlspec.run.values import read_config_file

_EXAMPLE = """\b
A file for --config holds any of these settings, by name:
  model: path/to/hf-model
  sft-steps: 1000
  ppo-from: [100, 1000]
  advantages: grpo
"""


@click.command(
    "track",
    cls=HeadedCommand,
    short_help="Train (SFT, then PPO), track the spectra, write a report.",
    epilog=_EXAMPLE,
)
@options_for([*OWN, *FURTHER], only_given=True)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/track-<date-time>]")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings; flags win."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings.")
def command(out: Path | None, config_file: Path | None, resume: bool, **flags: Any) -> None:
    """Train a model on a task and track how its weights' singular values and singular vectors move against the start.

    Supervised fine-tuning (SFT) comes first, then reinforcement learning (PPO, or GRPO and RLOO by --advantages) from
    one or more of its steps, then a restoration of SFT's end from the start (the small model's own runs; others if
    --stages names it). Leaves a run folder with report.html; Ctrl-C or SIGTERM leaves one that --resume
    continues. Without options it trains the small model that comes with rlspec, some minutes on a CPU."""
    given = {name: value for name, value in flags.items() if value is not None}
    from_file = read_config_file(config_file) if config_file else {}

    from rlspec.run.settings import resolve_settings

    config = resolve_settings(given, from_file, config_file=config_file, out=out, resume=resume)

    from rlspec.jobs.track import Interrupted, run_track

    stages = None
    if config.trainer == "trl":
        from rlspec.integrations.trl import trl_stages

        stages = trl_stages(config)
    try:
        run_track(config, out, resume=resume, stages=stages)
    except Interrupted as interrupted:
        again = f"rlspec track --resume --out {shlex.quote(str(interrupted.folder))}"
        click.echo(f"Stopped; the run is saved. To continue it: {again}", err=True)
        assert isinstance(interrupted.__cause__, KeyboardInterrupt)
        raise SystemExit(stopped(interrupted.__cause__)) from None
