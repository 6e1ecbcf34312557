"""`rlspec measure`: the spectra of checkpoints on disk against their base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rlspec.cli.exits import stopped
from rlspec.cli.launched import Told, first_tells
from rlspec.errors import OptionError

if TYPE_CHECKING:
    from rlspec.cli.measure_scores import Scoring
    from rlspec.io.share import Share
    from rlspec.jobs.series import Series

_FOLDER = click.Path(path_type=Path)


@click.command("measure", short_help="Measure checkpoints on disk against their base.")
@click.argument("checkpoints", nargs=-1, required=True, type=_FOLDER)
@click.option("--base", type=_FOLDER, required=True, help="The reference: a safetensors folder or file.")
@click.option("--out", type=_FOLDER, required=True, help="Folder for spectra.jsonl; what is there goes on.")
@click.option(
    "--modules", default="q,k,v", show_default=True, help="Matrices: q, k, v, o, mlp, embed, lm_head."
)
@click.option(
    "--rank",
    default="0.2",
    show_default=True,
    help="Directions of each matrix: a share (1.0 is all), a count (1 is one), energy:0.9 or gap:0.2.",
)
@click.option("--per-head", is_flag=True, help="Measure each attention head of q, k, v and o by itself.")
@click.option(
    "--engine",
    default="delta",
    show_default=True,
    help="delta (fast, with bounds) or exact (full decompositions).",
)
@click.option(
    "--null-draws",
    default=0,
    show_default=True,
    help="Random updates of the same norm that each rotation is compared with.",
)
@click.option(
    "--full-spectrum",
    is_flag=True,
    help="Take every singular value, for the power law of the spectrum's tail (alpha).",
)
@click.option(
    "--locking",
    is_flag=True,
    help="Say of each checkpoint how much of its leading subspaces is that of the last one.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--memory-gib", default=4.0, show_default=True, help="Memory for tensors and decompositions, GiB."
)
@click.option(
    "--csv",
    "table",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rows as comma-separated values to this file, too, and scores beside it (NAME-scores.csv).",
)
@click.option(
    "--eval",
    "evaluate",
    metavar="CMD",
    help='Command that scores {checkpoint} and prints JSON, such as {"ood": [true, false]}.',
)
@click.option("--texts", type=_FOLDER, help="JSONL of texts; their token loss is a score, base included.")
@click.option(
    "--prompts",
    type=_FOLDER,
    help="JSONL of prompts, with or without answers; the KL divergence from the base on them is a score.",
)
@click.option(
    "--alarm", metavar="SCORE", help="Tell the checkpoint to go back to once SCORE fell from its peak."
)
@click.option("--watch", is_flag=True, help="Go on with the checkpoints that appear, until Ctrl-C.")
def command(
    checkpoints: tuple[Path, ...],
    base: Path,
    out: Path,
    table: Path | None,
    watch: bool,
    evaluate: str | None,
    texts: Path | None,
    prompts: Path | None,
    alarm: str | None,
    **settings: Any,
) -> None:
    """Measure CHECKPOINTS against the base, one matrix at a time: safetensors, LoRA adapters, FSDP's of
    torch.distributed.checkpoint, or folders of those.

    Leaves a row for each checkpoint and matrix in OUT/spectra.jsonl, and for each score in OUT/scores.jsonl, and prints
    a table of means. What the table holds is not measured again; an interrupted command goes on when it is given again.
    Several processes share the work: `torchrun --nproc-per-node 4 -m rlspec measure ...`, on several machines too where
    all see one file system."""
    from rlspec.io.share import Share

    share = Share.of_launch()
    with first_tells(share, lambda: _launch_file(out)) as told:
        _check(out, table, watch, settings["locking"], share)
        from rlspec.cli.measure_scores import Scoring
        from rlspec.jobs.series.scores import Scorer

        scorer = Scorer(
            base,
            out,
            evaluate=evaluate,
            texts=texts,
            prompts=prompts,
            alarm=alarm,
            device=settings["device"],
        )
        scoring = Scoring(scorer, alarm, table)
        if watch:
            _watch(checkpoints, base, out, table, scoring, settings)
        else:
            scorer.check(checkpoints)
            _measure(checkpoints, base, out, table, scoring, settings, share, told)


def _launch_file(out: Path) -> Path:
    from rlspec.jobs.series.parts import launch_file

    return launch_file(out)


def _check(out: Path, table: Path | None, watch: bool, locking: bool, share: Share) -> None:
    """Refuse before the work what would fail after it."""
    if table is not None and not table.parent.is_dir() and table.parent.resolve() != out.resolve():
        raise OptionError(f"table={str(table)!r}: no such folder as {table.parent}")
    if watch and locking:
        raise OptionError(
            "watch=True follows a series that has no last checkpoint yet for locking=True to compare with: give the "
            "command again without it"
        )
    if watch and share.count > 1:
        raise OptionError("watch=True is for one process; start it without torchrun")


def _measure(
    checkpoints: tuple[Path, ...],
    base: Path,
    out: Path,
    table: Path | None,
    scoring: Scoring,
    settings: dict[str, Any],
    share: Share,
    told: Told,
) -> None:
    from rlspec.cli.measure_text import Bar, heading, series_lines
    from rlspec.jobs.series.job import Job

    first = share.number == 0
    bar = Bar()

    def on_matrix(done: int, total: int, label: str, name: str) -> None:
        told.joined = True
        if first:
            bar(done, total, label, name)

    job = None
    try:
        job = Job.open(base, out=out, share=share, **settings)
        series = job.series(checkpoints, on_matrix)
        if not first:
            return
        bar.close()
        if table is not None:
            series.to_csv(table)
        for line in (*series_lines(series), heading()):
            click.echo(line)
        for line in scoring.lines(series, _pass_over):
            click.echo(line)
        if scoring.failures:
            raise OptionError(
                f"scores that lack, for the reasons above: {scoring.failures}; the same command takes them again"
            )
    except KeyboardInterrupt as stop:
        bar.close()
        _stopped(stop, tell=first)
    finally:
        bar.close()
        if job is not None:
            job.table.close()


def _pass_over(message: str) -> None:
    click.echo(f"passed over: {message}", err=True)


def _stopped(stop: KeyboardInterrupt, *, tell: bool) -> NoReturn:
    if tell:
        click.echo("Stopped; what is measured is kept, the same command goes on", err=True)
    raise SystemExit(stopped(stop)) from None


def _watch(
    paths: tuple[Path, ...],
    base: Path,
    out: Path,
    table: Path | None,
    scoring: Scoring,
    settings: dict[str, Any],
) -> None:
    from rlspec.cli.measure_text import Bar, series_lines
    from rlspec.jobs.series.job import Job
    from rlspec.jobs.series.watch import watch

    bar = Bar()

    def warn(message: str) -> None:
        bar.close()
        _pass_over(message)

    def tell(series: Series, added: Sequence[str]) -> None:
        bar.close()
        if table is not None:
            series.to_csv(table)
        for line in series_lines(spectra for spectra in series if spectra.checkpoint in added):
            click.echo(line)
        for line in scoring.news(series, warn):
            click.echo(line)

    job = None
    try:
        job = Job.open(base, out=out, **settings)
        if before := job.table.series():
            tell(before, [])  # which an earlier command may have left without scores
        for added in watch(job, paths, on_matrix=bar, warn=warn):
            tell(job.table.series(), added)
    except KeyboardInterrupt as stop:
        bar.close()
        _stopped(stop, tell=True)
    finally:
        bar.close()
        if job is not None:
            job.table.close()
