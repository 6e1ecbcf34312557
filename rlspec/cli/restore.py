"""`rlspec restore`: put a base model's singular directions back into a fine-tuned checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlspec.cli.exits import stopped
from rlspec.cli.launched import Told, first_tells
from rlspec.cli.settings import options_of
from rlspec.errors import CheckpointError
from rlspec.restore.options import RestoreOptions

if TYPE_CHECKING:
    from rlspec.io.share import Share
    from rlspec.restore.plan import Plan, Step
    from rlspec.restore.target import Target

_FOLDER = click.Path(path_type=Path)


@click.command("restore", short_help="Put a base's singular directions back into a tuned checkpoint.")
@click.option("--base", type=_FOLDER, required=True, help="The reference: a safetensors folder or file.")
@click.option(
    "--tuned",
    type=_FOLDER,
    required=True,
    help="The fine-tuned checkpoint: safetensors, a LoRA adapter on the base, or FSDP's of torch.distributed.checkpoint.",
)
@click.option("--out", type=_FOLDER, help="Folder to write.  [required unless --dry-run]")
@options_of(RestoreOptions)
@click.option(
    "--memory-gib", default=2.0, show_default=True, help="Memory for tensors and decompositions, GiB."
)
@click.option("--resume", is_flag=True, help="Finish an interrupted restoration of the same inputs.")
@click.option("--overwrite", is_flag=True, help="Replace --out where it exists.")
@click.option("--dry-run", is_flag=True, help="Print what would happen to every tensor; write nothing.")
@click.option(
    "--report", "report_file", type=_FOLDER, help="Write figures for every matrix to this file (JSON)."
)
def command(
    base: Path,
    tuned: Path,
    out: Path | None,
    memory_gib: float,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    report_file: Path | None,
    **settings: Any,
) -> None:
    """Write OUT: the tuned checkpoint with the base's leading singular directions back in its matrices.

    The tuned singular values stay. What is not restored, tokenizer and configuration included, is copied. OUT
    appears when it is complete; an interrupted restoration goes on with --resume. Several processes share the shards of
    OUT, each with the memory of --memory-gib: `torchrun --nproc-per-node 4 -m rlspec restore ...`, on several machines
    too where all see one file system."""
    from rlspec.io.share import Share
    from rlspec.restore.plan import plan_restore

    share = Share.of_launch()
    if dry_run:
        if share.number == 0:
            from rlspec.cli.restore_text import plan_lines

            for line in plan_lines(plan_restore(base, tuned, RestoreOptions(**settings)), memory_gib):
                click.echo(line)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    from rlspec.io.launch import launch_file
    from rlspec.restore.target import Target

    with first_tells(share, lambda: launch_file(out)) as told:
        options = RestoreOptions(**settings)
        target = Target(out, base, tuned, resume=resume, overwrite=overwrite)
        _check_report_file(report_file, base, tuned, out)
        _run(plan_restore(base, tuned, options), target, memory_gib, report_file, share, told)


def _run(
    plan: Plan, target: Target, memory_gib: float, report_file: Path | None, share: Share, told: Told
) -> None:
    from rlspec.cli.restore_text import Bar, idle_lines, passed_over_lines, report_lines, unmatched_lines
    from rlspec.io.launch import ToldByFirstError, staging_folder
    from rlspec.restore.checkpoint import run_plan

    first = share.number == 0
    before = _identity(target.out)
    notes = (*plan.notes, *unmatched_lines(plan), *passed_over_lines(plan), *idle_lines(plan, share.count))
    for line in notes if first else ():
        click.echo(line, err=True)
    bar = Bar()

    def begin(steps: list[Step]) -> None:
        told.joined = True
        if first:
            bar.begin(steps)

    try:
        report = run_plan(
            plan,
            target,
            memory_gib=memory_gib,
            on_begin=begin,
            on_step=bar.step,
            on_commit=bar.finishing,
            share=share,
        )
    except KeyboardInterrupt as stop:
        bar.close()
        if first:
            click.echo(f"Stopped; {_state(target, before)}", err=True)
        raise SystemExit(stopped(stop)) from None
    except CheckpointError as error:
        if (
            not told.joined
            or isinstance(error, ToldByFirstError)
            or not staging_folder(target.out)[1].exists()
        ):
            raise
        taken = os.path.lexists(target.out) and not target.overwrite
        when = f"once {target.out} is moved away, " if taken else ""
        raise CheckpointError(
            f"{error}; what is finished is kept, {when}the same command with --resume goes on"
        ) from None
    finally:
        bar.close()
    if not first:
        return
    if report_file is not None:
        report.write(report_file)
    for line in report_lines(report):
        click.echo(line)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _state(target: Target, before: tuple[int, int] | None) -> str:
    """How things stand where an interrupt has come, which may be a moment too late."""
    now = _identity(target.out)
    if now is not None and now != before:
        return f"{target.out} was complete before"
    untouched = f"nothing is at {target.out} yet" if now is None else f"{target.out} is as it was"
    return f"{untouched}. To finish it: the same command with --resume"


def _check_report_file(path: Path | None, base: Path, tuned: Path, out: Path) -> None:
    """Refuse what could not be written, or must not be, before the work and not after it."""
    if path is None:
        return
    place = path.resolve()
    for source in (base, tuned):
        if place.is_relative_to(source.resolve()):
            raise CheckpointError(f"--report {path} is or lies in {source}; inputs are never written")
    if place.is_relative_to(out.resolve()):
        raise CheckpointError(f"--report {path} is or lies in --out {out}; choose a place beside it")
    if path.is_dir():
        raise CheckpointError(f"--report {path} is a folder")
    if not path.parent.is_dir():
        raise CheckpointError(f"--report {path}: no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CheckpointError(f"--report {path}: no permission to write there")
