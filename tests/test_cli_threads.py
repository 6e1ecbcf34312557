"""Threads on a shared machine: quotas of control groups, the user's own settings, and what torch then does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlspec.cli import threads
from rlspec.cli.threads import WAITING, cpu_quota, physical_cores, share_the_machine

GROUPS = "sys/fs/cgroup"


def machine(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files of /proc and /sys."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "50000"}, 0.5),
        # The innermost group has no limit of its own, one around it has, and the outermost a wider one.
        (
            {
                "proc/self/cgroup": "0::/a/b/c",
                f"{GROUPS}/a/b/c/cpu.max": "max 100000",
                f"{GROUPS}/a/b/cpu.max": "200000 100000",
                f"{GROUPS}/a/cpu.max": "800000 100000",
            },
            2.0,
        ),
        # A container that sees its own group only, under a path of the host.
        ({"proc/self/cgroup": "0::/../../docker/4711", f"{GROUPS}/cpu.max": "300000 100000"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/1\n1:name=systemd:/docker/1\n0::/",
                f"{GROUPS}/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "250000",
                f"{GROUPS}/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/docker/1",
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "400000",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # cpuset and cpuacct are no cpu.
        (
            {
                "proc/self/cgroup": "2:cpuset,cpuacct:/x",
                f"{GROUPS}/cpuset,cpuacct/x/cpu.cfs_quota_us": "100000",
                f"{GROUPS}/cpuset,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "many few"}, None),
        ({"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "100000 0"}, None),
        ({"proc/self/cgroup": "no colons", f"{GROUPS}/cpu.max": ""}, None),
    ],
    ids=[
        "no groups", "v2", "v2 no limit", "v2 without a period", "v2 nested", "v2 container", "v1", "v1 container",
        "v1 no limit", "v1 other controllers", "no numbers", "no period", "no groups file",
    ],
)  # fmt: skip
def test_quotas_of_control_groups(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, files)) == quota


def test_two_threads_of_a_core_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: {0, 1, 2, 5})
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 5: "1,5"}
    files = {topology.format(cpu): text for cpu, text in siblings.items()}
    assert physical_cores(machine(tmp_path, files)) == 3
    assert physical_cores(tmp_path / "elsewhere") == 4


LIMITED = {"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "150000 100000"}


def after(root: Path, **given: str) -> dict[str, str]:
    environment = dict(given)
    share_the_machine(environment, root=root, loaded=False)
    return environment


def test_a_quota_sets_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: set(range(8)))
    assert after(machine(tmp_path, LIMITED)) == {**WAITING, "OMP_NUM_THREADS": "2"}
    assert after(tmp_path / "no quota") == WAITING
    (tmp_path / GROUPS / "cpu.max").write_text("20000 100000")
    assert after(tmp_path)["OMP_NUM_THREADS"] == "1"
    (tmp_path / GROUPS / "cpu.max").write_text("6400000 100000")
    assert after(tmp_path)["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "KMP_LIBRARY"])
def test_whoever_set_how_to_wait_keeps_it(name: str, tmp_path: Path) -> None:
    assert after(tmp_path, **{name: "x"}) == {name: "x"}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT"])
def test_whoever_set_a_number_of_threads_keeps_it(name: str, tmp_path: Path) -> None:
    assert after(machine(tmp_path, LIMITED), **{name: "3"}) == {**WAITING, name: "3"}


LAUNCHED = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}


def launcher(root: Path, *settings: str) -> Path:
    """A file system in which this process's parent was started with these."""
    return machine(root, {f"proc/{os.getppid()}/environ": "\0".join(settings)})


def test_torchrun_s_one_thread_becomes_a_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: set(range(18)))
    root = launcher(tmp_path, "HOME=/root", "NOT_OMP_NUM_THREADS=1")
    assert after(root, **LAUNCHED) == {**LAUNCHED, **WAITING, "OMP_NUM_THREADS": "4"}
    assert after(root, **{**LAUNCHED, "LOCAL_WORLD_SIZE": "32"})["OMP_NUM_THREADS"] == "1"
    machine(root, {"proc/self/cgroup": "0::/", f"{GROUPS}/cpu.max": "850000 100000"})
    assert after(root, **LAUNCHED)["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    "given",
    [
        {"LOCAL_WORLD_SIZE": "1"},  # torchrun leaves one process alone
        {"LOCAL_WORLD_SIZE": "many"},
        {"OMP_NUM_THREADS": "3"},
        {"MKL_NUM_THREADS": "5"},
        {"OMP_THREAD_LIMIT": "2"},
    ],
    ids=str,
)
def test_what_torchrun_did_not_set_stays(given: dict[str, str], tmp_path: Path) -> None:
    environment = {**LAUNCHED, **given}
    assert after(launcher(tmp_path, "HOME=/root"), **environment) == {**environment, **WAITING}
    alone = {name: value for name, value in LAUNCHED.items() if name != "TORCHELASTIC_RUN_ID"}
    assert after(tmp_path, **alone) == {**alone, **WAITING}


def test_one_thread_that_the_user_exported_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: set(range(16)))
    exported = launcher(tmp_path / "told", "HOME=/root", "OMP_NUM_THREADS=1")
    assert after(exported, **LAUNCHED) == {**LAUNCHED, **WAITING}
    assert after(tmp_path / "cannot be read", **LAUNCHED) == {**LAUNCHED, **WAITING}
    assert after(launcher(tmp_path / "not told"), **LAUNCHED)["OMP_NUM_THREADS"] == "4"


TELLS = """
import os
from rlspec.cli.threads import processes_of_torchrun
print("told", processes_of_torchrun(os.environ))
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
@pytest.mark.parametrize(("exported", "found"), [({}, "told 2"), ({"OMP_NUM_THREADS": "1"}, "told None")])
def test_torchrun_is_told_from_the_user(exported: dict[str, str], found: str, tmp_path: Path) -> None:
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | exported
    (tmp_path / "tells.py").write_text(TELLS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "tells.py")], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines().count(found) == 2


def test_nothing_is_set_once_torch_is_loaded(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    share_the_machine(environment, root=machine(tmp_path, LIMITED))  # this process has torch
    assert environment == {}


# The variables as they are when torch is first asked for, and what OpenMP says it has read.
AT_IMPORT = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch:", os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
from rlspec.cli.main import main
main(["env"])
"""


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "3000 None"), ({"OMP_WAIT_POLICY": "passive"}, "None passive")]
)
def test_a_command_sets_it_before_torch_is_loaded_and_env_shows_it(given: dict[str, str], seen: str) -> None:
    unset = (*WAITING, "OMP_WAIT_POLICY", "KMP_LIBRARY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_NUM_THREADS": "1", **given}
    done = subprocess.run(
        [sys.executable, "-c", AT_IMPORT], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[0] == f"torch: {seen}"
    shown = next(line for line in done.stdout.splitlines() if line.startswith("threads"))
    assert "1 of" in shown and "OMP_NUM_THREADS=1" in shown
    assert ("GOMP_SPINCOUNT=3000" in shown) == (not given) and ("passive" in shown) == bool(given)
