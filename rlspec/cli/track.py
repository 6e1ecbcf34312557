"""`rlspec track`: train a model and track its weights' spectra, into one run folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from rlspec.cli.exits import stopped
from rlspec.cli.flags import flag
from rlspec.run.config import TrackConfig, read_config_file

_DEFAULTS = TrackConfig()


def _setting(name: str, kind: Any, text: str, default: str | None = None) -> Any:
    """An option for one setting. Its click default is None, to tell whether the flag was given."""
    if default is None:
        value = getattr(_DEFAULTS, name)
        default = ",".join(value) if isinstance(value, tuple) else str(value)
    return click.option(
        flag(name), name, type=kind, default=None, help=f"{text}  [default: {default}]", show_default=False
    )


@click.command("track", short_help="Train (SFT, then PPO), track the spectra, write a report.")
@_setting("every", int, "Measure each N SFT steps.")
@_setting("ppo_every", int, "Measure each N PPO updates.")
@_setting("model", str, "A Hugging Face folder, or the model that comes with rlspec.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/track-<date-time>]")
@_setting("task", str, "Task to train on.")
@_setting("stages", str, "Stages to run.")
@_setting("sft_steps", int, "SFT optimizer steps.")
@_setting("batch_size", int, "SFT examples per step.")
@_setting(
    "micro_batch_size",
    int,
    "Rows of one training forward pass (memory).",
    "64 for the embedded model, else 4; PPO 2",
)
@_setting(
    "learning_rate",
    float,
    "SFT learning rate.",
    f"{_DEFAULTS.learning_rate} for the embedded model, else 1e-06",
)
@_setting("ppo_updates", int, "PPO updates, one batch of rollouts each.")
@_setting("turns_per_update", int, "Answers sampled per PPO update.")
@_setting(
    "ppo_learning_rate",
    float,
    "PPO learning rate.",
    f"{_DEFAULTS.ppo_learning_rate} for the embedded model, else 1e-06",
)
@_setting(
    "ppo_from",
    str,
    "SFT steps to start PPO from, a branch each, as in 100,300.",
    f"{','.join(map(str, _DEFAULTS.ppo_from or ()))} for the embedded model, else the last",
)
@_setting(
    "rank",
    str,
    "Directions tracked: a share of each matrix's smaller side (1.0 is all), or a count (1 is one).",
)
@_setting("modules", str, "Matrices tracked: q, k, v, o, mlp, embed, lm_head.")
@_setting("engine", str, "How spectra are computed: delta (fast) or exact (full decompositions).")
@_setting("shifts", str, "Evaluations; none is in distribution.")
@_setting("deals", int, "Evaluation problems per shift.")
@_setting("turns", int, "Verification turns per evaluation episode.")
@_setting("checkpoint_every", int, "Keep a checkpoint each N steps or updates only.", "at each measurement")
@_setting("seed", int, "Seed of data, sampling and evaluation.")
@_setting("device", str, "cpu, cuda, cuda:1, …", "cuda if there is one")
@_setting("dtype", str, "float32, or bf16 for autocast.", "bf16 on CUDA, float32 on CPU")
@_setting("threads", int, "CPU threads.", "torch's choice")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of settings; flags win."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out with its own settings.")
def command(out: Path | None, config_file: Path | None, resume: bool, **flags: Any) -> None:
    """Train a model on a task, SFT first and PPO from one or more of its steps, and track how its weights' singular
    values and singular vectors move against the start. Leaves a run folder with report.html; Ctrl-C or SIGTERM
    leaves one that --resume continues."""
    given = {name: value for name, value in flags.items() if value is not None}
    from_file = read_config_file(config_file) if config_file else {}

    from rlspec.run.settings import resolve_settings

    config = resolve_settings(given, from_file, config_file=config_file, out=out, resume=resume)

    from rlspec.jobs.track import Interrupted, run_track

    try:
        run_track(config, out, resume=resume)
    except Interrupted as interrupted:
        again = f"rlspec track --resume --out {shlex.quote(str(interrupted.folder))}"
        click.echo(f"Stopped; the run is saved. To continue it: {again}", err=True)
        assert isinstance(interrupted.__cause__, KeyboardInterrupt)
        raise SystemExit(stopped(interrupted.__cause__)) from None
