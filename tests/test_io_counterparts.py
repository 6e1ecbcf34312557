"""Names that differ in their prefix: the definition, looked up in every name, is what the table of endings is held to."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from restore_toys import pair, rewrite

from rlspec.errors import TensorError
from rlspec.io import counterparts
from rlspec.io.counterparts import Names
from rlspec.io.index import CheckpointIndex
from rlspec.io.stacks import in_tower
from rlspec.io.weights import find_tensor
from rlspec.restore.plan import _under_names_of

PARTS = ("model", "layers", "0", "11", "q", "weight", "visual", "")


def one_by_one(name: str, names: Collection[str]) -> list[str]:
    """The definition: those with the longest common end, of two parts at least, that holds the layer's number."""
    if name in names:
        return [name]
    parts = name.split(".")
    for start in range(len(parts) - 1):
        rest = ".".join(parts[start:])
        found = [n for n in names if (n == rest or n.endswith(f".{rest}")) and in_tower(n) == in_tower(name)]
        if found:
            return found
        if parts[start].isdigit():
            break
    return []


def test_the_table_gives_what_looking_at_every_name_gives() -> None:
    draw = random.Random(0)

    def some_name() -> str:
        return ".".join(draw.choice(PARTS) for _ in range(draw.randint(1, 5)))

    counts: dict[int, int] = {}
    for _ in range(300):
        names = list(dict.fromkeys(some_name() for _ in range(draw.randint(1, 60))))
        table = Names(names)
        for name in (some_name() for _ in range(30)):
            found = one_by_one(name, names)
            assert table.counterparts(name) == found, (name, names)
            assert table.counterpart(name) == (found[0] if len(found) == 1 else None)
            counts[min(len(found), 2)] = counts.get(min(len(found), 2), 0) + 1
    assert min(counts[0], counts[1], counts[2]) > 100


def test_names_are_gone_through_once_however_many_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of another prefix: looked at one by one, the work would grow with the square of its tensors."""
    base, tuned = pair(tmp_path)
    rewrite(base, lambda t: t.update({f"llm.{name}": t.pop(name) for name in list(t)}))
    seen: list[str] = []

    def counted(name: str) -> bool:
        seen.append(name)
        return in_tower(name)

    monkeypatch.setattr(counterparts, "in_tower", counted)
    there, here = CheckpointIndex.open(base), CheckpointIndex.open(tuned)
    assert here.tensors.keys() <= _under_names_of(here, there).tensors.keys()
    assert len(seen) <= len(there.tensors) + len(here.tensors)


def test_two_that_could_be_meant_are_told() -> None:
    names = Names(["a.layers.0.q", "b.layers.0.q"])
    with pytest.raises(
        TensorError, match=r"2 tensors in there could be it, a\.layers\.0\.q and b\.layers\.0\.q"
    ):
        find_tensor("layers.0.q", names, "there")
    assert find_tensor("c.layers.0.q", {"layers.0.q": torch.ones(1)}, "there") == "layers.0.q"
