"""A basis in a folder measures bit for bit as the one that was saved; damaged and hostile folders are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_toys import toy_model

from rlspec import SpectralBasis, SpectralTracker
from rlspec.errors import CheckpointError, OptionError, RlspecError
from rlspec.spectra import saved_basis

NAME = "model.layers.0.self_attn.{}_proj.weight"
#: q is decomposed by LAPACK and keeps float64 factors, k by its Gram matrix and keeps float32.
SHAPES = {"q": (40, 24), "k": (530, 520)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        NAME.format(module): torch.randn(shape, generator=generator).bfloat16()
        for module, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def basis() -> SpectralBasis:
    return SpectralBasis.from_tensors(tensors(), modules="q,k", rank=0.3)


@pytest.fixture
def saved(basis: SpectralBasis, tmp_path: Path) -> Path:
    basis.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def places(basis: SpectralBasis) -> list[tuple[Any, ...]]:
    """Content, stride and alignment of all that a basis holds."""
    matrices = [basis.matrix(projection.name) for projection in basis.projections]
    return [
        (t.dtype, t.tolist(), t.stride(), t.data_ptr() % 64) for m in matrices for t in (m.W, m.U, m.S, m.Vh)
    ]


@pytest.mark.parametrize("engine", ["delta", "exact"])
def test_what_is_loaded_measures_to_the_same_bits(basis: SpectralBasis, saved: Path, engine: Any) -> None:
    loaded = SpectralBasis.from_pretrained(saved, device="cpu")
    assert {basis.matrix(p.name).U.dtype for p in basis.projections} == {torch.float32, torch.float64}
    assert loaded.projections == basis.projections
    assert (loaded.rank, loaded.note) == (basis.rank, basis.note)
    changed = {name: w + 0.02 * tensors(1)[name] for name, w in tensors().items()}
    one, other = (SpectralTracker(b, engine=engine).measure(changed, step=3) for b in (basis, loaded))
    assert one.rows == other.rows and one.rows[0]["delta_frobenius"] != 0
    assert one.arrays.keys() == other.arrays.keys()
    assert all(torch.equal(value, other.arrays[key]) for key, value in one.arrays.items())


def test_it_lies_in_memory_as_what_was_decomposed(
    basis: SpectralBasis, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert places(SpectralBasis.from_pretrained(saved)) == places(basis)
    monkeypatch.setattr(saved_basis, "fresh", lambda tensor: tensor)  # the broken twin: what is mapped
    assert places(SpectralBasis.from_pretrained(saved)) != places(basis)


def test_another_rank_may_be_asked_for(basis: SpectralBasis, saved: Path) -> None:
    for rank in (5, "energy:0.5", 1.0):
        built = SpectralBasis.from_tensors(tensors(), modules="q,k", rank=rank)
        loaded = SpectralBasis.from_pretrained(saved, rank=rank)
        assert loaded.rank == built.rank
        assert [loaded.matrix(p.name).k for p in loaded.projections] == [
            built.matrix(p.name).k for p in built.projections
        ]
    with pytest.raises(OptionError, match="rank=2.5"):
        SpectralBasis.from_pretrained(saved, rank=2.5)


def test_heads_fused_parts_and_deficient_matrices_come_back(tmp_path: Path) -> None:
    model = toy_model()
    model.model.layers[0].self_attn.q_proj.weight.data[1:] = 0.0
    built = SpectralBasis.from_model(model, modules="attn", rank=0.5, per_head=True)
    built.save_pretrained(tmp_path / "heads")
    assert json.loads((tmp_path / "heads" / "basis.json").read_text())["per_head"] is True
    loaded = SpectralBasis.from_pretrained(str(tmp_path / "heads"))
    assert loaded.projections == built.projections and places(loaded) == places(built)
    notes = [loaded.matrix(p.name).note for p in loaded.projections]
    assert notes == [built.matrix(p.name).note for p in built.projections] and any(notes)
    fused = {"h.0.attn.c_attn.weight": torch.randn(8, 24), "h.0.attn.c_proj.weight": torch.randn(8, 8)}
    built = SpectralBasis.from_tensors(fused, modules="attn")
    built.save_pretrained(tmp_path / "fused")
    assert SpectralBasis.from_pretrained(tmp_path / "fused").projections == built.projections
    assert {p.transposed for p in built.projections} == {True} and built.projections[0].rows is not None
    assert saved_basis._entry(entry_with(rows=[[0, 4], [8, 12]], shape=[8, 3])).projection.rows == (
        slice(0, 4),
        slice(8, 12),
    )


def entry_with(**changes: Any) -> dict[str, Any]:
    entry = {
        "name": "a",
        "tensor": "a",
        "module": "q",
        "layer": 0,
        "head": None,
        "rows": None,
        "columns": None,
        "transposed": False,
        "shape": [8, 3],
        "dtype": "BF16",
        "factors": "F32",
        "file": "basis-00001-of-00001.safetensors",
        "checksum": "0",
    }
    return {**entry, **changes}


def test_shards_are_of_bounded_size(
    basis: SpectralBasis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [
        sum(t.nbytes for t in (m.W, m.U, m.S, m.Vh))
        for m in map(basis.matrix, map(name_of, basis.projections))
    ]
    for bound, count in ((sum(sizes), 1), (sum(sizes) - 1, 2), (1, 2)):
        monkeypatch.setattr(saved_basis, "SHARD_BYTES", bound)
        folder = tmp_path / str(bound)
        basis.save_pretrained(folder)
        shards = sorted(folder.glob("*.safetensors"))
        assert [s.name for s in shards] == [
            f"basis-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
        assert places(SpectralBasis.from_pretrained(folder)) == places(basis)
        held = {
            name: tensor for shard in shards for name, tensor in load_file(shard).items()
        }  # the official reader
        name = basis.projections[1].name
        assert torch.equal(held[f"{name}/Vh"], basis.matrix(name).Vh) and len(held) == 4 * len(basis)


def name_of(projection: Any) -> str:
    return str(projection.name)


def test_nothing_is_written_over_and_nothing_half_written_stays(
    basis: SpectralBasis, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        basis.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    def full(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_basis, "write_file", full)  # after the shards
    with pytest.raises(KeyboardInterrupt):
        basis.save_pretrained(saved.parent / "other")
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_folder_of_the_other_kind_is_told(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a saved SpectralBasis, not a checkpoint"):
        SpectralBasis.from_checkpoint(saved)
    with pytest.raises(CheckpointError, match="no basis.json in it"):
        SpectralBasis.from_pretrained(tmp_path)


Edit = Callable[[dict[str, Any]], object]
HOSTILE: dict[str, tuple[Edit, str]] = {
    "foreign": (lambda c: c.update(format="index"), "not of a basis that rlspec saved"),
    "later": (lambda c: c.update(version=2), "a basis of version 2"),
    "no rank": (lambda c: c.pop("rank"), "rank: 'rank' is missing"),
    "bad rank": (lambda c: c.update(rank="7 of 9"), "rank: rank='7 of 9' is not valid"),
    "no list": (lambda c: c.update(matrices={}), "note: {} is no list"),
    "none": (lambda c: c.update(matrices=[]), "none, or two of one name"),
    "twice": (lambda c: c["matrices"].append(c["matrices"][0]), "none, or two of one name"),
    "elsewhere": (lambda c: c["matrices"][0].update(file="../basis-00001-of-00001.safetensors"), "no name of a shard"),
    "absent": (lambda c: c["matrices"][0].update(file="basis-00009-of-00009.safetensors"), "missing"),
    "negative": (lambda c: c["matrices"][0].update(shape=[-40, 24]), "-40 is no whole number"),
    "true": (lambda c: c["matrices"][0].update(layer=True), "True is no whole number"),
    "rows": (lambda c: c["matrices"][0].update(rows=[[0, 39]]), "are not the 40 of the shape"),
    "columns": (lambda c: c["matrices"][0].update(columns=[24, 24]), "is no range"),
    "integers": (lambda c: c["matrices"][0].update(dtype="I32"), "none of a weight"),
    "factors": (lambda c: c["matrices"][0].update(factors="BF16"), "wanted F32 or F64"),
    "no text": (lambda c: c["matrices"][0].update(name="\ud800"), "surrogates not allowed"),
    "module": (lambda c: c["matrices"][0].update(module=["q"]), "module is"),
    "shape": (lambda c: c["matrices"][0].update(shape=[41, 24]), "basis.json wants (41, 24)"),
    "checksum": (lambda c: c["matrices"][0].update(checksum="00000000"), "is damaged"),
    "name": (lambda c: c["matrices"][0].update(name="x"), "does not contain tensor x/W"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_basis_json_says_is_checked(saved: Path, case: str) -> None:
    change, told = HOSTILE[case]
    file = saved / "basis.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=re.escape(told)) as caught:
        SpectralBasis.from_pretrained(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_shards_are_refused(saved: Path) -> None:
    (shard,) = saved.glob("*.safetensors")
    whole = shard.read_bytes()
    for at in (-1, len(whole) // 2):  # a bit of a factor, which is still a number
        damaged = bytearray(whole)
        damaged[at] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged: not the checksum"):
            SpectralBasis.from_pretrained(saved)
    for content in (whole[:-1], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"):
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"safetensors: .*; save or fetch it anew"):
            SpectralBasis.from_pretrained(saved)


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        ("U", float("nan"), "1 of 960 values are NaN"),
        ("S", -1.0, "no singular values"),
        ("S", 1e9, "no singular values"),
    ],
)
def test_numbers_that_are_no_decomposition_are_refused_though_the_checksum_fits(
    saved: Path, part: str, value: float, told: str
) -> None:
    (shard,) = saved.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    name = NAME.format("q")
    held[f"{name}/{part}"].view(-1)[-1] = value
    save_file(held, shard)
    content = json.loads((saved / "basis.json").read_text())
    content["matrices"][0]["checksum"] = saved_basis.checksum(
        [held[f"{name}/{p}"] for p in ("W", "U", "S", "Vh")]
    )
    (saved / "basis.json").write_text(json.dumps(content))
    with pytest.raises(RlspecError, match=told):
        SpectralBasis.from_pretrained(saved)
