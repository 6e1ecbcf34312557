"""Where q, k and v (or gate and up) lie inside tensors that hold several of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlspec.errors import ProjectionError

Shape = tuple[int, ...]
Config = Mapping[str, Any]
Rows = slice | tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """One matrix inside a fused tensor: its label, its module and its output rows."""

    label: str
    module: str
    rows: Rows


# config.json's model_type of the architectures that call their fused tensor query_key_value
_BY_HEAD = ("gpt_neox", "bloom")
_FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")


def consecutive(parts: list[tuple[str, str, int]]) -> list[Part]:
    """Parts (label, module, number of rows) that lie one after the other."""
    found, start = [], 0
    for label, module, rows in parts:
        found.append(Part(label, module, slice(start, start + rows)))
        start += rows
    return found


def phi3_qkv(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> list[Part]:
    """Phi-3: q has as many rows as o_proj has inputs, k and v share the rest (grouped queries)."""
    output = shapes.get(name.replace("qkv_proj", "o_proj"))
    if output is None or len(output) != 2:
        raise ProjectionError(f"{name}: cannot be split into q, k and v without its o_proj")
    q = output[1]
    rest = shape[0] - q
    if rest <= 0 or rest % 2:
        raise ProjectionError(f"{name}: {shape[0]} rows do not split into q ({q}, by o_proj) and equal k, v")
    return consecutive([("q", "q", q), ("k", "k", rest // 2), ("v", "v", rest // 2)])


def gpt2_qkv(name: str, shape: Shape) -> list[Part]:
    """GPT-2's Conv1D (n, 3n): q, k, v side by side."""
    if shape[1] != 3 * shape[0]:
        raise ProjectionError(f"{name}: expected a fused (n, 3n) Conv1D as in GPT-2, found {shape}")
    return consecutive([(module, module, shape[0]) for module in "qkv"])


def query_key_value(name: str, shape: Shape, config: Config | None) -> list[Part]:
    """GPT-NeoX and BLOOM: for each head its q, k, v rows. Falcon: for each group of heads the q rows of all of
    them, then one k and one v.

    Raises:
        ProjectionError: no configuration, one of another architecture, or one that does not fit the shape.
    """
    if config is None:
        raise ProjectionError(
            f"{name}: fused query_key_value interleaves the heads, and how many there are only config.json says; "
            "none was found beside the weights"
        )
    kind = config.get("model_type")
    if kind not in (*_BY_HEAD, *_FALCON):
        raise ProjectionError(
            f"{name}: config.json's model_type {kind!r} is none whose query_key_value layout is known: "
            f"{', '.join((*_BY_HEAD, *_FALCON))}"
        )
    heads, groups = head_counts(name, config)
    queries = heads // groups
    size, rest = divmod(shape[0], groups * (queries + 2))
    if rest or groups * queries != heads:
        raise ProjectionError(
            f"{name}: {shape[0]} rows do not split into {heads} heads in {groups} groups, as config.json says"
        )
    return _interleaved(groups, queries, size)


def head_counts(name: str, config: Config) -> tuple[int, int]:
    """How many heads the queries have, and how many the keys and values.

    Raises:
        ProjectionError: the configuration does not say; the message begins with ``name``.
    """
    heads = _number(config, name, "num_attention_heads", "n_head")
    if config.get("model_type") in _BY_HEAD:
        return heads, heads
    if config.get("model_type") not in _FALCON:
        return heads, _number(config, name, "num_key_value_heads", default=heads)
    if config.get("new_decoder_architecture"):
        return heads, _number(config, name, "num_kv_heads", "n_head_kv", default=heads)
    return heads, 1 if config.get("multi_query", True) else heads


def _interleaved(groups: int, queries: int, size: int) -> list[Part]:
    """q, k, v where every group holds ``queries`` q heads, a k head and a v head of ``size`` rows each."""
    period = (queries + 2) * size
    offsets = {"q": (0, queries * size), "k": (queries * size, size), "v": ((queries + 1) * size, size)}
    return [
        Part(label, label, tuple(slice(g * period + at, g * period + at + rows) for g in range(groups)))
        for label, (at, rows) in offsets.items()
    ]


def _number(config: Config, name: str, *keys: str, default: int | None = None) -> int:
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if not isinstance(value, int) or value < 1:
        raise ProjectionError(f"{name}: config.json gives no {keys[0]}, which its split into heads needs")
    return value
