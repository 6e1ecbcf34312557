"""`rlspec env`: what a bug report or a table of timings needs to know about the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch


@click.command("env", short_help="Print versions, device and backends.")
def command() -> None:
    """Print the versions, the device, the CPU's capabilities and the backends that rlspec would use here."""
    facts = environment()
    for name, value in facts.items():
        click.echo(f"{name:<{max(map(len, facts))}} {value}")


def environment() -> dict[str, str]:
    """Name -> what was found, as text; "no" for a package that is not installed."""
    import torch

    from rlspec.backend import backend_for, cpu_capabilities
    from rlspec.cli.main import installed_version
    from rlspec.io.cache_folder import default_cache_dir
    from rlspec.linalg import coarse, solvers
    from rlspec.ops.table import TABLE, summary

    facts = {
        "rlspec": installed_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in ("torch", "transformers", "triton", "safetensors", "numpy", "tensorboard", "gymnasium"):
        facts[package] = _version(package)
    capabilities = ", ".join(f"{name} {value}" for name, value in cpu_capabilities().items())
    facts["CPU"] = f"{os.cpu_count()} cores, {capabilities}"
    facts["threads"] = _threads()
    facts["device"] = _devices()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] + [torch.device("cpu")]
    facts["backends"] = ", ".join(f"{device}: {_told(backend_for, device)}" for device in devices)
    for device in devices:
        facts |= {f"{op} on {device}": _told(partial(summary, op), device) for op in TABLE}
        facts[f"coarse products on {device}"] = coarse.summary(device)
        facts[f"small solves on {device}"] = _told(solvers.summary, device)
    facts["extension"] = _extension()
    facts["cache"] = str(default_cache_dir())
    return facts


def _told(ask: Callable[[torch.device], str], device: torch.device) -> str:
    """The answer, or why there is none: what is asked for may run on one device and not on another."""
    from rlspec.errors import BackendError

    try:
        return ask(device)
    except BackendError as error:
        return f"none ({error})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "no"


def _threads() -> str:
    """How many are computed with, of how many processors, and why; how they wait for each other."""
    import torch

    from rlspec.cli.threads import SETTINGS, allowed_cpus, cpu_quota

    quota = cpu_quota()
    told = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    limit = [] if quota is None else [f"a quota of {quota:g}"]
    return ", ".join([f"{torch.get_num_threads()} of {len(allowed_cpus())} allowed", *limit, *told])


def _devices() -> str:
    import torch

    count = torch.cuda.device_count()
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
    return ", ".join(names) or "cpu (no CUDA device)"


def _extension() -> str:
    try:
        from rlspec import _C
    except ImportError as error:
        return f"no ({error})"
    return str(_C.__file__)
