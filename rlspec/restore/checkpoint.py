"""Restoring a whole checkpoint on disk: bounded memory, one tensor at a time, atomic and resumable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlspec.errors import CheckpointError, RlspecError, TensorError, check_type
from rlspec.io.files import read_error
from rlspec.io.index import METADATA_FILE
from rlspec.io.launch import ChangedInputsError
from rlspec.io.share import ALONE, Share
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import RankLike
from rlspec.restore.dealt import shard_owners
from rlspec.restore.estimate import check_memory, memory_bytes, pool_bytes, streamed_by_rows
from rlspec.restore.options import Dtype, RestoreOptions, Rounding
from rlspec.restore.plan import Plan, Step, plan_restore
from rlspec.restore.report import Journal, MatrixReport, RestoreReport
from rlspec.restore.target import Target
from rlspec.restore.tensors import (
    Block,
    Changes,
    merged,
    restore_rows,
    unchanged,
)
from rlspec.restore.whole import file_named, restore_whole

if TYPE_CHECKING:
    from rlspec.io.writer import CheckpointWriter


def restore_checkpoint(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: RankLike = 0.2,
    part: str = "top",
    mode: str = "directions",
    strength: float = 1.0,
    modules: str | Iterable[str] = "q,k,v",
    layers: str | None = None,
    dtype: Dtype = "keep",
    rounding: Rounding = "nearest",
    seed: int = 0,
    exact: bool = False,
    device: str = "auto",
    memory_gib: float = 2.0,
    resume: bool = False,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    share: Share | None = None,
) -> RestoreReport:
    """Write a checkpoint whose matrices are the tuned ones with the base's directions (or values) put back.

    The output has the files, names, dtypes and metadata of the tuned checkpoint; tensors that are not restored and
    all other files are copied. Where an adapter trains one of a tied embedding and head, the output stores both, and its
    config.json says that they are not tied; a stored copy of a tied head is written as the embedding is. Weights in
    scaled fp8 are restored as the numbers that they stand for and stored in the same scheme, rounded to it. The output
    appears under its name when it is complete; what an interrupted call leaves beside it, ``resume`` finishes to the
    same bytes, and what no call could finish is removed.

    Args:
        base: safetensors checkpoint, a folder in the layout of Hugging Face or a file.
        tuned: the same; or the folder of a LoRA adapter of PEFT trained on ``base``, or one that
            torch.distributed.checkpoint wrote, as FSDP trainings leave them: both give a full checkpoint, with the files,
            the other files and the metadata of the base. Of the second the dtypes are its own.
        out: folder to make; must not be, hold or lie in one of the inputs.
        rank, part, mode, strength, modules, layers, dtype, rounding, seed, exact, device: see
            :class:`rlspec.restore.RestoreOptions`.
        memory_gib: bound on the memory used for tensors and decompositions, beyond the interpreter's own; of each
            process.
        resume: go on with an interrupted call of the same inputs and settings. Without, what such a call has finished
            is not thrown away: an error says where it lies.
        overwrite: replace ``out`` where it exists.
        cache_dir: of the base's decompositions; default ``$RLSPEC_CACHE`` or ``~/.cache/rlspec``.
        share: which process this is of several that call this with the same arguments, each for its shards of the
            output, on one file system. The bytes are those of one process with as many threads. The first one ends when
            the output has its name, and whatever fails in one of them ends all. None is one process.

    Returns:
        What was done to each matrix, and why the others were left; of all but the first of several processes, what was
        done by that one.

    Raises:
        CheckpointError: inputs that cannot be read, are quantised in a form that is not known, or do not belong
            together; an input that changed meanwhile; an output that exists or cannot be written; another process that
            has failed or was killed (ToldByFirstError in those that are not the first, which has the reason).
        OptionError: a setting that does not exist or is out of range; memory that is too small.
        ProjectionError: modules that the checkpoint lacks.
        TensorError: NaN or infinity in a matrix to be restored.
    """
    options = RestoreOptions(
        rank=rank,
        part=part,
        mode=mode,
        strength=strength,
        modules=modules,
        layers=layers,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        exact=exact,
        device=device,
    )
    for name, given in (("base", base), ("tuned", tuned), ("out", out)):
        check_type(name, given, (str, Path), "the path of a checkpoint")
    target = Target(Path(out), Path(base), Path(tuned), resume=resume, overwrite=overwrite)
    plan = plan_restore(target.base, target.tuned, options)
    return run_plan(plan, target, memory_gib=memory_gib, cache_dir=cache_dir, share=share or ALONE)


@pinned_arithmetic()
def run_plan(
    plan: Plan,
    target: Target,
    *,
    memory_gib: float = 2.0,
    cache_dir: str | Path | None = None,
    on_begin: Callable[[list[Step]], None] = lambda steps: None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_commit: Callable[[], None] = lambda: None,
    share: Share = ALONE,
) -> RestoreReport:
    """Carry out a plan. Arguments and errors as :func:`restore_checkpoint`.

    Args:
        on_begin: called once with the steps that are left to do, in this process.
        on_step: called after every one of them.
        on_commit: called when they are done, while unchanged tensors may still be on their way.
    """
    from rlspec.io.writer import CheckpointWriter

    began = time.perf_counter()
    memory = memory_bytes(memory_gib)
    check_memory(plan, memory)
    _refuse_linked_inputs(plan, target.out)
    owners = shard_owners(plan, share.count)
    if share.number > 0 and share.number not in owners.values():
        return _report(plan, target, {}, 0, time.perf_counter() - began)
    journal = Journal(Path(os.path.abspath(target.out)), share.number)
    inputs = fingerprint(plan)
    cache = Path(cache_dir) if cache_dir is not None else None
    writer = CheckpointWriter(
        target.out,
        plan.like,
        changed=plan.changed,
        fingerprint=inputs,
        share=share,
        owners=owners,
        resume=target.resume,
        overwrite=target.overwrite,
        tokenizer=plan.tokenizer,
        contents={} if plan.config is None else {Path("config.json"): plan.config},
    )
    here = replace(
        plan, options=replace(plan.options, device=str(share.device(torch.device(plan.options.device))))
    )
    try:
        with closing(writer):
            done, resumed = _fill(
                here,
                target,
                writer,
                memory,
                cache,
                journal,
                on_begin,
                on_step,
                on_commit,
                share,
                lambda: _refuse_changed(plan, inputs),
            )
    finally:
        if share.number == 0 and not writer.resumable:
            journal.clear()
    return _report(plan, target, done, resumed, time.perf_counter() - began)


def _fill(
    plan: Plan,
    target: Target,
    writer: CheckpointWriter,
    memory: int,
    cache_dir: Path | None,
    journal: Journal,
    on_begin: Callable[[list[Step]], None],
    on_step: Callable[[Step], None],
    on_commit: Callable[[], None],
    share: Share,
    refuse_changed: Callable[[], None],
) -> tuple[dict[str, MatrixReport], int]:
    """Write all that is pending; the reports of all matrices, and how many of them an earlier call had done.

    Of all but the first of several processes: of those that it has done.
    """
    pending = plan.computed(plan.steps[name] for name in writer.pending)
    earlier: dict[str, MatrixReport] = {}
    if share.number == 0:
        if target.resume:
            left = {step.name for step in plan.computed(plan.steps[name] for name in writer.unfinished)}
            finished = plan.changed.keys() - left
            earlier = {name: row for name, row in journal.read().items() if row.tensor in finished}
        else:
            journal.clear()
        writer.invite()
    on_begin(pending)
    done = dict(earlier)
    try:
        for step, rows in _carry_out(plan, pending, writer, memory, cache_dir, journal):
            done.update({row.name: row for row in rows})
            on_step(step)
        on_commit()
        writer.finish()  # what is refused now has all its work kept for a resumed run, on a slow disk as well
        refuse_changed()
        if share.number == 0:
            target.refuse_losses()  # once more: hours may have passed
        writer.commit()
    except RlspecError as error:
        writer.fail(error)
        if isinstance(error, (TensorError, ChangedInputsError)):
            # The values are at fault, or are no longer those of the inputs: no resumed run of the same inputs gets
            # further, and none of others may take it over.
            writer.close(keep=False)
        raise
    if share.count > 1 and share.number == 0:
        done = journal.read() | done
    return done, len(earlier)


def _refuse_changed(plan: Plan, before: str) -> None:
    """Refuse an output that may be a mixture of two models: inputs are not read in one moment.

    Raises:
        ChangedInputsError: an input is not what it was when the work began.
        CheckpointError: one is not there now, which a disk that comes back may mend.
    """
    if fingerprint(plan) != before:
        tuned = plan.like.path if plan.adapter is None else plan.adapter.index.path.parent
        tuned = tuned if plan.model is None else plan.model.path
        raise ChangedInputsError(
            f"{plan.base.path} or {tuned} was written to while it was read: what was made of it may be a mixture and is "
            "removed; begin anew when nothing writes there any more"
        )


def _refuse_linked_inputs(plan: Plan, out: Path) -> None:
    """Refuse an output whose folder holds weights that an input only links to."""
    indices = [plan.base, plan.like, *([plan.adapter.index] if plan.adapter is not None else [])]
    files = {entry.shard for index in indices for entry in index.tensors.values()}
    for shard in files | (plan.model.files if plan.model is not None else set()):
        if (real := shard.resolve()).is_relative_to(out.resolve()):
            raise CheckpointError(
                f"{out} holds {real}, to which {shard} links; inputs are never written, choose another folder"
            )


def _carry_out(
    plan: Plan,
    pending: list[Step],
    writer: CheckpointWriter,
    memory: int,
    cache_dir: Path | None,
    journal: Journal,
) -> Iterator[tuple[Step, list[MatrixReport]]]:
    """Do the steps in order; tensors that need not be held whole go through row by row."""
    pool = pool_bytes(plan, memory) // 2  # looks at every step
    names = frozenset(writer.pending)
    for by_rows, group in groupby(pending, lambda step: streamed_by_rows(step, plan)):
        steps = list(group)
        if by_rows:
            for step in steps:
                writer.look()
                with file_named(plan, step):
                    rows = _by_rows(plan, step, _pending(plan, step, names), writer, pool)
                journal.append(rows)
                yield step, rows
            continue
        for step, restored in restore_whole(plan, steps, memory, cache_dir):
            writer.look()
            journal.append(restored.rows)
            for written in _pending(plan, step, names):
                scale = restored.scale if written == step.scale else None
                writer.put(written, restored.weight if scale is None else scale)
            yield step, restored.rows


def _pending(plan: Plan, step: Step, pending: frozenset[str]) -> list[str]:
    """The tensors to be written with what a step gives; an earlier call may have finished some."""
    return [name for name in plan.written_by(step) if name in pending]


def _by_rows(
    plan: Plan, step: Step, names: list[str], writer: CheckpointWriter, pool: int
) -> list[MatrixReport]:
    """Copy, interpolate or merge a tensor without holding it whole."""
    assert step.dtype is not None
    if step.action == "copy":
        assert plan.model is not None
        written = plan.model.rows(step.name, memory_bytes=pool)
    elif step.action == "merge":
        assert plan.adapter is not None
        same = merged(step.name, _blocks(plan, step.name, pool), added=plan.adapter.adds(step.name))
        written = restore_rows(step.name, same, step.dtype, unchanged(plan.options), Changes(0))
    else:
        ((projection, shape),) = step.matrices()
        changes = Changes(min(shape))
        blocks = _blocks(plan, step.name, pool)
        written = restore_rows(projection.name, blocks, step.dtype, plan.options, changes)
    for first, block in written:
        for name in names:
            writer.put_rows(name, first, block)
    if step.action in ("copy", "merge"):
        return []
    return [MatrixReport.of(projection, shape, step.dtype, changes)]


def _blocks(plan: Plan, name: str, memory: int) -> Iterator[Block]:
    """Row blocks of base and tuned tensor."""
    from rlspec.io.stream import aligned, stream_rows

    base = stream_rows(plan.base, name, memory_bytes=memory)
    if plan.model is not None:
        yield from aligned(base, plan.model.rows(name, memory_bytes=memory))
        return
    if plan.adapter is None:
        yield from aligned(base, stream_rows(plan.like, name, memory_bytes=memory))
        return
    saved = plan.adapter.saved(name)
    if saved is None:
        pairs: Iterator[Block] = ((first, block, block) for first, block in base)
    else:
        pairs = aligned(base, stream_rows(plan.adapter.index, saved, memory_bytes=memory))
    for first, there, here in pairs:
        yield first, there, plan.adapter.add_update(name, first, here)


def fingerprint(plan: Plan) -> str:
    """A hash of everything that the output depends on: settings, version, and the identity of the inputs.

    An input is identified by the name, size, time of modification and header of each of its files.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([version("rlspec"), plan.options.to_dict()], sort_keys=True).encode())
    indices = [plan.base, plan.like, *([plan.adapter.index] if plan.adapter is not None else [])]
    for index in indices:
        folder = index.path if index.path.is_dir() else index.path.parent
        shards = sorted({entry.shard for entry in index.tensors.values()})
        for path in (*shards, folder / "config.json", folder / "adapter_config.json"):
            if path in shards or path.is_file():
                digest.update(_identity(path, header_only=path in shards))
    if plan.model is not None:
        digest.update(_identity(plan.model.path / METADATA_FILE, header_only=False))
        for path in sorted(plan.model.files):
            digest.update(_status(path))
    return digest.hexdigest()


def _identity(path: Path, *, header_only: bool) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            rest = file.read(int.from_bytes(head, "little") if header_only else -1)
    except OSError as error:
        raise read_error(path, error) from None
    return _status(path) + head + rest


def _status(path: Path) -> bytes:
    try:
        status = os.stat(path)
    except OSError as error:
        raise read_error(path, error) from None
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} ".encode()


def _report(
    plan: Plan, target: Target, done: dict[str, MatrixReport], resumed: int, seconds: float
) -> RestoreReport:
    order = [projection.name for step in plan.chosen("restore") for projection in step.projections]
    return RestoreReport(
        out=target.out,
        base=target.base,
        tuned=target.tuned,
        options=plan.options.to_dict(),
        matrices=tuple(done[name] for name in order if name in done),
        kept={step.name: step.reason for step in (*plan.chosen("keep"), *plan.chosen("copy"))},
        merged=tuple(step.name for step in plan.chosen("merge")),
        bytes_written=sum(step.bytes for step in plan.steps.values()),
        seconds=seconds,
        resumed=resumed,
        tied={step.name: step.source for step in plan.chosen("tied")},
        notes=plan.notes,
    )
