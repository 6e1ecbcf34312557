"""`python -m rlspec.kernels.report`: compile every key and write what came of it to compiled.json, beside this file.

The table holds for one release of Triton; a test compares what that release makes now. With ``--check`` nothing is
written: whether another release makes what may be shipped (`make kernels-earlier`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from rlspec.kernels.compiling import compiled, keys

TABLE = Path(__file__).with_name("compiled.json")


def table() -> tuple[dict[str, Any], list[str]]:
    """Every key compiled, by its name, and what must not be shipped of it."""
    rows, problems = {}, []
    for key in keys():
        made = compiled(key)
        rows[key.name] = asdict(made)
        found = made.problems(key)
        problems += [f"{key.name}: {problem}" for problem in found]
        print(f"{key.name}: {made.registers} registers, {made.shared_bytes} bytes shared", *found, flush=True)
    return {"triton": triton.__version__, "kernels": rows}, problems


def committed() -> dict[str, Any]:
    """The table as it stands in the tree."""
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def main() -> int:
    found, problems = table()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems or "--check" in sys.argv[1:]:
        print(f"{len(found['kernels'])} kernels, Triton {found['triton']}, {len(problems)} problems")
        return 1 if problems else 0
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found["kernels"].items())
    TABLE.write_text(f'{{"triton": {json.dumps(found["triton"])},\n "kernels": {{\n{lines}\n}}}}\n')
    print(f"{len(found['kernels'])} kernels, Triton {found['triton']}: {TABLE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
