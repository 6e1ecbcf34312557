"""Several traces in one row, each token of a common prefix once: no padding to speak of.

    row      a b c | d e f | x y | g        traces  a b c d e f,  a b c x y,  a b c g
    sees     every token its own trace, through a mask of four axes; positions count within the trace

Attention alone can be told what to see, and not every model lets itself be told: that is measured.

Axes: R rows, W columns, S answer tokens of all traces, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlspec.train.batch import accepts
from rlspec.train.modes import evaluation_mode
from rlspec.train.traces import Trace, single

#: Rows may be this much longer than the longest trace, or this long: attention grows with the square of it.
_STRETCH, _WIDTH = 2.0, 128
_CAPACITIES = 8  # tried between the longest trace and the longest row


@dataclass(frozen=True)
class Packed:
    """Traces laid out in rows; see the module's drawing."""

    ids: Tensor  # (R, W) int64
    positions: Tensor  # (R, W) int64
    mask: Tensor  # (R, 1, W, W) bool, True where the first W sees the second
    rows: Tensor  # (S,) int64, where the token before each answer token stands
    columns: Tensor  # (S,) int64


def pack(traces: Sequence[Trace], pad: int) -> Packed:
    """Lay traces out in as few tokens as a few attempts find."""
    bins = _fill(traces)
    laid = [_lay([traces[i].ids for i in members]) for members in bins]
    width = max(len(ids) for ids, _ in laid)
    ids = torch.full((len(bins), width), pad)
    positions = torch.zeros(len(bins), width, dtype=torch.int64)
    # A column of padding sees itself, so that no row of the attention is empty.
    mask = torch.eye(width, dtype=torch.bool).repeat(len(bins), 1, 1, 1)
    before: list[tuple[list[int], list[int]]] = [([], [])] * len(traces)
    for row, (members, (row_ids, paths)) in enumerate(zip(bins, laid)):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        for i, path in zip(members, paths):
            where = torch.tensor(path)
            positions[row, where] = torch.arange(len(path))
            # A token of a common prefix sees the same from every trace that it belongs to.
            mask[row, 0, where[:, None], where] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
            columns = [path[p - 1] for first, end in traces[i].answers for p in range(first, end)]
            before[i] = ([row] * len(columns), columns)
    return Packed(
        ids,
        positions,
        mask,
        torch.tensor([row for rows, _ in before for row in rows]),
        torch.tensor([column for _, columns in before for column in columns]),
    )


def _lay(traces: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The ids of one row, and the columns that each trace runs through."""
    ids: list[int] = []
    known: dict[tuple[int, int], int] = {}
    paths: list[list[int]] = []
    for trace in traces:
        path: list[int] = []
        column = -1
        for token in trace:
            step = (column, token)
            if step not in known:
                known[step] = len(ids)
                ids.append(token)
            column = known[step]
            path.append(column)
        paths.append(path)
    return ids, paths


def _fill(traces: Sequence[Trace]) -> list[list[int]]:
    """Traces of each row: the longest first, each into the row where it adds the fewest tokens, at the capacity
    that takes the fewest tokens in all.
    """
    lengths = [len(trace.ids) for trace in traces]
    shared = _common_prefixes([trace.ids for trace in traces])
    order = sorted(range(len(traces)), key=lambda i: -lengths[i])
    longest = lengths[order[0]]
    widest = max(_WIDTH, int(_STRETCH * longest))
    capacities = sorted({longest + (widest - longest) * n // _CAPACITIES for n in range(_CAPACITIES + 1)})
    best: tuple[int, list[list[int]]] | None = None
    for capacity in capacities:
        bins: list[list[int]] = []
        used: list[int] = []
        for i in order:
            added = [lengths[i] - max(shared[i][j] for j in members) for members in bins]
            fitting = [n for n in range(len(bins)) if used[n] + added[n] <= capacity]
            if fitting:
                n = min(fitting, key=lambda n: (added[n], -used[n]))
                bins[n].append(i)
                used[n] += added[n]
            else:
                bins.append([i])
                used.append(lengths[i])
        tokens = len(bins) * max(used)
        if best is None or tokens < best[0]:
            best = tokens, bins
    assert best is not None
    return best[1]


def _common_prefixes(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens that each sequence has in common with each other one at their beginnings."""
    count = len(sequences)
    order = sorted(range(count), key=lambda i: list(sequences[i]))
    shared = [[0] * count for _ in range(count)]
    # In lexicographic order the common prefix of two is the shortest of those of the neighbours between them.
    steps = [common_prefix(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]
    for n, i in enumerate(order):
        least = len(sequences[i])
        for m in range(n + 1, count):
            least = min(least, steps[m - 1])
            j = order[m]
            shared[i][j] = shared[j][i] = least
    return shared


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning of both."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# A matter of the architecture, not of the weights: measured once a model.
_measured: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def can_pack(model: Any, pad: int, longest: int) -> bool:
    """Whether packed traces of at most ``longest`` tokens get the logits that they get alone.

    A mask of four axes takes the place of the model's own, and with it of its windows, if it has any.
    """
    if model not in _measured:
        _measured[model] = _measure(model, pad)
    return _measured[model] and longest <= _window(model)


def _window(model: Any) -> float:
    """Tokens back that every layer sees."""
    settings = model.config.get_text_config().to_dict()
    windows = [
        value
        for key, value in settings.items()
        if ("window" in key or "chunk" in key) and type(value) is int and value > 0
        if key != "max_window_layers"  # Qwen's number of layers without one
    ]
    return min(windows, default=float("inf"))


@torch.no_grad()
def _measure(model: Any, pad: int) -> bool:
    implementation = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if not accepts(model, "position_ids") or implementation not in ("sdpa", "eager"):
        return False
    device = next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]
    a = [(pad + 1 + i) % rows for i in range(12)]
    traces = [single(a[:4], a[4:8]), single(a[:2], a[8:12]), single(a[5:7], a[1:4])]
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        alone = [
            model(torch.tensor([trace.ids], device=device), use_cache=False).logits[0, first - 1 : end - 1]
            for trace in traces
            for first, end in trace.answers
        ]
        try:
            together, _ = packed_forward(model, traces, pad)
        # Code of the model's author that was never given such a mask: it may fail in any way.
        except Exception:
            return False
    wanted = torch.cat(alone)
    bound = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max()
    same = together.shape == wanted.shape and bool(((together - wanted).abs() <= bound).all())
    return bool(bound > 0) and same


def packed_forward(model: Any, traces: Sequence[Trace], pad: int) -> tuple[Tensor, Tensor]:
    """Logits (S, V) that predict each answer token of some traces, and the states (S, H) the output head made
    them of. The head does not run on other tokens.
    """
    packed = pack(traces, pad)
    head = model.get_output_embeddings()
    device, dtype = head.weight.device, model.get_input_embeddings().weight.dtype
    rows, columns = packed.rows.to(device), packed.columns.to(device)
    states: list[Tensor] = []

    def select(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(inputs[0][rows, columns])
        return (states[0][None], *inputs[1:])

    # What is added to the scores: all implementations of attention take that form, eager ones no other.
    mask = torch.zeros(packed.mask.shape, dtype=dtype).masked_fill_(~packed.mask, torch.finfo(dtype).min)
    hook = head.register_forward_pre_hook(select)
    try:
        output = model(
            packed.ids.to(device),
            attention_mask=mask.to(device),
            position_ids=packed.positions.to(device),
            use_cache=False,
        )
    finally:
        hook.remove()
    return output.logits[0], states[0]
