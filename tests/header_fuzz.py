"""Headers by the million, judged by our reader and by the official safetensors library.

    python tests/header_fuzz.py --seed 0 --count 10000000

Both must refuse a file, or both accept it and find the same tensors. Where ours refuses what the library accepts, the
header must hold one of the oddities that ``header_disagreements.json`` lists with their reasons, and without them both
must find the same tensors. The other way round there is no excuse.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
from header_faults import file_of, random_file

from rlspec import _C

LISTED: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("header_disagreements.json").read_text()
)
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def official(content: bytes) -> Tensors | None:
    """What the library finds in a file; None: it refuses it."""
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (part["dtype"], tuple(part["shape"]), bytes(part["data"])) for name, part in found}


def ours(content: bytes) -> Tensors | str:
    """What our reader finds in a file; or the kind of its error."""
    try:
        found, _ = _C.parse_file(content)
    except _C.FileError as error:
        return error.kind
    return {name: (dtype, shape, content[start:end]) for name, dtype, shape, start, end in found}


def excuses(content: bytes, wanted: Tensors) -> set[str]:
    """The listed oddities for which a file is refused that the library accepts; none: it should not be.

    They are taken out of the header, and what is left must be accepted and hold ``wanted``.
    """
    length = int.from_bytes(content[:8], "little")
    found: set[str] = set()
    header = json.loads(content[8 : 8 + length], object_pairs_hook=lambda pairs: _last(pairs, found))
    for name, entry in header.items():
        if name == "__metadata__" or entry is None:
            continue
        if isinstance(entry, list):
            found.add("entry as a list")
            header[name] = entry = dict(zip(("dtype", "shape", "data_offsets"), entry))
        if isinstance(entry["dtype"], dict):
            found.add("dtype as an object")
            (entry["dtype"],) = entry["dtype"]
    mended = file_of(json.dumps(header), content[8 + length :])
    return found if found <= LISTED.keys() and ours(mended) == wanted else set()


def _last(pairs: list[tuple[str, Any]], found: set[str]) -> dict[str, Any]:
    """The object that these members make for a reader that lets the last of equal keys win."""
    if len(content := dict(pairs)) < len(pairs):
        found.add("key given twice")
    return content


def compare(seed: int, count: int) -> Counter[str]:
    """Judge ``count`` files; how often each outcome was, by its name.

    Raises:
        AssertionError: a disagreement that is not listed; holds the file.
    """
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        content = random_file(rng)
        theirs, mine = official(content), ours(content)
        if mine == theirs:
            outcomes["accepted by both"] += 1
        elif theirs is None and isinstance(mine, str):
            outcomes[f"refused by both: {mine}"] += 1
        else:
            found = excuses(content, theirs) if theirs is not None and isinstance(mine, str) else set()
            assert found, f"file {number} of seed {seed}: the library {theirs}, we {mine}: {content!r}"
            outcomes.update(f"refused by us: {name}" for name in found)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    began, step, total = time.perf_counter(), 100_000, Counter[str]()
    for done in range(0, options.count, step):
        total += compare(options.seed + done // step, min(step, options.count - done))
        rate = total.total() / (time.perf_counter() - began)
        print(f"{min(done + step, options.count)} files, {rate:.0f} a second", flush=True)
    for outcome, times in sorted(total.items()):
        print(f"{times:>10}  {outcome}")
    print(f"safetensors {safetensors.__version__}: every disagreement is listed")


if __name__ == "__main__":
    main()
