"""Scores that a user's command prints for a checkpoint on disk, of which there is one at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlspec.errors import CheckpointError, OptionError
from rlspec.io.launch import staging_folder
from rlspec.restore.checkpoint import Target, run_plan
from rlspec.restore.options import RestoreOptions
from rlspec.restore.plan import plan_restore
from rlspec.study.repair.scores import Costs
from rlspec.tasks.commands import check_command, last_json, run, words_for

_MARKER = "{model}"


class CommandScores:
    """A command with ``{model}`` in it, which prints a JSON object of named scores as the last line that is one.

    Args:
        base, tuned: the checkpoints.
        command: run without a shell, in the current folder; ``{model}`` becomes the folder of a checkpoint.
        win_back, keep: names of the scores to win back and to keep; the mean counts where there are several.
        beside: the search's folder; a checkpoint to be scored lies beside it, and is removed when it is scored.
        confirm: another command, on data that the first does not see.
        lower_is_better: the scores are losses.

    Raises:
        OptionError: a command without ``{model}``.
    """

    def __init__(
        self,
        base: Path,
        tuned: Path,
        command: str,
        *,
        win_back: Sequence[str],
        keep: Sequence[str],
        beside: Path,
        confirm: str | None = None,
        lower_is_better: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        for name, given in (("eval", command), ("confirm_eval", confirm)):
            if given is not None:
                check_command(given, _MARKER, name)
        self._base, self._tuned, self._cache = base, tuned, cache_dir
        self._commands = {False: command, True: confirm}
        self._names = {"win_back": list(win_back), "keep": list(keep)}
        self.sign = 1.0 if lower_is_better else -1.0
        self._place = beside.with_name(f".{beside.name}.candidate")
        self.can_confirm, self.can_randomise = confirm is not None, False
        self.identity = f"command {json.dumps([self._commands[False], confirm, self._names, self.sign])}"

    def base(self, *, confirm: bool = False) -> Costs:
        return self._score(self._base, confirm)

    def tuned(self, *, confirm: bool = False) -> Costs:
        return self._score(self._tuned, confirm)

    def restored(self, options: RestoreOptions, *, confirm: bool = False) -> Costs:
        plan = plan_restore(self._base, self._tuned, options)
        self._remove()
        try:
            run_plan(plan, Target(self._place, self._base, self._tuned), cache_dir=self._cache)
            return self._score(self._place, confirm)
        finally:
            self._remove()

    def randomised(self, options: RestoreOptions) -> Costs:
        raise OptionError("random controls are for losses in memory")

    def _remove(self) -> None:
        """The name is the search's own: what lies there, a search that was killed has left."""
        for left in (self._place, staging_folder(self._place)[1]):
            try:
                if left.exists():
                    shutil.rmtree(left)
            except OSError as error:
                raise CheckpointError(f"{left}: cannot be removed: {error.strerror or error}") from None

    def _score(self, model: Path, confirm: bool) -> Costs:
        command = self._commands[confirm]
        assert command is not None
        ran = run(words_for(command, _MARKER, model), f"eval: {command!r}", quiet=False)
        if ran.returncode != 0:
            raise OptionError(f"eval: {command!r} ended with exit code {ran.returncode} on {model}")
        try:
            found = last_json(ran.stdout)
        except LookupError:
            raise OptionError(
                f"eval: {command!r} printed no line that is a JSON object; wanted named scores"
            ) from None
        general, task = (
            self.sign * _mean(found, names, command, kind) for kind, names in self._names.items()
        )
        return Costs(general, task)


def _mean(found: dict[str, object], names: Sequence[str], command: str, kind: str) -> float:
    values = []
    for name in names:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            told = "no such score" if name not in found else repr(value)
            raise OptionError(
                f"eval: {command!r}: {kind}={name} is {told}, wanted a finite number; it printed "
                f"{', '.join(map(str, found)) or 'nothing'}"
            )
        values.append(float(value))
    return sum(values) / len(values)
