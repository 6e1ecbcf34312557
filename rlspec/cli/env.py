"""`rlspec env`: what a bug report or a table of timings needs to know about the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import click


@click.command("env", short_help="Print versions, device and backends.")
def command() -> None:
    """Print the versions, the device, the CPU's capabilities and the backends that rlspec would use here."""
    for name, value in environment().items():
        click.echo(f"{name:<14} {value}")


def environment() -> dict[str, str]:
    """Name -> what was found, as text; "no" for a package that is not installed."""
    import torch

    from rlspec.backend import backend_for, cpu_capabilities
    from rlspec.cli.main import installed_version
    from rlspec.io.cache_folder import default_cache_dir

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
    backends = {kind: backend_for(kind) for kind in (["cuda"] if torch.cuda.is_available() else []) + ["cpu"]}
    facts["backends"] = ", ".join(f"{kind}: {backend}" for kind, backend in backends.items())
    facts["extension"] = _extension()
    facts["cache"] = str(default_cache_dir())
    return facts


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
