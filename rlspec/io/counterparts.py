"""Tensors that are one and the same under names that differ in their prefix.

Checkpoints on disk, modules in memory and models without their head disagree about prefixes ("transformer.h.0…" and
"h.0…", "model.language_model…" and "language_model.model…").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property

from rlspec.io.stacks import in_tower


class Names:
    """The names of one place, to be looked up under other prefixes.

    They are gone through once, however many are looked up.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: Collection[str] = names if isinstance(names, dict) else dict.fromkeys(names)

    @classmethod
    def of(cls, names: Names | Iterable[str]) -> Names:
        return names if isinstance(names, Names) else cls(names)

    def counterpart(self, name: str) -> str | None:
        """``name`` itself, or the only one here that differs from it in nothing but its prefix; None where none does."""
        found = self.counterparts(name)
        return found[0] if len(found) == 1 else None

    def counterparts(self, name: str) -> list[str]:
        """What `counterpart` chooses from: several where a module holds more than one model."""
        if name in self._names:
            return [name]
        tower = in_tower(name)
        parts = name.split(".")
        for start in range(len(parts) - 1):
            found = self._by_end.get((".".join(parts[start:]), tower))
            if found:
                return list(found)
            if parts[start].isdigit():
                break
        return []

    @cached_property
    def _by_end(self) -> dict[tuple[str, bool], list[str]]:
        """The names that end in two parts or more, or are those, apart by whether another model's tower holds them."""
        ends: dict[tuple[str, bool], list[str]] = {}
        for name in self._names:
            tower = in_tower(name)
            parts = name.split(".")
            for start in range(len(parts) - 1):
                ends.setdefault((".".join(parts[start:]), tower), []).append(name)
        return ends
