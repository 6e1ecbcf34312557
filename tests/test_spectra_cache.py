"""The cache of reference decompositions: found again, safe against damage, mix-ups and interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rlspec.spectra import SpectralBasis, SpectralTracker, cache

KEPT_FROM = cache.MIN_ENTRIES
NAME = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def small_matrices_are_cached(monkeypatch):
    monkeypatch.setattr(cache, "MIN_ENTRIES", 1)


@pytest.fixture
def counted(monkeypatch):
    calls = []
    real = cache.reference_factors
    monkeypatch.setattr(cache, "reference_factors", lambda w: calls.append(1) or real(w))
    return calls


def test_second_use_computes_nothing_and_gives_the_same(tmp_path, counted):
    weight = torch.randn(20, 30)
    first = cache.cached_factors(weight, tmp_path)
    second = cache.cached_factors(weight.clone(), tmp_path)
    assert len(counted) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_cached_factors_measure_to_the_same_bits_as_computed_ones(tmp_path):
    assert KEPT_FROM <= 400 * 384
    name, generator = NAME.format(0), torch.Generator().manual_seed(0)
    weight, step = torch.randn(2, 400, 384, generator=generator)
    records = []
    for _ in range(2):  # with factors computed just now, and as a resumed run has them
        basis = SpectralBasis.from_tensors({name: weight}, modules="q", cache_dir=tmp_path)
        tracker = SpectralTracker(basis, engine="exact")
        records.append(tracker.measure({name: weight + 0.02 * step}, step=0))
    first, second = records
    assert first.rows == second.rows
    assert all(torch.equal(value, second.arrays[key]) for key, value in first.arrays.items())


def places(weight, folder):
    """Stride and alignment of factors computed just now, and of the same read from the cache."""
    return [
        [(factor.stride(), factor.data_ptr() % 64) for factor in cache.cached_factors(weight, folder)]
        for _ in range(2)
    ]


@pytest.mark.parametrize("shape", [(20, 30), (400, 384), (384, 700)])
def test_factors_lie_alike_whether_computed_or_read(tmp_path, shape):
    computed, read = places(torch.randn(shape), tmp_path)
    assert computed == read


def test_without_a_copy_they_would_not(tmp_path, monkeypatch):
    """The broken twin: LAPACK's layout at first, the mapped file's layout and alignment later."""
    monkeypatch.setattr(cache, "_fresh", lambda factors: factors)
    computed, read = places(torch.randn(400, 384), tmp_path)
    assert computed != read


def test_key_covers_content_dtype_and_shape():
    weight = torch.randn(6, 4)
    changed = weight.clone()
    changed[0, 0] += 1e-6
    variants = [
        weight,
        changed,
        weight.reshape(4, 6).contiguous(),
        weight.double(),
        weight.view(torch.int32).float(),
    ]
    assert len({cache.content_key(w) for w in variants}) == len(variants)


def test_any_flipped_byte_is_noticed(tmp_path, counted):
    weight = torch.randn(20, 30)
    truth = cache.cached_factors(weight, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    sound = path.read_bytes()
    for position in range(0, len(sound), len(sound) // 40):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        again = cache.cached_factors(weight, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(truth, again)), position
    path.write_bytes(sound[: len(sound) // 2])
    assert torch.equal(cache.cached_factors(weight, tmp_path)[1], truth[1])
    before = len(counted)
    cache.cached_factors(weight, tmp_path)  # rebuilt: sound again
    assert len(counted) == before


def test_a_foreign_file_is_not_believed(tmp_path):
    mine, other = torch.randn(8, 8), torch.randn(8, 8)
    cache.cached_factors(other, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    key = cache.content_key(mine)
    (tmp_path / key[:2]).mkdir(exist_ok=True)
    path.rename(tmp_path / key[:2] / f"{key}.safetensors")
    u, s, vh = cache.cached_factors(mine, tmp_path)
    torch.testing.assert_close(((u * s) @ vh).float(), mine)


def test_building_goes_on_where_it_was_interrupted(tmp_path, counted):
    tensors = {NAME.format(i): torch.randn(12, 12) for i in range(4)}

    def stop_after_two(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SpectralBasis.from_tensors(tensors, modules="q", cache_dir=tmp_path, progress=stop_after_two)
    seen = []
    SpectralBasis.from_tensors(tensors, modules="q", cache_dir=tmp_path, progress=lambda *p: seen.append(p))
    assert len(counted) == 4
    assert seen == [(i, 4) for i in range(1, 5)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    weight = torch.randn(9, 7)
    u, s, vh = cache.cached_factors(weight, blocked)
    torch.testing.assert_close(((u * s) @ vh).float(), weight)


def test_nor_is_a_full_disk(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    weight = torch.randn(9, 7)
    u, s, vh = cache.cached_factors(weight, tmp_path)
    torch.testing.assert_close(((u * s) @ vh).float(), weight)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "users"]


def test_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path))
    cache.cached_factors(torch.randn(5, 5))
    assert list(tmp_path.rglob("*.safetensors"))
