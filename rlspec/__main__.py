"""``python -m rlspec`` is the command ``rlspec``."""

from __future__ import annotations

from rlspec.cli.main import main

if __name__ == "__main__":
    main(prog_name="rlspec")
