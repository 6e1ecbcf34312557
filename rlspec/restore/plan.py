"""What a restoration will do to every tensor of a checkpoint, decided from headers alone.

But for one thing: whether a stored head is a copy of the embedding only their bytes tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch

from rlspec.errors import CheckpointError, OptionError, TensorError
from rlspec.io.adapter import Adapter, is_adapter
from rlspec.io.companions import left_behind
from rlspec.io.counterparts import Names
from rlspec.io.distributed_model import DistributedModel, is_distributed_model
from rlspec.io.dtypes import torch_dtype
from rlspec.io.index import CheckpointIndex, TensorEntry
from rlspec.io.projections import Projection, model_of, read_config
from rlspec.io.quantised import companions, is_quantised, unknown_scheme
from rlspec.io.stream import in_file_order
from rlspec.io.tied import find_tie, open_adapter, stored_alike, untied_config, with_head
from rlspec.io.weights import CheckpointWeights
from rlspec.restore.options import RestoreOptions
from rlspec.restore.select import Selection, is_wanted, select

Action = Literal["restore", "merge", "tied", "scale", "copy", "keep"]

#: safetensors' names of the dtypes that can be restored
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
#: and of the codes that can, where a scale lies beside them
CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# These modules commonly differ between a base and what was tuned from it: vocabularies grow, heads are tied.
_MAY_DIFFER = ("embed", "lm_head")

_NOT_ADAPTED = "the adapter does not change it"
_NO_STRENGTH = "strength 0 changes nothing"
_AS_ASKED = (_NOT_ADAPTED, _NO_STRENGTH)


@dataclass(frozen=True)
class Step:
    """What happens to one tensor.

    ``restore``: the matrices in ``projections`` are restored, ``directions`` tells how many directions of each
    (None where the singular values decide). ``merge``: the adapter's update is added and nothing is restored.
    ``tied``: a stored copy of the tensor ``source``, written as that is. ``scale``: of the codes in ``source``, written
    with those. ``copy``: written as the tuned model's parts have it, for ``reason``. ``keep``: copied with the file that
    it lies in, for ``reason``.
    """

    entry: TensorEntry
    action: Action
    dtype: torch.dtype | None = None  #: of the result; None for what is kept
    projections: tuple[Projection, ...] = ()
    directions: tuple[int | None, ...] = ()
    reason: str = ""
    source: str = ""
    scale: str = ""  #: the tensor that scales its codes, where the result is stored as such
    dequantised: bool = False  #: the base's or the tuned one is stored as codes, and held whole in float32

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def bytes(self) -> int:
        """Size of the result on disk."""
        if self.dtype is None:
            return self.entry.end - self.entry.start
        return prod(self.entry.shape) * self.dtype.itemsize

    def matrices(self) -> Iterator[tuple[Projection, tuple[int, int]]]:
        """Each projection with its shape (out, in)."""
        for projection in self.projections:
            shape = self.entry.shape
            yield projection, projection.shape(shape) if len(shape) == 2 else (1, prod(shape))


@dataclass(frozen=True)
class Plan:
    """The steps of one restoration, in the order of the output's files.

    ``like`` is the checkpoint whose files, tensors and side files the output takes over: the tuned one, or the base
    where the tuned one is an ``adapter``, or a ``model`` in parts, whose tensors the steps then tell of.
    """

    base: CheckpointIndex
    like: CheckpointIndex
    adapter: Adapter | None
    options: RestoreOptions
    steps: dict[str, Step]
    unmatched: tuple[str, ...]
    passed_over: dict[str, str]  #: tensors that were chosen and cannot be restored, and why
    notes: tuple[str, ...] = ()  #: sentences about the checkpoint
    config: bytes | None = (
        None  #: what the output's config.json holds, where that is not what ``like``'s does
    )
    model: DistributedModel | None = None
    tokenizer: Path | None = None  #: a folder whose tokenizer goes before that of ``like``

    @property
    def changed(self) -> dict[str, torch.dtype]:
        """Tensors that are written anew, with their dtypes."""
        return {name: step.dtype for name, step in self.steps.items() if step.dtype is not None}

    def computed(self, steps: Iterable[Step]) -> list[Step]:
        """The steps that are to be carried out to have the tensors of those given, in order."""
        names = dict.fromkeys(step.source or step.name for step in steps)
        return [self.steps[name] for name in names]

    def written_by(self, step: Step) -> list[str]:
        """The tensors whose content a step gives: its own, and those tied to it."""
        return [step.name, *self._others.get(step.name, ())]

    @cached_property
    def _others(self) -> dict[str, list[str]]:
        """The tensors that are written with another one, by its name: looked for once, not for every tensor."""
        found: dict[str, list[str]] = {}
        for other in (*self.chosen("tied"), *self.chosen("scale")):
            found.setdefault(other.source, []).append(other.name)
        return found

    def chosen(self, action: Action) -> list[Step]:
        return [step for step in self.steps.values() if step.action == action]


def plan_restore(base: Path, tuned: Path, options: RestoreOptions) -> Plan:
    """Decide what happens to every tensor.

    Args:
        base: checkpoint folder or file.
        tuned: the same, or the folder of a LoRA adapter trained on ``base``, or of torch.distributed.checkpoint.

    Raises:
        CheckpointError: a checkpoint that cannot be read or is quantised in a form that is not known, or two that do
            not belong together.
        OptionError, ProjectionError: modules, layers or indices that the checkpoint does not have.
    """
    base_index = CheckpointIndex.open(base)
    _refuse_unknown(base_index, options)
    adapter, untied, model = None, None, None
    if is_adapter(tuned):
        adapter, base_index, untied = open_adapter(tuned, base_index)
    elif is_distributed_model(tuned):
        model = DistributedModel.open(tuned, base_index)
    like = CheckpointIndex.open(tuned) if adapter is None and model is None else base_index
    if like is not base_index:
        _refuse_unknown(like, options)
    base_index = _under_names_of(like, base_index)
    entries = in_file_order(like)
    if model is not None:
        entries = [model.entries[entry.name] for entry in entries]
    shapes = {entry.name: tuple(entry.shape) for entry in entries if not is_quantised(entry.name)}
    selection = select(shapes, options, read_config(like.path))
    sides = _Sides(base_index, like, adapter)
    steps = {entry.name: _step(entry, selection, options, sides) for entry in entries}
    steps |= _scale_steps(steps)
    notes = [] if selection.note is None else [selection.note]
    if coded := [step for step in steps.values() if step.scale]:
        notes.append(
            f"{len(coded)} of the tensors to restore are fp8 codes with scales and are stored so again, rounded to fp8"
        )
    config = None
    if untied is None:
        steps |= _tied_steps(like, steps, model)
        notes += [f"{step.name}: {step.reason}" for step in steps.values() if step.action == "tied"]
    else:
        config = untied_config(like.path)
        told = "config.json's tie_word_embeddings is false"
        if config is None:
            told = "a config.json to go with them must have tie_word_embeddings false"
        notes.append(f"the adapter unties {untied.head} from {untied.embed}: both are stored, and {told}")
    if model is not None:
        notes += model.notes
        steps = {name: _copied(step) if step.action == "keep" else step for name, step in steps.items()}
    if left := left_behind(like):
        notes.append(left)
    passed_over = {
        name: steps[name].reason
        for name in selection.chosen
        if steps[name].action in ("merge", "copy", "keep") and steps[name].reason not in _AS_ASKED
    }
    plan = Plan(
        base_index,
        like,
        adapter,
        options,
        steps,
        selection.unmatched,
        passed_over,
        tuple(notes),
        config,
        model,
        None if adapter is None and model is None else tuned,
    )
    _refuse_nothing(plan, selection)
    return plan


def _copied(step: Step) -> Step:
    return replace(step, action="copy", dtype=torch_dtype(step.entry))


def _tied_steps(
    like: CheckpointIndex, steps: Mapping[str, Step], model: DistributedModel | None
) -> dict[str, Step]:
    """What happens to a stored copy of a tied head where the embedding changes, or the head was to change alone."""
    tie = find_tie(like)
    if tie is None or not tie.stored:
        return {}
    embed, head = steps[tie.embed], steps[tie.head]
    if embed.action == head.action == "keep":
        return {}
    if not (stored_alike(like, tie) if model is None else model.is_alike(tie)):
        return {}
    if embed.scale or head.scale:
        raise CheckpointError(
            f"{head.entry.shard}: {head.name} is a stored copy of {embed.name}, both as fp8 codes; leave embed and "
            "lm_head out of modules, or dequantise them first"
        )
    reason = f"a stored copy of {tie.embed}, to which the head is tied"
    if embed.action == "keep":
        return {tie.head: Step(head.entry, "keep", reason=f"{reason}; ask for embed")}
    return {
        tie.head: Step(head.entry, "tied", embed.dtype, reason=f"{reason}; written alike", source=tie.embed)
    }


def _under_names_of(like: CheckpointIndex, base: CheckpointIndex) -> CheckpointIndex:
    """The base with its tensors also under the names that ``like`` has for them, where those differ in the prefix.

    Its embedding is also its head, where it is tied and stores none.
    """
    tie = find_tie(base)
    base = with_head(base, tie) if tie is not None and tie.said else base
    missing = [name for name in like.tensors if name not in base.tensors]
    if not missing:
        return base
    mine, theirs = model_of(like), model_of(base)
    # What another model beside the language model calls its layers is no counterpart.
    sides = {inside: Names(n for n in base.tensors if theirs.holds(n) == inside) for inside in (True, False)}
    found = {
        name: base.tensors[there]
        for name in missing
        if (there := sides[mine.holds(name)].counterpart(name)) is not None
    }
    beside = companions(base.tensors)
    for name, entry in list(found.items()):  # and what their codes are read with
        scales = (scale for scale in beside.get(entry.name, []) if scale.startswith(entry.name))
        found.update({name + scale.removeprefix(entry.name): base.tensors[scale] for scale in scales})
    renamed = {name: replace(entry, name=name) for name, entry in found.items()}
    return replace(base, tensors={**base.tensors, **renamed}) if renamed else base


class _Sides:
    """What a restoration reads."""

    def __init__(self, base: CheckpointIndex, like: CheckpointIndex, adapter: Adapter | None) -> None:
        self.base, self.like, self.adapter = base, like, adapter
        self.base_weights, self.like_weights = CheckpointWeights.of(base), CheckpointWeights.of(like)


def _step(entry: TensorEntry, selection: Selection, options: RestoreOptions, sides: _Sides) -> Step:
    projections = selection.chosen.get(entry.name, [])
    reason = selection.reasons.get(entry.name, "")
    if is_quantised(entry.name):
        reason = "belongs to codes that are kept"
    merged = sides.adapter is not None and sides.adapter.changes(entry.name)
    scale, dequantised = "", False
    if projections:
        reason, scale, dequantised = _unusable(entry, projections, sides)
        if not reason and sides.adapter is not None and not merged:
            reason = _NOT_ADAPTED
    if not reason:
        kept, directions = [], []
        for projection in projections:
            r = min(projection.shape(entry.shape)) if len(entry.shape) == 2 else 1
            if options.elementwise or options.arguments(r) is not None:
                kept.append(projection)
                directions.append(options.directions(r))
        if not kept:
            reason = f"part {options.part} lies past its directions"
        elif options.strength == 0 and not merged and options.dtype == "keep":
            reason = _NO_STRENGTH
        else:
            if merged and dequantised:
                _refuse_adapter(entry)
            dtype = _result_dtype(entry, options)
            return Step(
                entry, "restore", dtype, tuple(kept), tuple(directions), scale=scale, dequantised=dequantised
            )
    if merged:
        if entry.dtype not in FLOATS:
            _refuse_adapter(entry)
        return Step(entry, "merge", FLOATS[entry.dtype], reason=reason)
    return Step(entry, "keep", reason=reason)


def _refuse_adapter(entry: TensorEntry) -> None:
    raise CheckpointError(
        f"{entry.shard}: {entry.name} is stored as {entry.dtype}: no adapter can be added to it; dequantise "
        "the base first"
    )


def _result_dtype(entry: TensorEntry, options: RestoreOptions) -> torch.dtype:
    if entry.dtype not in CODES:
        return torch.float32 if options.dtype == "float32" else FLOATS[entry.dtype]
    if options.dtype != "keep":
        raise OptionError(
            f"dtype={options.dtype!r}: {entry.shard}: {entry.name} is stored as fp8 codes with a scale, as config.json "
            "says, and can be stored only so; leave dtype out, or dequantise the checkpoint first"
        )
    return torch_dtype(entry)


def _unusable(entry: TensorEntry, projections: list[Projection], sides: _Sides) -> tuple[str, str, bool]:
    """Why a chosen tensor is left as it is after all, or ""; the scale of its codes, or ""; whether either side is codes.

    Raises:
        CheckpointError: base and tuned do not belong together, or codes that cannot be read.
    """
    base, like = sides.base, sides.like
    by_name = projections[0].module == "other"
    scale = _scale_of(sides.like_weights, entry)
    if entry.dtype not in FLOATS and scale is None:
        if by_name:
            return f"{entry.dtype} cannot be restored", "", False
        raise CheckpointError(
            f"{entry.shard}: {entry.name} is stored as {entry.dtype}; restoring needs {', '.join(FLOATS)}, or fp8 with a "
            "scale beside it: start from a checkpoint that is not quantised"
        )
    if not prod(entry.shape) or not entry.shape:
        return "empty or a scalar", "", False
    there = base.tensors.get(entry.name)
    if there is None:
        problem = "not in the base"
    elif tuple(there.shape) != tuple(entry.shape):
        problem = f"{list(entry.shape)} here, {list(there.shape)} in the base"
    elif there.dtype not in (*FLOATS, *CODES):
        problem = f"stored as {there.dtype} in the base"
    else:
        _scale_of(sides.base_weights, there)
        return "", scale or "", bool(scale) or there.dtype in CODES
    if projections[0].module in _MAY_DIFFER:
        return problem, "", False
    raise CheckpointError(
        f"{like.path}: {entry.name} cannot be restored from {base.path}: {problem}; is that the model it was tuned "
        "from?"
    )


def _scale_of(weights: CheckpointWeights, entry: TensorEntry) -> str | None:
    """The scale of a tensor that may be codes.

    Raises:
        CheckpointError: it is, of a scheme that is not known.
    """
    if entry.dtype not in (*FLOATS, *CODES):
        return None
    try:
        return weights.scale_of(entry.name)
    except TensorError as error:
        raise CheckpointError(str(error)) from None


def _scale_steps(steps: Mapping[str, Step]) -> dict[str, Step]:
    """The scales of codes that are written anew are written with them."""
    found = {}
    for step in steps.values():
        if step.scale:
            entry = steps[step.scale].entry
            found[entry.name] = Step(
                entry, "scale", torch_dtype(entry), reason=f"the scale of {step.name}", source=step.name
            )
    return found


def _refuse_unknown(index: CheckpointIndex, options: RestoreOptions) -> None:
    """Refuse weights that are wanted and stored in a scheme that is not known, before they are missed by name."""
    for weight, told in unknown_scheme(index.tensors).items():
        if is_wanted(weight, options) or is_wanted(told, options):
            raise CheckpointError(
                f"{index.tensors[told].shard}: {told} belongs to quantised weights of a scheme that is not known (GPTQ, "
                "AWQ, bitsandbytes, packed integers); restoring needs 16 or 32 bit floats, or fp8 with scales: start "
                "from the checkpoint before quantisation"
            )


def _refuse_nothing(plan: Plan, selection: Selection) -> None:
    """A run that would only copy is refused, unless strength 0 asked for just that."""
    if plan.chosen("restore") or plan.options.strength == 0:
        return
    reasons = [f"{name}: {plan.steps[name].reason}" for name in selection.chosen]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    raise CheckpointError(f"{plan.like.path}: nothing to restore: {reasons[0]}{more}")
