"""Pickles as plain data: what they name stays a name, what they would call stays a call. Nothing is imported or run.

Python's own unpickler, its imports restricted, still lets a file decide how much memory its memo takes and how deep the
hash of a key goes. This one knows the opcodes of the few files that are read, and no others. What the opcodes mean is
documented in `pickletools` of the standard library.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rlspec.errors import CheckpointError


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names, as ``module.name``."""

    name: str


@dataclass(eq=False, slots=True)
class Made:
    """What a pickle would make by a call: of what, of which arguments, and what it would set in it afterwards."""

    kind: str
    arguments: tuple[Any, ...]
    state: Any = None


#: the kind of what the file that holds the pickle keeps outside it
PERSISTENT = "persistent"

_MARK = object()
# What may be the key of a dictionary: its hash is never that of something nested.
_KEYS = (str, int, Made)


def read_pickle(content: bytes, *, allowed: Callable[[str], bool], where: str, what: str) -> Any:
    """What a pickle describes, of dict, list, tuple, str, int, bool, None, `Named` and `Made`.

    Args:
        content: of protocol 2 or higher.
        allowed: whether such a file may name a class or function, given as ``module.name``.
        where, what: what messages call the file, and what should be in it.

    Raises:
        CheckpointError: it names something else, has an opcode that such files do not have, or is cut off or malformed.
    """
    return _Reader(content, allowed, where, what).read()


class _Reader:
    def __init__(self, content: bytes, allowed: Callable[[str], bool], where: str, what: str) -> None:
        self._content, self._allowed = content, allowed
        self._where, self._what = where, what
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        content, opcodes, stop = self._content, _OPCODES, ord(".")
        try:
            while (code := content[self._at]) != stop:
                self._at += 1
                opcodes[code](self)
            (found,) = self._stack
        except CheckpointError:
            raise
        except KeyError as error:
            self._refuse(f"is malformed: {error} at byte {self._at}")
        except (IndexError, ValueError, TypeError, AttributeError, struct.error):
            self._refuse(f"is cut off or malformed at byte {self._at} of {len(content)}")
        return found

    def _refuse(self, found: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: {found}, which is not {self._what}")

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) < count:
            raise IndexError
        self._at += count
        return taken

    def _skip(self, count: int) -> None:
        self._take(count)

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._content.index(b"\n", self._at)
        line = self._take(end - self._at).decode()
        self._at += 1
        return line

    def _after_mark(self) -> list[Any]:
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _MARK:  # IndexError below the first
            place -= 1
            if place < 0:
                raise IndexError
        found = stack[place + 1 :]
        del stack[place:]
        return found

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        full = f"{module}.{name}"
        if not self._allowed(full):
            self._refuse(f"names {full[:200]!r}")
        self._stack.append(Named(full))

    def _call(self, kind: Any, arguments: Any) -> None:
        if not (isinstance(kind, Named) and isinstance(arguments, tuple)):
            raise TypeError
        self._stack.append(Made(kind.name, arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        made = self._stack[-1]
        if not isinstance(made, Made):
            raise TypeError
        made.state = state

    def _set_items(self, items: list[Any]) -> None:
        held = self._stack[-1]
        if not isinstance(held, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                self._refuse(f"has a {type(key).__name__} as the key of a dictionary")
            held[key] = value

    def _append(self, items: list[Any]) -> None:
        held = self._stack[-1]
        if not isinstance(held, list):
            raise TypeError
        held.extend(items)

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _text(self, count: int) -> None:
        self._stack.append(self._take(count).decode())


def _unknown(code: int) -> Callable[[_Reader], None]:
    def refused(reader: _Reader) -> None:
        reader._refuse(f"has the opcode {bytes([code])!r} at byte {reader._at - 1}")

    return refused


def _pushes(make: Callable[[_Reader], Any]) -> Callable[[_Reader], None]:
    return lambda reader: reader._stack.append(make(reader))


# By their bytes; the comments are the names in pickletools.
_KNOWN: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda r: r._skip(1),  # PROTO
    b"\x95": lambda r: r._skip(8),  # FRAME
    b"(": _pushes(lambda r: _MARK),  # MARK
    b"N": _pushes(lambda r: None),  # NONE
    b"\x88": _pushes(lambda r: True),  # NEWTRUE
    b"\x89": _pushes(lambda r: False),  # NEWFALSE
    b"K": _pushes(lambda r: r._number(1)),  # BININT1
    b"M": _pushes(lambda r: r._number(2)),  # BININT2
    b"J": _pushes(lambda r: struct.unpack("<i", r._take(4))[0]),  # BININT
    b"\x8a": _pushes(lambda r: int.from_bytes(r._take(r._number(1)), "little", signed=True)),  # LONG1
    b"\x8c": lambda r: r._text(r._number(1)),  # SHORT_BINUNICODE
    b"X": lambda r: r._text(r._number(4)),  # BINUNICODE
    b")": _pushes(lambda r: ()),  # EMPTY_TUPLE
    b"\x85": _pushes(lambda r: tuple(r._pop(1))),  # TUPLE1
    b"\x86": _pushes(lambda r: tuple(r._pop(2))),  # TUPLE2
    b"\x87": _pushes(lambda r: tuple(r._pop(3))),  # TUPLE3
    b"t": _pushes(lambda r: tuple(r._after_mark())),  # TUPLE
    b"]": _pushes(lambda r: []),  # EMPTY_LIST
    b"a": lambda r: r._append(r._pop(1)),  # APPEND
    b"e": lambda r: r._append(r._after_mark()),  # APPENDS
    b"}": _pushes(lambda r: {}),  # EMPTY_DICT
    b"s": lambda r: r._set_items(r._pop(2)),  # SETITEM
    b"u": lambda r: r._set_items(r._after_mark()),  # SETITEMS
    b"c": lambda r: r._name(r._line(), r._line()),  # GLOBAL
    b"\x93": lambda r: r._name(*r._pop(2)),  # STACK_GLOBAL
    b"R": lambda r: r._call(*r._pop(2)),  # REDUCE
    b"\x81": lambda r: r._call(*r._pop(2)),  # NEWOBJ
    b"b": lambda r: r._build(),  # BUILD
    b"Q": _pushes(lambda r: Made(PERSISTENT, tuple(r._pop(1)))),  # BINPERSID
    b"\x94": lambda r: r._remember(len(r._memo)),  # MEMOIZE
    b"q": lambda r: r._remember(r._number(1)),  # BINPUT
    b"r": lambda r: r._remember(r._number(4)),  # LONG_BINPUT
    b"h": lambda r: r._recall(r._number(1)),  # BINGET
    b"j": lambda r: r._recall(r._number(4)),  # LONG_BINGET
}
_OPCODES = [_KNOWN.get(bytes([code]), _unknown(code)) for code in range(256)]
