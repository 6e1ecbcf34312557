"""Heads that are tied to the embedding: one matrix for both, which a checkpoint stores once, or twice.

An adapter that trains one of the two trains it alone: PEFT's model goes on with the base's matrix for the other. No
tied checkpoint can say so; the head is then stored beside the embedding and the configuration no longer ties them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlspec.errors import CheckpointError
from rlspec.io.adapter import Adapter
from rlspec.io.files import read_json_object
from rlspec.io.index import CheckpointIndex
from rlspec.io.projections import config_file, model_of, modules_in
from rlspec.io.stacks import text_sections
from rlspec.io.stream import stream_rows
from rlspec.io.tie_setting import SETTING, says_tied

# What the modules are called that hold an embedding, and beside which the head lies.
_BODIES = ("model", "transformer", "gpt_neox")
# How much of each of two tensors is held while they are compared.
_COMPARED_BYTES = 1 << 25


@dataclass(frozen=True)
class Tie:
    """The embedding of a language model, and the head that its configuration does not keep apart from it."""

    embed: str
    head: str
    stored: bool  #: the head as well
    said: bool  #: the configuration says that they are tied; else it says nothing


def find_tie(index: CheckpointIndex) -> Tie | None:
    """None for a model that is not tied, or of which there is no telling where its head would be stored.

    Raises:
        CheckpointError: a config.json that cannot be read.
    """
    said = says_tied(config_file(index.path))
    if said is False:
        return None
    model = model_of(index)
    found: dict[str, list[str]] = {"embed": [], "lm_head": []}
    for name, entry in index.tensors.items():
        for module in modules_in(name, entry.shape):
            if module in found and model.holds(name):
                found[module].append(name)
    if len(found["embed"]) != 1 or len(found["lm_head"]) > 1:
        return None
    (embed,) = found["embed"]
    head = next(iter(found["lm_head"]), None) or _head_beside(embed)
    return None if head is None else Tie(embed, head, bool(found["lm_head"]), said is True)


def with_head(index: CheckpointIndex, tie: Tie | None) -> CheckpointIndex:
    """The checkpoint with its tied head as a tensor of its own, at the bytes of the embedding."""
    if tie is None or tie.stored:
        return index
    head = replace(index.tensors[tie.embed], name=tie.head)
    return replace(index, tensors={**index.tensors, tie.head: head})


def stored_alike(index: CheckpointIndex, tie: Tie) -> bool:
    """Whether embedding and head are one matrix: stored once, or twice with the same bytes."""
    if not tie.stored:
        return True
    embed, head = index.tensors[tie.embed], index.tensors[tie.head]
    if (embed.shape, embed.dtype) != (head.shape, head.dtype):
        return False
    there, here = (
        _bytes(stream_rows(index, name, memory_bytes=_COMPARED_BYTES)) for name in (tie.embed, tie.head)
    )
    return all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def open_adapter(folder: Path, base: CheckpointIndex) -> tuple[Adapter, CheckpointIndex, Tie | None]:
    """An adapter, the base as the output will follow it, and the tie of the base that the adapter cuts.

    Raises:
        CheckpointError: see :meth:`Adapter.open`; an embedding whose head could not be stored beside it.
    """
    tie = find_tie(base)
    whole = with_head(base, tie)
    adapter = Adapter.open(folder, whole)
    if tie is None:
        _refuse_unknown_head(adapter, base)
        return adapter, base, None
    if not (adapter.changes(tie.embed) or adapter.changes(tie.head)):
        return adapter, base, None
    one = stored_alike(base, tie)
    if adapter.keeps_ties and adapter.changes(tie.embed) and one:
        return adapter.without(tie.head), base, None
    return (adapter, whole, tie) if one or tie.said else (adapter, base, None)


def untied_config(checkpoint: Path) -> bytes | None:
    """What config.json holds with embedding and head untied; None where the output of a restoration has none."""
    path = config_file(checkpoint)
    if not checkpoint.is_dir() or not path.is_file():
        return None
    config = read_json_object(path)
    for section in text_sections(config):
        assert isinstance(section, dict)  # as JSON gives it
        section[SETTING] = False
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _head_beside(embed: str) -> str | None:
    """The name under which transformers looks for the head of an embedding; None where it is not clear."""
    parts = embed.split(".")
    bodies = [i for i, part in enumerate(parts) if part in _BODIES]
    if len(bodies) != 1:
        return None
    return ".".join([*parts[: bodies[0]], "embed_out" if parts[-2] == "embed_in" else "lm_head", "weight"])


def _refuse_unknown_head(adapter: Adapter, base: CheckpointIndex) -> None:
    if says_tied(config_file(base.path)) is False:
        return
    if any("lm_head" in modules_in(name, entry.shape) for name, entry in base.tensors.items()):
        return
    for name, entry in base.tensors.items():
        if adapter.changes(name) and (
            "embed" in modules_in(name, entry.shape) or name.endswith("shared.weight")
        ):
            raise CheckpointError(
                f"{adapter.index.path}: trains {name}, to which the head is tied, and {base.path} does not say under "
                "which name to store that beside it; save the base with tie_word_embeddings false and the head in it, "
                "and give that"
            )


def _bytes(blocks: Iterator[tuple[int, Tensor]]) -> Iterator[Tensor]:
    for _, block in blocks:
        yield block.reshape(-1).view(torch.uint8)
