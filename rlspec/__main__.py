"""``python -m rlspec`` is the command ``rlspec``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from rlspec.cli.main import main
    except ModuleNotFoundError as error:
        # Only in a checkout that was never installed: a module of rlspec's own is a fault, and shows as one.
        if error.name is None or error.name.startswith("rlspec"):
            raise
        sys.stderr.write(
            f"Error: {error.name} is not installed; install rlspec with what it needs: "
            "'python -m pip install -e .' in the checkout\n"
        )
        raise SystemExit(2) from None
    main(prog_name="rlspec")
