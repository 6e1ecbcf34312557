"""Skips that are not meant fail, where that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from skips import MEANT, Meant, is_meant

TESTS = Path(__file__).parent
CONFTEST = """
from skips import MEANT, Meant, pytest_addoption, pytest_make_collect_report, pytest_runtest_makereport
MEANT["test_some.py::test_meant"] = (Meant("no GPU", lambda: True),)
MEANT["test_some.py::test_meant_elsewhere"] = (Meant("no GPU", lambda: False),)
"""
SOME = """
import pytest
@pytest.mark.skipif(True, reason="no GPU")
@pytest.mark.parametrize("x", [1, 2])
def test_meant(x): pass
@pytest.mark.skipif(True, reason="no GPU")
def test_meant_elsewhere(): pass
@pytest.mark.skip(reason="no GPU")
def test_in_no_table(): pass
def test_while_it_runs(): pytest.skip("tired")
@pytest.fixture
def absent(): pytest.importorskip("no_such_module")
def test_in_a_fixture(absent): pass
@pytest.mark.xfail
def test_expected_to_fail(): assert False
def test_passes(): pass
"""
MODULE = "import pytest\npytest.importorskip('no_such_module')\ndef test_one(): pass\n"


def outcomes(folder: Path, *flags: str) -> tuple[int, str]:
    """Exit code and closing line of pytest on a small suite, every test of which is run."""
    for name, text in (("conftest.py", CONFTEST), ("test_some.py", SOME), ("test_module.py", MODULE)):
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *flags, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1].partition(" in ")[0]


def test_a_skip_that_is_not_listed_fails_where_that_is_asked_for(tmp_path: Path) -> None:
    # Without the flag: two parameters, four other tests and a module. With it, the two alone;
    # what is skipped before a test begins is an error.
    assert outcomes(tmp_path) == (0, "1 passed, 7 skipped, 1 xfailed")
    assert outcomes(tmp_path, "--strict-skips") == (1, "1 failed, 1 passed, 2 skipped, 1 xfailed, 4 errors")


def test_a_meant_skip_has_one_test_one_reason_and_one_kind_of_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MEANT, "test_a.py::test_one", (Meant("no GPU", lambda: True),))
    monkeypatch.setitem(MEANT, "test_b.py", (Meant("no triton", lambda: True),))
    monkeypatch.setitem(MEANT, "test_c.py", (Meant("no triton", lambda: False),))
    assert is_meant("tests/test_a.py::test_one", "no GPU")
    assert is_meant("test_a.py::Group::test_one[x::y/z-3]", "no GPU") and is_meant(
        "tests/test_b.py::test_any", "no triton"
    )
    assert not is_meant("tests/test_a.py::test_one", "no peft")
    assert not is_meant("tests/test_a.py::test_two", "no GPU") and not is_meant("tests/test_a.py", "no GPU")
    assert not is_meant("tests/test_c.py::test_one", "no triton")


def test_the_table_has_no_stale_lines() -> None:
    for node, skips in MEANT.items():
        file, _, function = node.partition("::")
        text = (TESTS / file).read_text()
        assert f"def {function}(" in text or not function, node
        for skip in skips:
            assert f'"{skip.reason}"' in text, (node, skip.reason)
