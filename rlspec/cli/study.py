"""`rlspec study PLAN`: many runs with shared parents, into one table with statistics and a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rlspec.cli.exits import stopped
from rlspec.cli.flags import as_flags
from rlspec.cli.settings import options_of
from rlspec.cli.study_rank import rank_any
from rlspec.errors import OptionError, RlspecError
from rlspec.study.plans import StudyOptions

_TOLD = {
    "duration": "SFT of many lengths, PPO from each: what comes back, and until when.",
    "rank": "Restorations of one tuned model by rank, part, mode, modules and strength, and their controls.",
    "prevent": "Ways to train that forget less: rate, stopping, rules, KL, loss, straight line.",
    "layers": "Restorations of the first, middle and last layers.",
}


_YOURS = ("--base", "--tuned")


class _Plans(click.Group):
    """``rank`` with a base and a tuned model of the user's is the search of :mod:`rlspec.cli.study_rank`.

    Puts the options of its own commands into rlspec's errors, which the group above does not know.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:1] == ["rank"] and any(word.split("=")[0] in _YOURS for word in args):
            name, found, rest = "rank", rank_any, args[1:]
        else:
            name, found, rest = super().resolve_command(ctx, args)  # type: ignore[assignment]
        ctx.meta[__name__] = found
        return name, found, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RlspecError as error:
            error.args = (as_flags(str(error), ctx.meta.get(__name__) or self),)
            raise


@click.group(
    "study", cls=_Plans, short_help="Run a plan of many runs, resumably; a table, statistics, a page."
)
def command() -> None:
    """Run all cells of a plan, those that are missing. The same command goes on where it was stopped.

    Plans run on the model that comes with rlspec. For a model of yours, with any scores: `rlspec study rank --base B
    --tuned T --out DIR`, see `rlspec study rank --base B --help`.
    """


def _plan(name: str, told: str) -> click.Command:
    more = " For a model of yours: --base B --tuned T, and then --help." if name == "rank" else ""

    @click.command(
        name, short_help=told, help=f"{told}{more}\n\nThe same command goes on where it was stopped."
    )
    @click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the study.")
    @options_of(StudyOptions)
    @click.option(
        "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Cells run at once."
    )
    @click.option(
        "--threads", type=click.IntRange(min=1), help="CPU threads of each.  [default: a fair share]"
    )
    @click.option(
        "--executor",
        type=click.Choice(["local", "slurm"]),
        default="local",
        show_default=True,
        help="Where cells run: this machine, or a Slurm cluster.",
    )
    @click.option(
        "--slurm",
        "slurm",
        multiple=True,
        metavar="NAME=VALUE",
        help="For its jobs, as in partition=cpu; several with commas or as further --slurm.",
    )
    def run(
        out: Path,
        workers: int,
        threads: int | None,
        executor: str,
        slurm: tuple[str, ...],
        seeds: str,
        **settings: Any,
    ) -> None:
        from rlspec.study.job import Places, run_plan

        options = StudyOptions(seeds=seeds, **settings)
        places = Places(executor=executor, workers=workers, threads=threads, slurm=_pairs(slurm))
        try:
            for line in run_plan(name, options, _seeds(seeds), out, places):
                click.echo(line)
        except KeyboardInterrupt as stop:
            click.echo("Stopped; what is finished is kept. To go on: the same command", err=True)
            raise SystemExit(stopped(stop)) from None

    return run


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise OptionError(f"seeds={text!r} must be whole numbers with commas between them, as in 0,1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if not name or not value:
                raise OptionError(f"slurm={text!r} must be name=value, with commas between them")
            if name in pairs:
                raise OptionError(f"slurm={name}={value}: {name} is given twice, {pairs[name]} before")
            pairs[name] = value
    return pairs


for _name, _text in _TOLD.items():
    command.add_command(_plan(_name, _text))
