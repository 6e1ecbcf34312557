"""What a restoration costs beside one busy process, against the same restoration alone.

``python bench/contention_bench.py`` writes a base and a tuned checkpoint with the q, k and v projections of a layer of
Qwen2.5-7B (or of another model of ``shapes.py``), and runs the true command in a process of its own on two processors,
``rlspec restore`` with 20 % of the directions, nothing cached: alone, and beside a Python process that spins on one of
the two. With fair shares the second takes up to 4/3 of the first on two threads that never wait for each other; what
is more is threads waiting. In the same run, for each way of waiting at OpenMP's barriers:

* rlspec's own: what the command sets where the user has set nothing (``rlspec/cli/threads.py``);
* runtime's: GNU's default of 300000 turns, as it would be without that;
* short: a hundred turns, a few microseconds;
* passive: ``OMP_WAIT_POLICY=passive``, no turn at all;
* one thread: nobody waits for anybody. What it takes beside the busy process is what one of several workers would take
  that each decompose a matrix of their own, and half of what it takes alone is what two of them take for two matrices.

The correctness gate: every run of as many threads writes the same bytes. The command fails where rlspec's own way
takes more than ``--most`` times as long beside the busy process. On a machine with other work the figures say nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from harness import machine, table
from restore_bench import digest
from safetensors.torch import save_file
from shapes import SHAPES, matrix

from rlspec.cli.threads import SETTINGS

WAYS = {
    "rlspec's own": {},
    "runtime's": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    "short": {"GOMP_SPINCOUNT": "100", "KMP_BLOCKTIME": "0"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}


def generate(folder: Path, model: str, layers: int, size: float) -> None:
    """A base and a tuned checkpoint; the tuned weights are off by a Gaussian update of ``size`` of their norm."""
    tensors: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for layer in range(layers):
        for projection in "qkv":
            base, *_ = matrix(SHAPES[f"{model}:{projection}"], seed=layer)
            noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(layer))
            name = f"model.layers.{layer}.self_attn.{projection}_proj.weight"
            tensors["base"][name] = base.bfloat16().contiguous()
            tensors["tuned"][name] = (
                (base + size * base.norm() / noise.norm() * noise).bfloat16().contiguous()
            )
    for name, found in tensors.items():
        (folder / name).mkdir()
        save_file(found, folder / name / "model.safetensors", metadata={"format": "pt"})


_SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("spinning", flush=True)
while True:
    pass
"""


@contextmanager
def busy(cpu: int) -> Iterator[None]:
    """One process that uses all of a processor meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", _SPIN, str(cpu)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def run_command(work: Path, cpus: set[int], way: dict[str, str]) -> tuple[float, str]:
    """Seconds of the command on these processors, and a digest of what it wrote."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        out = Path(place) / "out"
        command = [sys.executable, "-m", "rlspec", "restore", "--rank", "0.2", "--out", str(out)]
        command += ["--base", str(work / "base"), "--tuned", str(work / "tuned")]
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environment |= {"RLSPEC_CACHE": str(Path(place) / "cache"), **way}
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)  # the child has it from its first moment on
        try:
            began = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            taken = time.perf_counter() - began
        finally:
            os.sched_setaffinity(0, mine)
        if done.returncode:
            raise click.ClickException(f"rlspec restore failed:\n{done.stderr}")
        return taken, digest(out)


@click.command(help=__doc__)
@click.option("--model", default="Qwen2.5-7B", show_default=True, help="Whose q, k and v; see shapes.py.")
@click.option("--layers", default=1, show_default=True, help="How many layers of them.")
@click.option("--size", default=1e-2, show_default=True, help="‖ΔW‖ / ‖W‖.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each kind; medians are shown.")
@click.option("--most", default=2.5, show_default=True, help="The largest ratio that passes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(model: str, layers: int, size: float, repeats: int, most: float, json_file: Path | None) -> None:
    facts = machine()
    cpus = set(sorted(os.sched_getaffinity(0))[:2])
    if len(cpus) < 2:
        raise click.ClickException("two processors are needed, and this process may use one")
    load = os.getloadavg()[0]
    click.echo(f"{facts['cpu']}, {facts['capability']}, torch {facts['torch']}; load before: {load:.1f}")
    results: dict[str, dict[str, Any]] = {}
    written: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        generate(work, model, layers, size)
        run_command(work, cpus, {})  # what is read from disk is in memory afterwards
        for way, settings in WAYS.items():
            seconds: dict[str, list[float]] = {"alone": [], "beside": []}
            digests = written.setdefault(settings.get("OMP_NUM_THREADS", "all"), set())
            for _ in range(repeats):
                taken, bytes_written = run_command(work, cpus, settings)
                seconds["alone"].append(taken)
                digests.add(bytes_written)
                with busy(min(cpus)):
                    taken, bytes_written = run_command(work, cpus, settings)
                seconds["beside"].append(taken)
                digests.add(bytes_written)
            medians = {kind: statistics.median(taken) for kind, taken in seconds.items()}
            results[way] = {"seconds": seconds, "ratio": medians["beside"] / medians["alone"], **medians}
    if any(len(digests) > 1 for digests in written.values()):
        raise click.ClickException("correctness gate: the runs wrote different bytes")
    click.echo("correctness gate: all runs of as many threads wrote the same bytes")
    rows = [("waiting", "alone, s", "beside, s", "ratio", "slowest beside, s")]
    for way, row in results.items():
        slowest = f"{max(row['seconds']['beside']):.1f}"
        rows.append((way, f"{row['alone']:.1f}", f"{row['beside']:.1f}", f"{row['ratio']:.2f}", slowest))
    click.echo(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": facts, "load": load, "ways": results}, indent=2) + "\n")
    ratio = results[next(iter(WAYS))]["ratio"]
    if ratio > most:
        raise click.ClickException(f"{ratio:.2f} times as long; at most {most:g} is wanted")


if __name__ == "__main__":
    main()
