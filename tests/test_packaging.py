"""What an installation holds, and that the top-level folder kernels/ stands in for no other package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
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


def test_wheel_holds_the_tree(tmp_path: Path) -> None:
    """Built from a copy of what is in the repository, the wheel has every module, kernel and data file."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "kernels", "rlspec"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "rlspec").rglob("*")
        if path.is_file() and path.parent.name != "rlspec.egg-info"
    }
    expected |= {
        "rlspec/kernels/" + path.relative_to(source / "kernels" / "triton").as_posix()
        for path in (source / "kernels" / "triton").rglob("*.py")
    }
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in names if name.startswith("rlspec/_C.") and not name.endswith(".pyi")}
    assert len(compiled) == 1
    assert names - compiled == expected
