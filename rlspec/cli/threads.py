"""How many threads the commands compute with, and how long those wait for each other: set for a shared machine.

OpenMP's threads spin at every barrier until the last one arrives. Where another process holds a core, the last one
waits for that core while the others burn theirs, and a command takes several times as long as its share of the
machine asks for (bench/contention_bench.py). Spinning shortly costs little on a machine of one's own.

OpenMP reads its environment when torch is loaded, so this must come before. What the user has set stays; the one thread
that torchrun gives each of several processes, where the user has said nothing, becomes its share of the cores: a base's
decompositions, and those of a GPU's small cores, are LAPACK's.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

# GNU's runtime counts turns, 300000 unless told; a hundred would be too few, and cost half a command's speed where it is
# alone. LLVM's and Intel's count milliseconds, 200 unless told.
WAITING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
_ALSO_ABOUT_WAITING = ("OMP_WAIT_POLICY", "KMP_LIBRARY")
_ABOUT_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
SETTINGS = (*_ABOUT_THREADS, *WAITING, *_ALSO_ABOUT_WAITING)


def share_the_machine(
    environment: MutableMapping[str, str] | None = None, *, root: Path = Path("/"), loaded: bool | None = None
) -> None:
    """Set OpenMP's environment variables where the user has set none about the same thing.

    Args:
        environment: what is read and set; default this process's.
        root: where /proc and /sys lie.
        loaded: whether torch is loaded already, when nothing would have an effect; default: found out.
    """
    if loaded if loaded is not None else "torch" in sys.modules:
        return
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in (*WAITING, *_ALSO_ABOUT_WAITING)):
        environment.update(WAITING)
    processes = processes_of_torchrun(environment, root)
    if processes is None and any(name in environment for name in _ABOUT_THREADS):
        return
    quota, cores = cpu_quota(root), physical_cores(root)
    if quota is not None:
        cores = min(cores, max(1, math.ceil(quota)))
    elif processes is None:
        return  # torch knows the affinity and takes one thread per physical core; of a quota it knows nothing
    environment["OMP_NUM_THREADS"] = str(max(1, cores // (processes or 1)))


def processes_of_torchrun(environment: Mapping[str, str], root: Path = Path("/")) -> int | None:
    """How many processes torchrun started on this machine, if it is torchrun that set their number of threads to one.

    The same is found where the user exported it. What torchrun, this process's parent, was started with tells; where that
    cannot be read, the user is taken to have meant it.
    """
    others = [name for name in _ABOUT_THREADS if name in environment and name != "OMP_NUM_THREADS"]
    if "TORCHELASTIC_RUN_ID" not in environment or environment.get("OMP_NUM_THREADS") != "1" or others:
        return None
    processes = _count(environment.get("LOCAL_WORLD_SIZE"))
    try:
        started_with = (root / f"proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    was_told = any(setting.startswith(b"OMP_NUM_THREADS=") for setting in started_with)
    return processes if processes > 1 and not was_told else None


def allowed_cpus() -> set[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores(root: Path = Path("/")) -> int:
    """Cores behind :func:`allowed_cpus`; where the system does not tell, as many as processors."""
    siblings = set()
    for cpu in allowed_cpus():
        text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(text or str(cpu))
    return len(siblings)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The processor time that the process's control groups grant it, in processors, or None without a limit.

    Reads both versions of control groups; a group is held to the limits of all groups that it lies in.
    """
    quotas = []
    for folder in _cpu_groups(root):
        limit = (_read(folder / "cpu.max") or "max").split()  # version 2: "150000 100000" or "max 100000"
        if len(limit) == 1:
            limit.append("100000")
        old = (
            _read(folder / "cpu.cfs_quota_us"),
            _read(folder / "cpu.cfs_period_us"),
        )  # version 1: -1 is no limit
        for quota, period in (limit[:2], old):
            if _count(quota) and _count(period):
                quotas.append(_count(quota) / _count(period))
    return min(quotas, default=None)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, outwards; some may not exist."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (controllers, "cpu", "cpu,cpuacct") if controllers else ("", "unified")
        # Inside a container the path may be the host's, whose groups do not show: then the outermost folder is ours.
        inner = [part for part in path.split("/") if part not in ("", ".", "..")]
        for mount in dict.fromkeys(mounts):
            for depth in range(len(inner), -1, -1):
                yield root.joinpath("sys/fs/cgroup", mount, *inner[:depth])


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _count(text: str | None) -> int:
    """A number, as of microseconds; 0 for what is none, such as "max" and -1."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
