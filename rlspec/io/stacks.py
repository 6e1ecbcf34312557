"""Which stack of numbered layers is the language model's, where a checkpoint holds several.

Multimodal models keep vision and audio encoders, speech generators and the like beside the language model, under
prefixes of which no list is ever complete ("vpm.", "apm.", "talker.", ...). The configuration's size of the language
model tells its stack apart; then the names of the configuration's other sections; then names known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlspec.io.fused import Config, Shape

# Sections of config.json that hold the configuration of a multimodal model's text part, or lead to it.
_TEXT_SECTIONS = ("thinker_config", "text_config", "llm_config", "language_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_TOWERS = re.compile(
    r"(?:^|\.)(?:vision_model|vision_tower|vision_encoder|visual|vpm|image_encoder|audio_tower|audio_model|apm"
    r"|speech_encoder|img_processor|multi_modal_projector|mm_projector|talker|tts|code2wav|token2wav|mtp)\."
)


@dataclass
class Stack:
    """The numbered layers under one prefix."""

    prefix: str  #: up to the layer's number, "model.language_model.layers."
    layers: int = 0  #: the highest number, and one more
    widths: set[int] | None = (
        None  #: sizes that all its known matrices have an axis of; None where it has none
    )

    def add(self, layer: int, known: Shape | None) -> None:
        """Count a tensor; ``known`` is the shape of one that holds a known matrix."""
        self.layers = max(self.layers, layer + 1)
        if known is not None:
            self.widths = set(known) if self.widths is None else self.widths & set(known)

    def __str__(self) -> str:
        return f"{self.prefix[:-1]} ({self.layers})"


@dataclass(frozen=True)
class LanguageModel:
    """The stacks that belong to the language model, and those beside it, which are other models."""

    own: tuple[Stack, ...] = ()
    others: tuple[Stack, ...] = ()
    _roots: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        roots = tuple(_root(stack.prefix, [own.prefix for own in self.own]) for stack in self.others)
        object.__setattr__(self, "_roots", roots)

    def holds(self, name: str) -> bool:
        """Whether a tensor belongs to the language model, by its name."""
        if name.startswith(tuple(stack.prefix for stack in self.own)):
            return True
        return not name.startswith(self._roots) and not in_tower(name)

    @property
    def layers(self) -> int:
        """How many layers it has; the most of one stack where it has several."""
        return max((stack.layers for stack in self.own), default=0)

    @property
    def note(self) -> str | None:
        """What to tell of a checkpoint with several stacks: which of them are meant."""
        if len(self.own) + len(self.others) < 2:
            return None
        beside = f"; not part of it: {_listed(self.others)}" if self.others else ""
        if len(self.own) > 1:
            return f"several stacks of layers are taken for the language model's: {_listed(self.own)}{beside}"
        return f"the language model's layers are {_listed(self.own)}{beside}"


def tell_apart(stacks: Iterable[Stack], config: Config | None) -> LanguageModel:
    """Tell the language model's stack from the others.

    Args:
        stacks: all of the checkpoint.
        config: its config.json.

    Returns:
        The stack of the size that the configuration gives; of an encoder-decoder model both. Where that decides
        nothing, every stack whose name does not speak against it.
    """
    every = tuple(stacks)
    beside = [stack for stack in every if not in_tower(stack.prefix)]
    named = [stack for stack in beside if not _in_section(stack.prefix, config)] or beside
    paired = config is not None and bool(config.get("is_encoder_decoder"))
    own = [] if paired else _of_size(every, config) or _of_size(named, config)
    own = own or [stack for stack in named if stack.widths is not None] or named
    others = [stack for stack in every if stack.widths is not None and stack not in own] if own else []
    return LanguageModel(tuple(own), tuple(others))


def in_tower(name: str) -> bool:
    """Whether a name says that a tensor belongs to the vision or audio part of a multimodal model."""
    return _TOWERS.search(name) is not None


def text_sections(config: Config) -> list[Config]:
    """A configuration, and the section in it that is its text part's, from the outermost to the innermost."""
    sections: list[Config] = [config]
    for key in _TEXT_SECTIONS:
        section = sections[-1].get(key)
        if isinstance(section, dict):
            sections.append(section)
    return sections


def text_config(config: Config) -> Config:
    """The configuration of a model's text part, which multimodal models keep in a section of its own."""
    merged: dict[str, Any] = {}
    for section in text_sections(config):
        merged |= section
    return merged


def _of_size(stacks: Sequence[Stack], config: Config | None) -> list[Stack]:
    """The only stack of the text part's size, [] where there is none or more than one."""
    if config is None:
        return []
    text = text_config(config)
    layers, width = (next((text[k] for k in keys if text.get(k)), None) for keys in (_LAYERS, _WIDTH))
    wide = [stack for stack in stacks if width in (stack.widths or ())]
    for fitting in (
        [stack for stack in wide if stack.layers == layers],
        [stack for stack in stacks if stack.widths is None and stack.layers == layers],
        # Layers that predict further tokens may follow those that the configuration counts.
        [stack for stack in wide if stack.layers >= (layers or 0)],
    ):
        if len(fitting) == 1:
            return fitting
    return []


def _in_section(prefix: str, config: Config | None) -> bool:
    """Whether a part of the prefix is named as one of the configuration's sections, the text part's aside."""
    sections = [] if config is None else [key for section in text_sections(config) for key in section]
    others = [key.removesuffix("_config") for key in sections if key.endswith("_config")]
    others = [name for name in others if f"{name}_config" not in _TEXT_SECTIONS]
    return any(part == name or part.startswith(f"{name}_") for part in prefix.split(".") for name in others)


def _root(prefix: str, own: list[str]) -> str:
    """The shortest beginning of a stack's names that none of the language model's has."""
    parts = prefix[:-1].split(".")
    shared = 0
    for other in own:
        pairs = zip(parts, other.split("."))
        shared = max(shared, next((i for i, (a, b) in enumerate(pairs) if a != b), len(parts)))
    return ".".join(parts[: shared + 1]) + "."


def _listed(stacks: Iterable[Stack]) -> str:
    return ", ".join(map(str, stacks))
