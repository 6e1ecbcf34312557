"""A checkout whose extension was never built, or was built for another Python: one line that says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlspec

# An editable install would lend its extension to any package called rlspec.
RUN = """
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path.insert(0, "")
exec(sys.argv.pop(1))
sys.argv[0] = "rlspec"
runpy.run_module("rlspec", run_name="__main__", alter_sys=True)
"""
DO = "build it with 'python -m pip install -e .' in the folder above"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__")
    shutil.copytree(Path(rlspec.__file__).parent, folder / "rlspec", ignore=ignored)
    return folder


def run(checkout: Path, *arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, first, *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_help_and_env_work_without_the_extension(checkout: Path) -> None:
    assert "Commands:" in run(checkout, "--help").stdout
    facts = run(checkout, "env")
    assert facts.returncode == 0
    (line,) = (line for line in facts.stdout.splitlines() if line.startswith("extension"))
    assert "no (" in line and DO in line


def test_a_command_that_needs_the_extension_says_what_to_do(checkout: Path) -> None:
    done = run(checkout, "restore", "--base", "a", "--tuned", "b", "--out", "c")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"Error: {checkout / 'rlspec'}: the compiled part of rlspec is not built")
    assert DO in done.stderr and done.stderr.count("\n") == 1


def test_weights_in_memory_are_measured_without_the_extension(checkout: Path) -> None:
    code = (
        "import torch; from rlspec import SpectralBasis, SpectralTracker\n"
        "weights = {'model.layers.0.self_attn.q_proj.weight': torch.eye(4)}\n"
        "basis = SpectralBasis.from_tensors(weights, modules='q', rank=2)\n"
        "print(SpectralTracker(basis).measure(weights, step=1).rows[0]['delta_frobenius']); raise SystemExit"
    )
    done = run(checkout, first=code)
    assert done.stdout == "0.0\n", done.stderr


def test_an_extension_that_does_not_load_says_why(checkout: Path, tmp_path: Path) -> None:
    from rlspec import _C

    shutil.copytree(checkout, tmp_path / "copy")
    (tmp_path / "copy" / "rlspec" / Path(_C.__file__ or "").name).write_bytes(b"not a library")
    done = run(tmp_path / "copy", "restore", "--base", "a", "--tuned", "b", "--out", "c")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be loaded (" in done.stderr and DO in done.stderr


def test_a_checkout_without_its_dependencies_says_what_to_install(checkout: Path) -> None:
    done = run(checkout, "--help", first="sys.modules['click'] = None")
    assert done.returncode == 2
    assert done.stderr == (
        "Error: click is not installed; install rlspec with what it needs: "
        "'python -m pip install -e .' in the checkout\n"
    )
