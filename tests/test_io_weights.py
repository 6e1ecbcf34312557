"""Weights by name as streams: every tensor read once, in bounded memory, whatever order is asked for."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from rlspec import _C
from rlspec.errors import TensorError
from rlspec.io import weights as weights_module
from rlspec.io.projections import Projection, find_projections
from rlspec.io.stream import MemoryBoundError
from rlspec.io.weights import open_weights
from rlspec.spectra import SpectralBasis, SpectralTracker

QKV = "model.layers.{}.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def model() -> Any:
    """Phi-3 with grouped queries: q has another shape than k and v, so one tensor serves two stacks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 12, "vocab_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **heads))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, where layer 10 lies before layer 2."""
    path = tmp_path_factory.mktemp("phi3")
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, first byte, end) of everything that is read of tensors."""
    seen: list[tuple[str, int, int]] = []
    reader = _C.Reader

    def counted(files: list[bytes], requests: list[tuple[int, int, int]], *rest: Any) -> Any:
        seen.extend((os.fsdecode(files[file]), start, end) for file, start, end in requests)
        return reader(files, requests, *rest)

    monkeypatch.setattr(_C, "Reader", counted)
    return seen


def places(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Where every tensor lies, as the headers say."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                found[name] = (str(path), start, end)
    return found


def projections(folder: Path, modules: str = "all") -> list[Projection]:
    weights = open_weights(folder)
    return find_projections(weights.shapes(), modules, weights.config())


def test_basis_and_tracker_read_each_tensor_of_a_folder_once(
    folder: Path, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    wanted = {p.tensor for p in projections(folder, "q,k,v,mlp")}
    once = Counter(place for name, place in places(folder).items() if name in wanted)
    basis = SpectralBasis.from_checkpoint(folder, modules="q,k,v,mlp", cache_dir=tmp_path)
    assert Counter(reads) == once and len(basis) > len(once)
    reads.clear()
    SpectralTracker(basis).measure(folder, step=1)
    assert Counter(reads) == once


def test_the_count_of_reads_would_notice_a_second_one(
    folder: Path, reads: list[tuple[str, int, int]]
) -> None:
    for projection in projections(folder, "q,k,v"):
        list(open_weights(folder).stream([projection]))
    assert set(Counter(reads).values()) == {3}


def goes_through(reads: list[tuple[str, int, int]]) -> bool:
    """Whether each file is read from its beginning to its end before the next."""
    by_file = [list(group) for _, group in groupby(reads, key=lambda place: place[0])]
    return len(by_file) == len({place[0] for place in reads}) and all(g == sorted(g) for g in by_file)


def test_the_basis_reads_in_file_order(
    folder: Path, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    SpectralBasis.from_checkpoint(folder, modules="all", cache_dir=tmp_path)
    assert goes_through(reads)
    reads.clear()
    list(open_weights(folder).stream(projections(folder)))
    assert not goes_through(reads)  # the twin: layer by layer is another order


@pytest.mark.parametrize("order", ["as found", "reversed", "by module"])
def test_every_order_gives_the_matrices_of_the_model(model: Any, folder: Path, order: str) -> None:
    state = model.state_dict()
    asked = projections(folder)
    if order == "reversed":
        asked.reverse()
    if order == "by module":
        asked.sort(key=lambda p: p.module)
    for source in (folder, model, dict(state)):
        streamed = list(open_weights(source).stream(asked))
        assert [projection for projection, _ in streamed] == asked
        for projection, matrix in streamed:
            assert torch.equal(matrix, projection.take(state[projection.tensor])), projection.name


def test_parts_that_wait_hold_no_memory_of_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "READ_AHEAD_BYTES", 0)
    tensors = {QKV.format(i): torch.full((96, 64), float(i)) for i in range(8)}
    tensors |= {f"model.layers.{i}.self_attn.o_proj.weight": torch.zeros(32, 32) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    asked = sorted(projections(tmp_path, "q,k,v"), key=lambda p: p.module)  # q of all layers first
    pools = []
    pool = _C.Pool
    monkeypatch.setattr(_C, "Pool", lambda *sizes: pools.append(pool(*sizes)) or pools[-1])
    kept = list(open_weights(tmp_path).stream(asked))
    assert all(bool((matrix == projection.layer).all()) for projection, matrix in kept)
    assert len(pools) == 1 and 0 < pools[0].high_water <= 2 * 96 * 64 * 4 + (1 << 15)
    monkeypatch.setattr(weights_module.CheckpointWeights, "_copies_parts", False)  # the broken twin
    with pytest.raises(MemoryBoundError, match="still hold"):
        list(open_weights(tmp_path).stream(asked))


def test_a_name_that_is_missing_is_told_before_anything_is_read(
    folder: Path, reads: list[tuple[str, int, int]]
) -> None:
    asked = [*projections(folder, "q"), Projection("other", "other.weight", "q", 99)]
    with pytest.raises(TensorError, match=r"other\.weight: no such tensor in the checkpoint"):
        open_weights(folder).stream(asked)
    assert reads == []
