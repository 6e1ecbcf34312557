"""The streaming reader: bit for bit against the official safetensors library, and inside its memory bound."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stream_bench import resident_share

from rlspec.errors import CheckpointError
from rlspec.io.dtypes import TORCH_DTYPES
from rlspec.io.index import CheckpointIndex
from rlspec.io.stream import MemoryBoundError, TensorStream, read_tensor, stream_pairs, stream_rows

IO = ("auto", "direct", "buffered")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(rng: random.Random, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bytes: NaN payloads and subnormals are content like any other."""
    count = torch.Size(shape).numel() * dtype.itemsize
    if dtype == torch.bool:
        return torch.tensor([rng.random() < 0.5 for _ in range(count)]).reshape(shape)
    data = torch.frombuffer(bytearray(rng.randbytes(count) or b"\0"), dtype=torch.uint8)[:count].clone()
    return data.view(dtype).reshape(shape)


def make_cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], names: list[list[str]]) -> CheckpointIndex:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, group in enumerate(names):
        shard = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        save_file({name: tensors[name] for name in group}, folder / shard)
        weight_map |= dict.fromkeys(group, shard)
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return CheckpointIndex.open(folder)


def sizes(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of 20 to 200 KB."""
    rng = random.Random(seed)
    return {f"t{i:03}": random_tensor(rng, torch.int16, (rng.randint(100, 1000), 100)) for i in range(count)}


@pytest.mark.parametrize("io", IO)
def test_every_dtype_matches_the_official_library(io: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(4):
        tensors = {}
        for name, dtype in rng.sample(sorted(TORCH_DTYPES.items()), len(TORCH_DTYPES)):
            for kind, shape in {
                "matrix": (rng.randint(1, 40), rng.randint(1, 40)),
                "empty": (3, 0, 2),
                "scalar": (),
                "pages": (rng.randint(4000, 9000),),
            }.items():
                tensors[f"{name} {kind}"] = random_tensor(rng, dtype, shape)
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, metadata={"a": "x" * trial})
        if trial % 2:
            make_cold(path)
        with (
            safe_open(str(path), framework="pt") as official,
            TensorStream(CheckpointIndex.open(tmp_path), io=io, memory_bytes=1 << 20) as stream,
        ):
            found = set()
            for streamed in stream:
                entry, tensor = streamed.entry, streamed.tensor
                expected = official.get_tensor(entry.name)
                assert (
                    tensor.dtype == expected.dtype
                    and tensor.shape == expected.shape == tensors[entry.name].shape
                )
                assert raw(tensor) == raw(expected) == raw(tensors[entry.name])
                assert tensor.data_ptr() % 64 == 0
                tensor.zero_()  # writable
                found.add(entry.name)
            assert found == set(tensors)


def odd_file(path: Path, header_bytes: int) -> dict[str, bytes]:
    """Tensors at odd offsets, which the official writer avoids and the format allows."""
    rng = random.Random(header_bytes)
    content, header, at = {}, {}, 0
    for number, size in enumerate((1, 3, 4095, 70_001, 5, 8192)):
        content[str(number)] = rng.randbytes(size)
        header[str(number)] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode().ljust(header_bytes)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(content.values()))
    return content


@pytest.mark.parametrize("io", IO)
def test_odd_offsets(io: Any, tmp_path: Path) -> None:
    for header_bytes in (500, 501, 567, 4088, 4089):
        content = odd_file(tmp_path / "model.safetensors", header_bytes)
        make_cold(tmp_path / "model.safetensors")
        for streamed in TensorStream(CheckpointIndex.open(tmp_path), io=io):
            assert raw(streamed.tensor) == content[streamed.entry.name]
            assert streamed.tensor.data_ptr() % 64 == 0


def test_the_page_cache_stays_as_it_was(tmp_path: Path) -> None:
    """Asking what is cached must not fill the cache, as preadv2 with RWF_NOWAIT does: all would be read twice."""
    path = tmp_path / "model.safetensors"
    tensors = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(8)}
    save_file(tensors, path)
    index = CheckpointIndex.open(tmp_path)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")
    for cached in (0, 10_000_000):
        make_cold(path)
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.read(cached)
        before = resident_share(path)
        if before > 0.9:
            pytest.skip("this file system keeps its files in memory")
        for streamed in TensorStream(index):
            assert torch.equal(streamed.tensor, tensors[streamed.entry.name])
        assert resident_share(path) == pytest.approx(before, abs=0.01)
    for streamed in TensorStream(index, io="buffered"):
        assert torch.equal(streamed.tensor, tensors[streamed.entry.name])
    assert resident_share(path) > 0.99


def test_order(tmp_path: Path) -> None:
    tensors = sizes(9)
    names = sorted(tensors)
    random.Random(1).shuffle(names)
    index = save_sharded(tmp_path / "c", tensors, [names[:4], names[4:5], names[5:]])
    with TensorStream(index) as stream:
        assert len(stream) == 9
        order = [streamed.entry for streamed in stream]
    shards = list(dict.fromkeys(entry.shard for entry in order))
    assert [path.name[:11] for path in shards] == ["model-00001", "model-00002", "model-00003"]
    assert order == sorted(order, key=lambda e: (e.shard.name, e.start))
    asked = [names[3], names[8], names[3], names[0]]
    found = [(s.entry.name, s.tensor) for s in TensorStream(index, asked)]
    assert [name for name, _ in found] == asked
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    assert list(TensorStream(index, [])) == []
    with pytest.raises(CheckpointError, match="has no tensor 'none'"):
        TensorStream(index, ["none"])


@pytest.mark.parametrize("io", IO)
def test_memory_stays_inside_the_bound(io: Any, tmp_path: Path) -> None:
    tensors = sizes(60)
    save_file(tensors, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    for bound in (440_000, 1_000_000):
        with TensorStream(index, io=io, memory_bytes=bound) as stream:
            for streamed in stream:
                assert torch.equal(streamed.tensor, tensors[streamed.entry.name])
                assert stream.pool.in_use <= stream.pool.high_water <= bound
            # Reading ahead was possible, and used.
            assert stream.pool.high_water > bound / 2
            del streamed
            assert stream.pool.in_use == 0
    with TensorStream(index, memory_bytes=1 << 30) as stream:
        everything = list(stream)
        assert stream.pool.in_use > 60 * 20_000  # the twin: without a narrow bound it is passed
    assert len(everything) == 60


def test_a_tensor_larger_than_the_bound(tmp_path: Path) -> None:
    save_file({"small": torch.zeros(10), "large": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    with pytest.raises(
        MemoryBoundError, match=r"'large' \[100000\] takes 4\d{5} bytes, the bound is 400000.*stream_rows"
    ):
        TensorStream(index, memory_bytes=400_000)
    assert len(list(TensorStream(index, ["small"], memory_bytes=400_000))) == 1
    with pytest.raises(MemoryBoundError, match="its twin"):
        stream_pairs(index, index, ["large"], memory_bytes=500_000)


def test_tensors_that_are_held(tmp_path: Path) -> None:
    tensors = sizes(10)
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorStream(CheckpointIndex.open(tmp_path), memory_bytes=500_000) as stream:
        held = []
        with pytest.raises(MemoryBoundError, match=r"no room for 't\d+' .*drop them") as caught:
            while True:
                held.append(next(stream))
        assert "\n" not in str(caught.value)
        count = len(held)
        view = held[-1].tensor[3:5]
        expected = view.clone()
        held.clear()
        rest = [(s.entry.name, s.tensor.clone()) for s in iter(lambda: next(stream, None), None)]
        assert len(rest) == 10 - count
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in rest)
        assert torch.equal(view, expected)  # a view keeps the buffer


def test_reference_cycles_are_not_holders(tmp_path: Path) -> None:
    save_file(sizes(10), tmp_path / "model.safetensors")
    count = 0
    with TensorStream(CheckpointIndex.open(tmp_path), memory_bytes=500_000) as stream:
        for streamed in stream:
            cycle = [streamed]
            cycle.append(cycle)
            count += 1
    assert count == 10


def test_tensors_outlive_the_stream(tmp_path: Path) -> None:
    tensors = sizes(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorStream(CheckpointIndex.open(tmp_path)) as stream:
        held = list(stream)
        pool = stream.pool
    del stream
    assert all(torch.equal(s.tensor, tensors[s.entry.name]) for s in held)
    del held
    assert pool.in_use == 0


def test_pairs(tmp_path: Path) -> None:
    base, tuned = sizes(12, seed=1), sizes(12, seed=2)
    names = sorted(base)
    one = save_sharded(tmp_path / "base", base, [names[:5], names[5:]])
    two = save_sharded(tmp_path / "tuned", tuned, [names[::3], names[1::3], names[2::3]])
    asked = names[::-1]
    seen = []
    for name, b, t in stream_pairs(one, two, asked, memory_bytes=450_000):
        assert torch.equal(b, base[name]) and torch.equal(t, tuned[name])
        seen.append(name)
        del b, t
    assert seen == asked
    with pytest.raises(CheckpointError, match="has no tensor"):
        stream_pairs(one, two, ["none"])


@pytest.mark.parametrize("shape", [(1000, 33), (5000,), (7, 1, 900), (1, 4000)])
def test_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = random_tensor(random.Random(3), torch.bfloat16, shape)
    save_file({"before": torch.zeros(3), "t": tensor}, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    blocks, at = [], 0
    for first, block in stream_rows(index, "t", memory_bytes=60_000):
        assert first == at and block.data_ptr() % 64 == 0 and block.shape[1:] == tensor.shape[1:]
        at += len(block)
        blocks.append(block.clone())
    assert raw(torch.cat(blocks)) == raw(tensor)
    assert len(blocks) > 1 or len(tensor) == 1


def test_rows_of_little(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "flat": torch.zeros(3, 0)}
    save_file(tensors, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    assert [(i, float(block)) for i, block in stream_rows(index, "scalar", memory_bytes=1 << 16)] == [
        (0, 2.5)
    ]
    assert list(stream_rows(index, "empty", memory_bytes=1 << 16)) == []
    ((first, block),) = stream_rows(index, "flat", memory_bytes=1 << 16)
    assert first == 0 and block.shape == (3, 0)
    with pytest.raises(MemoryBoundError, match="two rows must fit"):
        stream_rows(index, "flat", memory_bytes=100)


def test_read_tensor(tmp_path: Path) -> None:
    tensors = {**sizes(3), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(index, name), tensor)


def test_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    with pytest.raises(CheckpointError, match="'x' has dtype F4, which torch"):
        TensorStream(CheckpointIndex.open(tmp_path))


@pytest.mark.parametrize("io", IO)
def test_files_that_shrink_or_vanish(io: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sizes(20), path)
    index = CheckpointIndex.open(tmp_path)
    with TensorStream(index, io=io, memory_bytes=450_000) as stream:
        next(stream)
        os.truncate(path, 2000)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: reading 't\d+': cannot be read: .*shorter"
        ):
            for _ in stream:
                pass
        assert list(stream) == []  # it is closed
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be opened: No such file"):
        next(TensorStream(index, io=io))


def test_threads_end_with_the_stream(tmp_path: Path) -> None:
    save_file(sizes(40), tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    for count in range(20):
        stream = TensorStream(index, workers=8, memory_bytes=450_000)
        assert threads() == before + 8
        for _ in range(count):
            next(stream)
        if count % 2:
            stream.close()
        del stream
        assert threads() == before
    pairs = stream_pairs(index, index, sorted(index.tensors), memory_bytes=900_000)
    next(pairs)
    del pairs
    assert threads() == before
    assert len(os.listdir("/proc/self/fd")) < 100


def test_ctrl_c_and_exit(tmp_path: Path) -> None:
    """Ctrl-C ends a loop over a stream, and a stream left open does not keep the interpreter from ending."""
    save_file(sizes(2), tmp_path / "model.safetensors")
    program = f"""
import os, signal, threading, time
from rlspec.io.index import CheckpointIndex
from rlspec.io.stream import TensorStream
index = CheckpointIndex.open({str(tmp_path)!r})
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        for streamed in TensorStream(index):
            pass
except KeyboardInterrupt:
    print("heard")
stream = TensorStream(index)  # left open at exit, with tensors out
held = next(stream)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_consumers_on_other_threads(tmp_path: Path) -> None:
    tensors = sizes(30)
    save_file(tensors, tmp_path / "model.safetensors")
    good = []

    def check(name: str, tensor: torch.Tensor) -> None:
        time.sleep(0.001)
        good.append(torch.equal(tensor, tensors[name]))

    with TensorStream(CheckpointIndex.open(tmp_path), memory_bytes=1 << 23) as stream:
        threads = []
        for streamed in stream:
            threads.append(threading.Thread(target=check, args=(streamed.entry.name, streamed.tensor)))
            threads[-1].start()
    for thread in threads:
        thread.join()
    assert good == [True] * 30


@pytest.mark.parametrize("how", ["close", "drop", "next"])
def test_a_fork_while_reading_ends(how: str, tmp_path: Path) -> None:
    """The child of a fork has none of the threads, and must not wait for them."""
    save_file(sizes(30), tmp_path / "model.safetensors")
    stream: TensorStream | None = TensorStream(CheckpointIndex.open(tmp_path), memory_bytes=450_000)
    assert stream is not None
    held: list[torch.Tensor] = [next(stream).tensor]
    time.sleep(0.1)  # the threads wait for room
    child = os.fork()
    if child == 0:
        code = 7
        if how == "close":
            stream.close()
        elif how == "drop":
            held.clear()
            stream = None
        else:
            try:
                next(stream)
                code = 8
            except CheckpointError as error:
                code = 7 if "begin anew" in str(error) else 9
        os._exit(code)
    for _ in range(5000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hung")
    assert os.waitstatus_to_exitcode(status) == 7
    held.clear()
    rest = 0
    while next(stream, None) is not None:  # the parent goes on
        rest += 1
    assert rest == 29


def test_threads_may_share_a_stream(tmp_path: Path) -> None:
    names = [f"t{i:03}" for i in range(200)]
    save_file(
        {n: torch.full((50, 40), float(i)) for i, n in enumerate(names)}, tmp_path / "model.safetensors"
    )
    stream = TensorStream(CheckpointIndex.open(tmp_path), memory_bytes=1_000_000)
    found: list[str] = []

    def work() -> None:
        for streamed in stream:
            if bool((streamed.tensor == float(streamed.entry.name[1:])).all()):
                found.append(streamed.entry.name)
            del streamed

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == names


def test_bad_options(tmp_path: Path) -> None:
    save_file(sizes(1), tmp_path / "model.safetensors")
    index = CheckpointIndex.open(tmp_path)
    with pytest.raises(ValueError, match="workers 0"):
        TensorStream(index, workers=0)
    with pytest.raises(ValueError, match="io must be"):
        TensorStream(index, io="mmap")  # type: ignore[arg-type]
