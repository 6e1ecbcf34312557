"""Reading a sharded checkpoint: rlspec against its peers and the device, cold and warm.

    python bench/stream_bench.py --gb 2 --json stream.json

Every contender reads each tensor once, in its own process, and sums all its bytes as 64-bit integers, so that no page
is left untouched and lazily mapped files are paid for. A figure counts only if the sums, and before any timing the
bytes, equal those of the others. "Cold" means that none of the files is in the page cache, which is checked; "warm",
that all of it is. The device's rate is that of plain O_DIRECT reads of the same files by 2, 4 or 8 threads, each a
contender of its own. In every round all contenders run, in random order, since a device that was just busy may be
slower; the table shows medians and the range. Peers that are not installed are left out: safetensors (its two
backends and load_file), runai-model-streamer, fastsafetensors.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from harness import machine, table

MEMORY_BYTES = 1 << 30
PAGE = 4096
# Plain direct reads -> threads
DEVICE = {f"device, {threads} threads": threads for threads in (2, 4, 8)}
# (rows, columns) of a layer of Qwen2.5-1.5B.
LAYER = {
    "self_attn.q_proj": (1536, 1536),
    "self_attn.k_proj": (256, 1536),
    "self_attn.v_proj": (256, 1536),
    "self_attn.o_proj": (1536, 1536),
    "mlp.gate_proj": (8960, 1536),
    "mlp.up_proj": (8960, 1536),
    "mlp.down_proj": (1536, 8960),
    "input_layernorm": (1, 1536),
}
Tensors = Iterable[tuple[str, Tensor]]


def generate(folder: Path, gigabytes: float) -> list[Path]:
    """Layers of random bfloat16 in shards of about 1 GB, with an index."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    layer_bytes = sum(2 * m * n for m, n in LAYER.values())
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    per_shard = max(1, round(1e9 / layer_bytes))
    weight_map, shards = {}, []
    for first in range(0, layers, per_shard):
        tensors = {
            f"model.layers.{layer}.{name}.weight": torch.randint(
                -(2**15), 2**15, shape, generator=generator, dtype=torch.int16
            ).view(torch.bfloat16)
            for layer in range(first, min(first + per_shard, layers))
            for name, shape in LAYER.items()
        }
        path = folder / f"model-{len(shards) + 1:05}-of-{-(-layers // per_shard):05}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        shards.append(path)
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return shards


def read_rlspec(folder: Path, shards: list[Path]) -> Tensors:
    from rlspec.io.index import CheckpointIndex
    from rlspec.io.stream import TensorStream

    with TensorStream(CheckpointIndex.open(folder), memory_bytes=MEMORY_BYTES) as stream:
        for streamed in stream:
            yield streamed.entry.name, streamed.tensor


def _read_safetensors(backend: str) -> Callable[[Path, list[Path]], Tensors]:
    def read(folder: Path, shards: list[Path]) -> Tensors:
        from safetensors import safe_open

        options = {} if backend == "mmap" else {"backend": backend}
        for shard in shards:
            with safe_open(shard, framework="pt", **options) as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)

    return read


def read_load_file(folder: Path, shards: list[Path]) -> Tensors:
    from safetensors.torch import load_file

    for shard in shards:
        yield from load_file(shard).items()


def read_runai(folder: Path, shards: list[Path]) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(shard) for shard in shards])
        yield from streamer.get_tensors()


def read_fastsafetensors(folder: Path, shards: list[Path]) -> Tensors:
    from fastsafetensors import fastsafe_open

    for shard in shards:
        with fastsafe_open(filenames=[str(shard)], nogds=True, device="cpu", debug_log=False) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


CONTENDERS: dict[str, tuple[str, Callable[[Path, list[Path]], Tensors]]] = {
    "rlspec": ("rlspec", read_rlspec),
    "safetensors mmap": ("safetensors", _read_safetensors("mmap")),
    "safetensors pread": ("safetensors", _read_safetensors("pread")),
    "safetensors load_file": ("safetensors", read_load_file),
    "runai-model-streamer": ("runai_model_streamer", read_runai),
    "fastsafetensors": ("fastsafetensors", read_fastsafetensors),
}


