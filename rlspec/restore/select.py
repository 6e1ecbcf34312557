"""Which tensors of a checkpoint a restoration is about, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlspec.errors import OptionError, ProjectionError
from rlspec.io.fused import Config
from rlspec.io.projections import (
    MODULES,
    Projection,
    Shape,
    find_projections,
    language_model,
    layer_of,
    modules_in,
    parse_modules,
    projections_of,
)
from rlspec.io.stacks import LanguageModel, in_tower
from rlspec.restore.options import RestoreOptions

# Kinds of names that a message lists.
_KINDS = 8


@dataclass(frozen=True)
class Selection:
    """The matrices chosen, by the tensor that holds them, and the reason for every other tensor."""

    chosen: dict[str, list[Projection]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()  #: matrices not chosen, whose names no pattern knows
    note: str | None = None  #: which of several stacks of layers are the language model's


def select(shapes: Mapping[str, Shape], options: RestoreOptions, config: Config | None) -> Selection:
    """Choose by ``options.modules`` and ``options.layers``.

    A tensor chosen by a regular expression whose name no pattern knows is taken as one matrix.

    Args:
        shapes: every tensor of the tuned checkpoint, in the order of its files.
        config: its config.json.

    Raises:
        OptionError: modules or layers that the checkpoint does not have.
        ProjectionError: a module that is not found, or cannot be taken out of a fused tensor.
    """
    modules = str(options.modules)
    known = _known_modules(modules)
    pattern = None if known is not None else _pattern(modules)
    model = language_model(shapes, config)
    if known is not None:
        _check_found(shapes, known, config, model)
    if options.layers is not None and len({stack.layers for stack in model.own}) > 1:
        raise OptionError(
            f"layers={options.layers!r}: {model.note}; choose layers by a regular expression for modules"
        )
    layers = options.chosen_layers(model.layers)
    chosen: dict[str, list[Projection]] = {}
    reasons: dict[str, str] = {}
    unmatched = []
    for name, shape in shapes.items():
        inside = model.holds(name)
        holds = modules_in(name, shape) if inside else ()
        if pattern is not None:
            found = _by_pattern(name, shapes, pattern, config, options, inside)
        else:
            assert known is not None
            found = projections_of(name, shapes, config, known) if inside else []
        layer = layer_of(name)
        if not found:
            if not holds and len(shape) == 2 and inside:
                unmatched.append(name)
            reasons[name] = _reason(name, shape, holds, pattern is not None, options.elementwise, inside)
        elif layers is not None and layer is not None and inside and layer not in layers:
            reasons[name] = f"layer {layer} is not among layers {options.layers}"
        else:
            chosen[name] = found
    if not chosen:
        raise OptionError(_nothing(modules, options, pattern is not None, shapes))
    return Selection(chosen, reasons, tuple(unmatched), model.note)


def is_wanted(name: str, options: RestoreOptions) -> bool:
    """Whether a weight's name alone says that ``options.modules`` is about it."""
    modules = str(options.modules)
    known = _known_modules(modules)
    if known is None:
        return _pattern(modules).search(name) is not None
    return not in_tower(name) and bool(set(modules_in(name, (1, 1))) & set(known))


def _known_modules(text: str) -> tuple[str, ...] | None:
    """The modules named, or None where the text must be a regular expression."""
    try:
        return parse_modules(text)
    except OptionError:
        if re.fullmatch(r"[\s,]*", text):
            raise
        return None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise OptionError(
            f"modules={text!r} is neither a list of {', '.join(MODULES)}, attn, all nor a valid regular "
            f"expression: {error}"
        ) from None


def _check_found(
    shapes: Mapping[str, Shape], modules: tuple[str, ...], config: Config | None, model: LanguageModel
) -> None:
    """find_projections refuses what is not there; its message gets the way out."""
    try:
        find_projections(shapes, modules, config)
    except ProjectionError as error:
        unknown = [n for n, s in shapes.items() if len(s) >= 2 and model.holds(n) and not modules_in(n, s)]
        kinds = [
            f"{count} x {name}" for name, count in Counter(map(without_numbers, unknown)).most_common(_KINDS)
        ]
        table = f"; not matched by name: {', '.join(kinds)}" if kinds else ""
        raise ProjectionError(
            f"{error}; modules= also takes a regular expression for tensor names{table}"
        ) from None


def without_numbers(name: str) -> str:
    """What a name has in common with those of other layers."""
    return re.sub(r"\d+", "N", name)


def _by_pattern(
    name: str,
    shapes: Mapping[str, Shape],
    pattern: re.Pattern[str],
    config: Config | None,
    options: RestoreOptions,
    inside: bool,
) -> list[Projection]:
    """The parts of a fused tensor whose labels match, or the tensor itself."""
    shape = shapes[name]
    if inside and modules_in(name, shape) and len(shape) == 2:
        if not (
            pattern.search(name) or any(pattern.search(f"{name}[{p}]") for p in ("q", "k", "v", "gate", "up"))
        ):
            return []
        return [p for p in projections_of(name, shapes, config) if pattern.search(p.name)]
    if not pattern.search(name) or not (options.elementwise or len(shape) == 2):
        return []
    return [Projection(name, name, "other", layer_of(name))]


def _reason(
    name: str, shape: Shape, holds: tuple[str, ...], by_pattern: bool, elementwise: bool, inside: bool
) -> str:
    if by_pattern:
        return "not a matrix" if len(shape) != 2 and not elementwise else "does not match"
    if len(shape) != 2 and not holds:
        return "not a matrix"
    if not inside:
        return f"part of {'the vision or audio' if in_tower(name) else 'another'} model"
    return f"{'/'.join(holds)} is not among the modules" if holds else "name not known"


def _nothing(modules: str, options: RestoreOptions, by_pattern: bool, shapes: Mapping[str, Shape]) -> str:
    example = next((name for name in shapes if layer_of(name) is not None), next(iter(shapes), "none at all"))
    if by_pattern:
        return (
            f"modules={modules!r} is not a list of {', '.join(MODULES)}, attn, all, and as a regular expression "
            f"it matches no matrix; the tensors are named like {example!r}"
        )
    return f"modules={modules!r} has nothing in layers={options.layers!r}"
