"""Random safetensors files with faults of structure and of single bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_DTYPES = list(BITS)
_DATA = bytes(range(1, 251)) * 8  # no two places look alike, so that offsets are compared by what lies there

# Numbers at which arithmetic goes wrong, and what is no number of a header.
_NUMBERS = [
    *_words("0 1 2 3 7 8 9 -0 -1 -8 1.0 8e0 1e0 0.5 01 +1 0x8 1_0"),
    *(str(2**bits + more) for bits in (31, 32, 53, *range(59, 66)) for more in (-8, -1, 0, 1, 2, 8)),
    *_words("1e19 1e308 1e309 -1e309 1e999999999999 1e-999999999999 0e999999999999"),
    *("9" * 400, "1.7976931348623157e308", "1.8e308"),
    *_words('NaN Infinity null true "8" [8] {} []'),
    "",
]
_PREFIXES = [0, 1, 7, 8, 10**8 - 1, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 9, 2**64 - 8, 2**64 - 1]
_VALUES = [
    *_words(r"""null true false 0 -1 1.5e3 "x" "\ud83d\ude00" "\ud800" "\u0000" [] {}"""),
    *_words("1e308 1.7976931348623157e308 -1.8e308 1e309 -1e999 1e-999 0e999"),
    *("9" * 308, "9" * 400),
    *_words(r'''{"a":1,"a":2} [[1,{}],null] - nul "\x" [1,] {"a":1,} tru "'''),
]
_NAMES = ["a", "b", "c", "", "é", *_words(r"\u0061 \ud83d\ude00 __metadata__ \u005f_metadata__ dtype"), "a b"]
_METADATA = [
    *_words("""null {} {"format":"pt"} {"a":"1","a":"2"} {"a":null} {"a":1} [] "" 0 nul {"""),
    *(" null ", r'{"a":"1","\u0061":"2"}', '{"":""}', '{"a":{}}'),
]
_SPACE = [" ", "\t", "\n", "\r", "  ", "\v", "\f", "\0", "\u00a0", "\ufeff"]
_BYTES = b'{}[]",:019e-.\\u \x00\x7f\x80\xc0\xed\xff'


def file_of(header: str | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def random_file(rng: random.Random) -> bytes:
    """A file of up to four tensors with up to three faults, made where each can do harm."""
    below, pick = rng.random, rng.choice
    header: list[list[Any]] = []  # [name, [[key, text], ...]]; a text in place of the list is the whole entry
    at = 0
    for number in range(int(below() * 5)):
        dtype = pick(_DTYPES)
        shape = [int(below() * 4) for _ in range(int(below() * 3))]
        if BITS[dtype] < 8:
            shape.append(8 // (2 if BITS[dtype] == 4 else 1))
        size = BITS[dtype]
        for axis in shape:
            size *= axis
        end = at + size // 8
        members = [
            ["dtype", f'"{dtype}"'],
            ["shape", str(shape)],
            ["data_offsets", f"[{at},{end}]"],
        ]
        header.append([f"t{number}", members])
        at = end
    if below() < 0.2:
        rng.shuffle(header)
    faults = int(below() * 4)
    files: list[Callable[[bytes, random.Random], bytes]] = []
    for _ in range(faults):
        fault = pick(_FAULTS)
        if fault in _FILE_FAULTS:
            files.append(fault)
        else:
            fault(header, rng)
    entries = []
    for name, entry in header:
        if not isinstance(entry, str):
            entry = "{" + ",".join(f'"{key}":{value}' for key, value in entry) + "}"
        entries.append(f'"{name}":{entry}')
    content = file_of("{" + ",".join(entries) + "}", _DATA[:at])
    for spoil in files:
        content = spoil(content, rng)
    return content


def _member(header: list[list[Any]], rng: random.Random) -> list[str] | None:
    """A member of an entry, to be changed."""
    entries = [entry for _, entry in header if not isinstance(entry, str) and entry]
    return rng.choice(rng.choice(entries)) if entries else None


def _other_number(header: list[list[Any]], rng: random.Random) -> None:
    """One number of a shape or of offsets."""
    member = _member(header, rng)
    if member is not None and member[1].startswith("["):
        numbers = member[1].strip("[]").split(",")
        numbers[int(rng.random() * len(numbers))] = rng.choice(_NUMBERS)
        member[1] = "[" + ",".join(numbers) + "]"


def _shifted_number(header: list[list[Any]], rng: random.Random) -> None:
    """An offset or axis off by a little: overlaps, gaps, tensors on the same bytes, shapes larger than their span."""
    member = _member(header, rng)
    if member is not None and member[1].startswith("["):
        numbers = member[1].strip("[]").split(",")
        where = int(rng.random() * len(numbers))
        if numbers[where].strip().isdecimal():
            numbers[where] = str(int(numbers[where]) + rng.choice((-8, -4, -1, 1, 4, 8)))
        member[1] = "[" + ",".join(numbers) + "]"


def _moved(header: list[list[Any]], rng: random.Random) -> None:
    """A tensor that lies elsewhere: gaps, overlaps, ends past 64 bits."""
    member = _member(header, rng)
    if member is not None and member[0] == "data_offsets":
        numbers = member[1].strip("[]").split(",")
        by = rng.choice((-8, -1, 1, 8, 2**32, 2**63, 2**64 - 16, 2**64 - 8))
        if all(number.isdecimal() for number in numbers):
            member[1] = "[" + ",".join(str(int(number) + by) for number in numbers) + "]"


def _other_length(header: list[list[Any]], rng: random.Random) -> None:
    """A number more, or less, in a list."""
    member = _member(header, rng)
    if member is not None and member[1].startswith("["):
        numbers = [n for n in member[1].strip("[]").split(",") if n.strip()]
        if numbers and rng.random() < 0.5:
            numbers.pop()
        else:
            numbers.insert(0, rng.choice(("0", "1", rng.choice(_NUMBERS))))
        member[1] = "[" + ",".join(numbers) + "]"


def _other_dtype(header: list[list[Any]], rng: random.Random) -> None:
    names = (*_DTYPES, "f32", "F128", "", "F8_E4M3FN", "F32 ", "\\u00463\\u0032")
    member = _member(header, rng)
    if member is not None and member[0] == "dtype":
        name = rng.choice(names)
        member[1] = rng.choice(
            (f'"{name}"', f'{{"{name}":null}}', f'{{"{name}":[]}}', name, "null", "[]", "7")
        )


def _other_value(header: list[list[Any]], rng: random.Random) -> None:
    member = _member(header, rng)
    if member is not None:
        member[1] = rng.choice(_VALUES)


def _unknown_member(header: list[list[Any]], rng: random.Random) -> None:
    entries = [entry for _, entry in header if not isinstance(entry, str)]
    if entries:
        entry = rng.choice(entries)
        entry.insert(int(rng.random() * (len(entry) + 1)), [rng.choice(_NAMES), rng.choice(_VALUES)])


def _lost_member(header: list[list[Any]], rng: random.Random) -> None:
    entries = [entry for _, entry in header if not isinstance(entry, str) and entry]
    if entries:
        entry = rng.choice(entries)
        entry.pop(int(rng.random() * len(entry)))


def _member_twice(header: list[list[Any]], rng: random.Random) -> None:
    entries = [entry for _, entry in header if not isinstance(entry, str) and entry]
    if entries:
        entry = rng.choice(entries)
        entry.append(list(rng.choice(entry)))


def _entry_twice(header: list[list[Any]], rng: random.Random) -> None:
    """Under the same name, or as a second tensor on the same bytes."""
    if header:
        name, entry = rng.choice(header)
        copy = entry if isinstance(entry, str) else [list(member) for member in entry]
        where = int(rng.random() * (len(header) + 1))
        header.insert(where, [name if rng.random() < 0.5 else rng.choice(_NAMES), copy])


def _other_entry(header: list[list[Any]], rng: random.Random) -> None:
    """An entry that is no object: also the three values in a list."""
    if header:
        item = rng.choice(header)
        listed = item[1] if isinstance(item[1], str) else "[" + ",".join(value for _, value in item[1]) + "]"
        item[1] = rng.choice((listed, rng.choice(_VALUES)))


def _other_name(header: list[list[Any]], rng: random.Random) -> None:
    if header:
        rng.choice(header)[0] = rng.choice(_NAMES)


def _escaped_key(header: list[list[Any]], rng: random.Random) -> None:
    member = _member(header, rng)
    if member is not None and member[0]:
        member[0] = f"\\u{ord(member[0][0]):04x}" + member[0][1:]


def _metadata(header: list[list[Any]], rng: random.Random) -> None:
    where = int(rng.random() * (len(header) + 1))
    header.insert(where, [rng.choice(("__metadata__", "_\\u005fmetadata__")), rng.choice(_METADATA)])


def _deep(header: list[list[Any]], rng: random.Random) -> None:
    entries = [entry for _, entry in header if not isinstance(entry, str)]
    if entries:
        levels = rng.choice((1, 30, 31, 123, 124, 125, 126, 127, 128, 300))
        opened, closed = rng.choice((("[", "]"), ('{"x":', "}")))
        rng.choice(entries).append(["x", opened * levels + "0" + closed * levels])


def _space(content: bytes, rng: random.Random) -> bytes:
    """Something like white space beside a mark of the header, or at its ends."""
    text = content[8 : 8 + int.from_bytes(content[:8], "little")]
    places = [0, len(text), *(i for i, byte in enumerate(text) if byte in b'{}[]",:')]
    where = rng.choice(places[:2] if rng.random() < 0.3 else places)
    return file_of(text[:where] + rng.choice(_SPACE).encode() + text[where:], content[8 + len(text) :])


def _other_byte(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, lost or put in, and the header's length made to fit, as a writer's would."""
    length = int.from_bytes(content[:8], "little")
    text = bytearray(content[8 : 8 + length])
    where = int(rng.random() * (len(text) + 1))
    kind = rng.random()
    if kind < 0.4 and where < len(text):
        text[where] = rng.choice(_BYTES)
    elif kind < 0.7:
        text.insert(where, rng.choice(_BYTES))
    else:
        del text[where : where + 1 + int(rng.random() * 4)]
    return file_of(bytes(text), content[8 + length :])


def _other_size(content: bytes, rng: random.Random) -> bytes:
    """Data that are cut off or go on."""
    return content[: -rng.choice((1, 2, 8))] if rng.random() < 0.5 else content + b"\0" * rng.choice((1, 8))


def _other_prefix(content: bytes, rng: random.Random) -> bytes:
    """A header's length that lies, past the end of numbers too."""
    length = int.from_bytes(content[:8], "little") + rng.choice((-1, 1, 8, -8))
    wrong = rng.choice(_PREFIXES) if rng.random() < 0.5 else length
    return struct.pack("<Q", wrong % 2**64) + content[8:]


_FILE_FAULTS = (_space, _other_byte, _other_size, _other_prefix)
_HEADER_FAULTS = (_other_number, _shifted_number, _moved, _moved, _other_length, _other_dtype, _other_value)
_ENTRY_FAULTS = (_unknown_member, _lost_member, _member_twice, _entry_twice, _other_entry, _other_name)
_FAULTS: tuple[Any, ...] = (
    *_HEADER_FAULTS,
    *_ENTRY_FAULTS,
    *(_escaped_key, _metadata, _deep),
    *_FILE_FAULTS,
)
