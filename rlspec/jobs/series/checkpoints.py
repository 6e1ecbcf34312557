"""Which checkpoints are meant by the paths given, in which order, and whether they are whole."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rlspec.errors import CheckpointError
from rlspec.io.adapter import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE, Adapter, check_weights, is_adapter
from rlspec.io.files import told_apart
from rlspec.io.index import (
    INDEX_FILE,
    METADATA_FILE,
    SINGLE_FILE,
    CheckpointIndex,
    distributed_format,
    distributed_places,
    foreign_files,
    is_distributed,
)
from rlspec.io.weights import Weights, open_weights
from rlspec.jobs.series.adapted import AdaptedWeights
from rlspec.jobs.series.result import BASE_LABEL
from rlspec.run.segments import STAGES, STEP_INSIDE, STEP_LAST, branch_origin

# What accelerate and verl put below the folder that bears the step, with torch.distributed.checkpoint.
_PART = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+|dist_ckpt")
# Where verl puts the weights below the folder that bears the step.
_INNER = ("actor/huggingface", "actor")
# Pickled models, which are told of: transformers', and accelerate's of FSDP.
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp.bin")

#: name of a file -> its size in bytes and when it was last changed, in nanoseconds
Files = dict[str, list[int]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, file or LoRA adapter on disk."""

    path: Path
    called: Path  #: absolute, links in it kept: what its name, step and order come from
    stage: str  #: "sft", "ppo" or "restore" where the name is one of `rlspec track`, else ""
    step: int | None  #: the number at the end of the name, or after "checkpoint", "step" and their like in it
    origin: int = -1  #: the SFT step that a branch of `rlspec track` is named after, else -1

    @classmethod
    def at(cls, path: Path, called: Path | None = None) -> Checkpoint:
        """A checkpoint by its path; ``called`` where that is not what it is known by."""
        if called is None:
            called = Path(os.path.abspath(path))
            if _step_in(called) is None:
                called = _beside(called) or called
        name = _named(called).name.removesuffix(".safetensors")
        step = _step_in(called)
        match = STEP_LAST.fullmatch(name)
        origin = None if match is None else branch_origin(match[1] or "")
        if origin is not None:
            return cls(path, called, "ppo", step, origin)
        return cls(path, called, match[1] if match is not None and match[1] in STAGES else "", step)

    def open(self, base: Path) -> Weights:
        """Its weights, those of an adapter on top of the base's.

        Raises:
            CheckpointError: it is not whole, is malformed or of a format that is not read, or is no adapter of that base.
        """
        if not is_adapter(self.path):
            return open_weights(self.path)
        index = CheckpointIndex.open(base)
        return AdaptedWeights(base, Adapter.open(self.path, index))

    def files(self) -> Files:
        """What tells whether it was written anew: the files that weights are read from.

        Raises:
            CheckpointError: it is not whole.
        """
        if is_adapter(self.path):
            check_weights(self.path)
            paths = {self.path / CONFIG_FILE, self.path / WEIGHTS_FILE}
        elif places := distributed_places(self.path):
            paths = {place / METADATA_FILE for place in places}.union(
                *(place.glob("*.distcp") for place in places)
            )
        else:
            index = CheckpointIndex.open(self.path)
            paths = {entry.shard for entry in index.tensors.values()}
            if self.path.is_dir():
                paths |= {self.path / name for name in (INDEX_FILE, "config.json")}
        return self._states(paths)

    def pickles(self) -> Files:
        """The files of a pickled model or adapter; none where there is a file of safetensors too."""
        if not self.path.is_dir() or next(self.path.glob("*.safetensors"), None) is not None:
            return {}
        names = (PICKLED_FILE, "pytorch_model*.bin")
        return self._states({path for name in names for path in self.path.glob(name)})

    def _states(self, paths: Iterable[Path]) -> Files:
        found: Files = {}
        for path in sorted(paths):
            try:
                state = path.stat()
            except FileNotFoundError:
                if path.name in (INDEX_FILE, "config.json"):
                    continue
                raise CheckpointError(f"{path}: missing") from None
            root = self.path if self.path.is_dir() else self.path.parent
            found[str(path.relative_to(root))] = [state.st_size, state.st_mtime_ns]
        return found


