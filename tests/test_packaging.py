"""What an installation holds, and that the top-level folder kernels/ stands in for no other package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# transformers probes for a package called `kernels`; a regular package of that name in the working directory
# would be executed in its place. A folder without __init__.py gives at most an empty namespace, without origin.
PROBE = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"


def origin_of_kernels(folder: Path) -> str:
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_kernels_folder_is_not_imported_as_kernels() -> None:
    found = origin_of_kernels(ROOT)
    assert found == "None" or not Path(found).is_relative_to(ROOT)
    assert not list(ROOT.glob("kernels/__init__.py")) and not list(ROOT.glob("tests/kernels"))


def test_an_init_file_there_would_be(tmp_path: Path) -> None:
    """The broken twin: with __init__.py, the same probe does find the folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert Path(origin_of_kernels(tmp_path)).is_relative_to(tmp_path)


def test_the_mapped_package_and_the_extension_import_from_anywhere(tmp_path: Path) -> None:
    code = "import rlspec._C, rlspec.kernels, sys; print('torch' in sys.modules, rlspec.kernels.__name__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "rlspec.kernels"]
