"""A Slurm cluster of one machine: munged, slurmctld and slurmd of this user, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def without_slurm() -> bool:
    """slurmd must be root's to start jobs as their user."""
    return os.geteuid() != 0 or any(shutil.which(name, path=_PATH) is None for name in DAEMONS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """One that runs; what its commands need in the environment. The folder's path must be short: sockets lie there."""
    name, cores = socket.gethostname().partition(".")[0], os.cpu_count() or 1
    settings = f"""
        ClusterName=alone
        SlurmctldHost={name}(127.0.0.1)
        SlurmUser=root
        AuthType=auth/munge
        CredType=cred/munge
        AuthInfo=socket={folder}/munge.socket
        SlurmctldPort={_free_port()}
        SlurmdPort={_free_port()}
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd.pid
        SlurmctldLogFile={folder}/slurmctld.log
        SlurmdLogFile={folder}/slurmd.log
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        MpiDefault=none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        ReturnToService=2
        KillWait=2
        SchedulerParameters=batch_sched_delay=0,sched_interval=1
        JobAcctGatherType=jobacct_gather/none
        AccountingStorageType=accounting_storage/none
        NodeName={name} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000
        PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
    """
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text("\n".join(line.strip() for line in settings.splitlines()))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": _PATH}
    files = [f"--{what}={folder}/munge.{what}" for what in ("socket", "pid-file", "log-file", "seed-file")]
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    try:
        start("munged", "--foreground", "--force", f"--key-file={key}", *files)
        _wait(running, folder, lambda: (folder / "munge.socket").exists())
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-c")
        _wait(
            running, folder, lambda: ask(environment, "sinfo", "--noheader", "--format=%t").strip() == "idle"
        )
        yield environment
    finally:
        if running:
            subprocess.run(["scancel", "--me"], env=environment, capture_output=True, timeout=60)
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # slurmd, while a job of a failed test ends
                process.kill()
                process.wait()


def ask(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm's prints; nothing where it fails."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def _wait(running: Sequence[subprocess.Popen[bytes]], folder: Path, ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not ready():
        ended = [process.args for process in running if process.poll() is not None]
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*log*"))
        assert not ended and time.monotonic() < until, f"{ended} {logs}"
        time.sleep(0.1)