def find_checkpoints(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """The checkpoints given, and those in the folders given, in the order of their steps.

    A folder stands for the checkpoints right below it, and for itself where it is one, which then comes last. Those of
    one folder are ordered by stage and step, the ones without a number after them; folders come in the order given.

    Raises:
        CheckpointError: nothing at a path, or no checkpoint in it.
    """
    found: list[Checkpoint] = []
    for path in map(Path, paths):
        below = checkpoints_below(path)
        if path.is_file() or _has_weights(path):
            below.append(Checkpoint.at(path))
        if not below:
            CheckpointIndex.open(path)  # which knows what to say of most things
            raise CheckpointError(f"{path}: no checkpoint in it")
        found += below
    return in_order(_once(found))


def checkpoints_below(folder: Path) -> list[Checkpoint]:
    """The checkpoints right below a folder, whole or not, in the order of their steps."""
    if not folder.is_dir():
        return []
    folders = (path for path in sorted(folder.iterdir()) if path.is_dir() and not _is_part(path))
    places = map(_weights_in, folders)
    return in_order(_once(Checkpoint.at(path) for path in places if path is not None))


def foreign_below(folder: Path) -> Iterator[tuple[Path, Files, str]]:
    """Models in formats that are not read, in a folder and right below it, but not beside weights that are.

    Yields:
        One of each folder and format: where it lies and how its files are called, the first of them, and what to say.
    """
    for place in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
        if _is_checkpoint(place) or next(place.glob("*.safetensors"), None) is not None:
            continue
        for path, told in foreign_files(place).items():
            with suppress(FileNotFoundError):  # one vanished
                state = path.stat()
                yield place / f"*{path.suffix}", {path.name: [state.st_size, state.st_mtime_ns]}, told


def in_order(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """By folder in the order of their first ones, there by stage, branch and step; the unnumbered stay in their order."""
    checkpoints = list(checkpoints)
    parents = {
        parent: i for i, parent in reversed(list(enumerate(_named(c.called).parent for c in checkpoints)))
    }

    def key(checkpoint: Checkpoint) -> tuple[int, int, int, float]:
        stage = STAGES.index(checkpoint.stage) if checkpoint.stage else -1
        step = float("inf") if checkpoint.step is None else checkpoint.step
        return parents[_named(checkpoint.called).parent], stage, checkpoint.origin, step

    return sorted(checkpoints, key=key)


def labels(checkpoints: Sequence[Checkpoint], known: Mapping[str, Path] | None = None) -> list[str]:
    """What rows call each: the end of its path that tells it from the others, and from those known before.

    Labels of one training differ by their step alone, and those of two by more: where a checkpoint has a step, its label
    begins with the folder that bears it, after as much of what is above as tells that folder's place from all others
    with such checkpoints.

    Args:
        known: the labels of those known before, which stay, and what they are called (:attr:`Checkpoint.called`).
    """
    known = known or {}
    starts = {
        place: label.removesuffix(end)
        for label, called in known.items()
        for place, end in [_placed(called)]
        if _step_in(called) is not None and label.endswith(end)
    }
    numbered = [None if one.step is None else _placed(one.called) for one in checkpoints]
    new = [placed[0] for placed in numbered if placed is not None and placed[0] not in starts]
    starts |= _told_apart_places(list(dict.fromkeys(new)), list(starts), set(starts.values()))
    found = [None if placed is None else starts[placed[0]] + placed[1] for placed in numbered]
    taken = {BASE_LABEL, *known, *filter(None, found)}
    others = told_apart([one.called for one in checkpoints], known.values(), taken)
    return [other if label is None or label in known else label for label, other in zip(found, others)]


def _placed(called: Path) -> tuple[Path, str]:
    """The folder that a training's checkpoints are in, and the rest of the path of this one."""
    place = _named(called).parent
    return place, str(called.relative_to(place))


def _told_apart_places(
    places: Sequence[Path], known: Sequence[Path], taken: Container[str]
) -> dict[Path, str]:
    """What labels of checkpoints in each place begin with: nothing, where it is the only one."""
    if len(places) == 1 and not known:
        return {places[0]: ""}
    starts: dict[Path, str] = {}
    for place in places:
        others = [other.parts for other in (*places, *known) if other != place]
        for length in range(1, len(place.parts) + 1):
            end = place.parts[-length:]
            start = os.path.join(*end, "")
            if start not in taken and all(other[-length:] != end for other in others):
                break
        starts[place] = start
    return starts


def difference(before: Files, now: Files) -> str:
    """What to say of files that are not as they were, sizes before times; "" where all are."""
    for name in sorted({*before, *now}):
        if name not in now or name not in before:
            return f"{name} is {'gone' if name in before else 'new'}"
        if now[name][0] != before[name][0]:
            return f"{name} has {now[name][0]} bytes, had {before[name][0]}"
    if not (touched := [name for name in sorted(now) if now[name] != before[name]]):
        return ""
    seconds, rest = divmod(before[touched[0]][1], 10**9)
    when = f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
    more = f" and of {len(touched) - 1} more" if len(touched) > 1 else ""
    return (
        f"only the time of {touched[0]}{more} is another: cp -p and rsync -t keep times, and touch -d "
        f"{when} gives that file, where it is the same, its time back"
    )


def _once(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Each place on disk once, by the path that bears a step where one does, and by its own sooner than by a link."""
    found: dict[Path, Checkpoint] = {}
    for checkpoint in checkpoints:
        place = checkpoint.path.resolve()
        found[place] = min(
            (found.get(place, checkpoint), checkpoint),
            key=lambda one: (one.step is None, one.called != place),
        )
    return list(found.values())


def _beside(path: Path) -> Path | None:
    """What a link leads to in its own folder, as ``latest`` does to ``checkpoint-500``; None for all else."""
    if not path.is_symlink():
        return None
    leads_to = Path(os.path.normpath(path.parent / os.readlink(path)))
    return leads_to if leads_to.parent == path.parent else None


def _step_in(called: Path) -> int | None:
    name = _named(called).name.removesuffix(".safetensors")
    if (match := STEP_LAST.fullmatch(name)) is not None:
        return int(match[2])
    return None if (match := STEP_INSIDE.fullmatch(name)) is None else int(match[1])


def _named(path: Path) -> Path:
    """The folder or file that bears the checkpoint's name."""
    named = path.parent if path.name == SINGLE_FILE else path
    while named.name in ("huggingface", "actor") or _is_part(named):
        named = named.parent
    return named


def _is_part(folder: Path) -> bool:
    return _PART.fullmatch(folder.name) is not None and is_distributed(folder)


def _weights_in(folder: Path) -> Path | None:
    """The folder itself, or the one below it that holds the weights; None where there are none."""
    places = (folder, *(folder / inner for inner in _INNER))
    return next((place for place in places if _is_checkpoint(place)), None)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds weights of any format; those that are not read are told of, not passed over."""
    return _has_weights(folder) or distributed_format(folder) is not None


def _has_weights(folder: Path) -> bool:
    names = (SINGLE_FILE, INDEX_FILE, CONFIG_FILE, *_PICKLES)
    return any((folder / name).exists() for name in names) or bool(distributed_places(folder))