def resident_share(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * (-(-size // PAGE)))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(size), pages)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in bytes(pages)) / len(pages)


def prepare(shards: list[Path], state: str) -> None:
    """Make the files cold or warm, and make sure of it."""
    for shard in shards:
        if state == "cold":
            with shard.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            with shard.open("rb", buffering=0) as file:
                while file.read(1 << 23):
                    pass
    shares = [resident_share(shard) for shard in shards]
    if (max(shares) > 0.01) if state == "cold" else (min(shares) < 0.99):
        raise SystemExit(f"the files are not {state}: {max(shares):.0%} of their pages are in the cache")


def touch(tensor: Tensor) -> int:
    """The sum of all bytes, as 64-bit integers."""
    return int(tensor.reshape(-1).view(torch.int64).sum())


def digest(name: str, tensor: Tensor) -> int:
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return int.from_bytes(hashlib.blake2b(data, key=name.encode()[:64], digest_size=8).digest(), "little")


def peak_rss_mib() -> float:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def read_device(shards: list[Path], threads: int, block: int = 1 << 20) -> float:
    """Seconds that plain direct reads of all the bytes take."""
    buffers = [mmap.mmap(-1, block) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(bytes(block))
    began = time.perf_counter()
    for shard in shards:
        size = shard.stat().st_size
        descriptor = os.open(shard, os.O_RDONLY | os.O_DIRECT)

        def run(thread: int, descriptor: int = descriptor, size: int = size) -> None:
            for offset in range(thread * block, size, threads * block):
                os.preadv(descriptor, [buffers[thread]], offset)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))
        os.close(descriptor)
    return time.perf_counter() - began


def worker(name: str, folder: Path, state: str) -> dict[str, Any]:
    """One run in this process. State "check": a digest of all bytes in place of a time."""
    torch.set_num_threads(1)
    shards = sorted(folder.glob("*.safetensors"))
    if name in DEVICE:
        prepare(shards, "cold")
        return {"seconds": read_device(shards, DEVICE[name])}
    module, read = CONTENDERS[name]
    importlib.import_module(module)
    if name == "rlspec":
        importlib.import_module("rlspec.io.stream")
    total = count = 0
    if state == "check":
        for tensor_name, tensor in read(folder, shards):
            total ^= digest(tensor_name, tensor)
            count += 1
        return {"sum": total, "tensors": count}
    prepare(shards, state)
    before = peak_rss_mib()
    began = time.perf_counter()
    for _, tensor in read(folder, shards):
        total += touch(tensor)
        count += 1
        del tensor
    return {
        "seconds": time.perf_counter() - began,
        "sum": total % 2**64,
        "tensors": count,
        "peak_rss_mib": peak_rss_mib(),
        "import_rss_mib": before,
    }


def run(name: str, folder: Path, state: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--state", state]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {state}: failed\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def installed() -> Iterator[str]:
    for name, (module, _) in CONTENDERS.items():
        if importlib.util.find_spec(module) is not None:
            yield name


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    names = list(installed())
    gates = {name: run(name, folder, "check") for name in names}
    if len({json.dumps(gate, sort_keys=True) for gate in gates.values()}) != 1:
        raise SystemExit(f"the contenders do not read the same bytes: {gates}")
    contenders = [("cold", name) for name in (*DEVICE, *names)] + [("warm", name) for name in names]
    runs: dict[str, list[dict[str, Any]]] = {f"{state}/{name}": [] for state, name in contenders}
    draw = random.Random(0)
    for _ in range(rounds):
        for state, name in draw.sample(contenders, len(contenders)):
            runs[f"{state}/{name}"].append(run(name, folder, state))
    if len({r["sum"] for rows in runs.values() for r in rows if "sum" in r}) != 1:
        raise SystemExit("the contenders do not sum the same bytes")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    results: dict[str, Any] = {}
    for key, rows in runs.items():
        rates = [size / row["seconds"] / 1e9 for row in rows]
        results[key] = {
            "gb_per_second": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "peak_rss_mib": max((row.get("peak_rss_mib", 0.0) for row in rows), default=0.0),
            "import_rss_mib": max((row.get("import_rss_mib", 0.0) for row in rows), default=0.0),
        }
    return {"bytes": size, "rounds": rounds, "results": results}


def show(report: dict[str, Any]) -> str:
    results = report["results"]
    rows = [["", "GB/s", "range", "rlspec is", "peak RSS MiB"]]
    for key, row in results.items():
        ours = results[f"{key.split('/')[0]}/rlspec"]["gb_per_second"]
        rows.append(
            [
                key.replace("/", "  ", 1),
                f"{row['gb_per_second']:.2f}",
                f"{row['lowest']:.2f}-{row['highest']:.2f}",
                f"{ours / row['gb_per_second']:.2f} x",
                f"{row['peak_rss_mib']:.0f}" if row["peak_rss_mib"] else "",
            ]
        )
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint; default a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.folder, arguments.state)))
        return
    folder = Path(tempfile.mkdtemp(prefix="stream-bench-", dir=arguments.folder))
    try:
        generate(folder, arguments.gb)
        report = {"machine": machine() | {"cpus": os.cpu_count(), "kernel": platform.release()}}
        report |= compare(folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(report["machine"]))
    print(f"{report['bytes'] / 1e9:.2f} GB, {arguments.rounds} rounds, bound {MEMORY_BYTES >> 20} MiB")
    print(show(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
