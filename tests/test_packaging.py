"""What an installation holds, and that the top-level folder kernels/ stands in for no other package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
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
    code = (
        "import rlspec._C, rlspec.kernels.cuda, sys; print('torch' in sys.modules, rlspec.kernels.__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "rlspec.kernels"]


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_source_archive_wheel_and_installation_hold_the_tree(tmp_path: Path) -> None:
    """The archive, the wheel built from it and what pip installs of that: every module, kernel, header and data file."""
    source, archive, wheels, installed = (tmp_path / name for name in ("source", "sdist", "wheels", "site"))
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("csrc", "kernels", "rlspec"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    tree = files_in(source)
    expected = {name for name in tree if name.startswith("rlspec/")}
    expected |= {
        "rlspec/kernels/" + name.removeprefix("kernels/triton/")
        for name in tree
        if name.startswith("kernels/")
    }
    sources = {name for name in tree if name.startswith("csrc/cuda/")}
    assert any(name.endswith(".cu") for name in sources)
    expected |= {"rlspec/kernels/" + name.removeprefix("csrc/") for name in sources}
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(archive)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (packed,) = archive.glob("rlspec-*.tar.gz")
    with tarfile.open(packed) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    # Tests in C++ are run from a checkout.
    assert {name for name in tree if not name.startswith(("csrc/tests/", "csrc/fuzz/"))} <= found

    pip = [sys.executable, "-m", "pip"]
    build_wheel = [
        *pip,
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(wheels),
        str(packed),
    ]
    subprocess.run(build_wheel, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in names if name.startswith("rlspec/_C.") and not name.endswith(".pyi")}
    assert len(compiled) == 1
    assert names - compiled == expected

    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import rlspec._C, rlspec.kernels.cuda, rlspec.models\n"
        "places = rlspec._C.__file__, rlspec.kernels.cuda.__file__, rlspec.models.embedded_model_path()\n"
        "print(*places, sep='\\n')\n"
        "from rlspec.cli.main import main; main(['--version'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *places, version = done.stdout.splitlines()
    assert len(places) == 3 and all(Path(place).is_relative_to(installed) for place in places)
    assert (installed / "bin" / "rlspec").is_file() and version.split()[-1] in wheel.name
