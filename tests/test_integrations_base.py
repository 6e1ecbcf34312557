"""The callback measures against a basis, saved or in memory, bit for bit as against the checkpoint that it is of."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_toys import loop, plain_trainer
from process_toys import held, together, toy_with_uneven_layers
from train_toys import toy_model

from rlspec import SpectralBasis
from rlspec.errors import CheckpointError, OptionError
from rlspec.integrations.transformers import SpectralCallback
from rlspec.perturb.matrix import MatrixBasis
from rlspec.spectra import basis as basis_module
from rlspec.spectra import saved_basis

pytestmark = pytest.mark.usefixtures("own_cache")

Rows = list[list[dict[str, Any]]]


def kept(folder: Path, model: Any = None, **options: Any) -> tuple[Path, Path]:
    """A checkpoint, and the basis of it."""
    (toy_model(seed=5) if model is None else model).save_pretrained(folder / "base")
    SpectralBasis.from_checkpoint(folder / "base", **options).save_pretrained(folder / "basis")
    return folder / "base", folder / "basis"


def rows_of(tmp_path: Path, base: Any, **options: Any) -> Rows:
    callback = SpectralCallback(every=2, base=base, **options)
    plain_trainer(tmp_path / "t", [callback], max_steps=4).train()
    assert callback.disabled is None, callback.disabled
    return [record.rows for record in callback.records]


def decomposes(*_: Any) -> Any:
    raise AssertionError("something was decomposed")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules": "q,o", "per_head": True, "rank": 3},
        {"modules": "all", "rank": "energy:0.5"},  # with a tied embedding
        {"modules": "mlp", "per_head": True},  # which has no heads
    ],
)
def test_rows_are_those_against_the_checkpoint_and_nothing_is_decomposed(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, saved = kept(tmp_path, toy_model(seed=5, tie_word_embeddings=True), **options)
    truth = rows_of(tmp_path, base, **options)
    assert len(truth) == 3 and truth[0][0]["delta_relative"] > 0.5
    made = SpectralBasis.from_checkpoint(base, **options)
    monkeypatch.setattr(basis_module, "cached_factors", decomposes)
    for given in (
        saved,
        str(saved),
        made,
        SpectralBasis.from_pretrained(saved),
        pickle.loads(pickle.dumps(made)),
    ):
        assert rows_of(tmp_path, given, **options) == truth
    with pytest.raises(AssertionError, match="something was decomposed"):
        rows_of(tmp_path, base, **options)


def test_a_basis_of_other_matrices_or_of_another_rank_is_refused_before_the_training(tmp_path: Path) -> None:
    _, saved = kept(tmp_path, modules="q,k", rank=0.3)
    asked = {"modules": "q,k", "rank": 0.3}
    for change, told in (
        ({"modules": "q,v"}, "modules=q,k where q,v is wanted"),
        ({"modules": "q"}, "modules=q,k where q is wanted"),
        ({"rank": 3}, r"rank=0\.3 where 3 is wanted"),
        ({"per_head": True}, "per_head=False where True is wanted"),
        ({"modules": "q", "rank": 0.2}, r"modules=q,k where q is wanted, rank=0\.3 where 0\.2 is wanted"),
    ):
        for base, name in ((saved, str(saved)), (SpectralBasis.from_pretrained(saved), "base")):
            with pytest.raises(
                OptionError, match=f"^{name}: a basis of {told}; ask for what it holds, or give"
            ):
                SpectralCallback(base=base, **(asked | change))  # type: ignore[arg-type]
    SpectralCallback(base=saved, **asked)  # type: ignore[arg-type]
    SpectralCallback(base=SpectralBasis.from_pretrained(saved, rank=3), modules="q,k", rank=3)
    with pytest.raises(OptionError, match="^base, a dict, is not a folder, a SpectralBasis or None$"):
        SpectralCallback(base={})  # type: ignore[arg-type]
    (saved / "basis.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not of a basis that rlspec saved"):
        SpectralCallback(base=saved)


def test_a_basis_of_another_model_or_a_damaged_one_ends_the_tracking_alone(tmp_path: Path) -> None:
    larger = toy_model(seed=5, num_hidden_layers=3)
    _, saved = kept(tmp_path / "larger", larger)
    wider = SpectralBasis.from_model(toy_model(hidden_size=64))
    _, damaged = kept(tmp_path / "damaged")
    (shard,) = damaged.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    for base, told in (
        (saved, "model.layers.2.self_attn.q_proj.weight"),
        (wider, "model.layers.0.self_attn.q_proj.weight"),
        (damaged, f"{shard}: "),
    ):
        callback = SpectralCallback(every=2, base=base)
        trainer = plain_trainer(tmp_path / "t", [callback])
        trainer.train()
        assert trainer.state.global_step == 4 and callback.records == []
        assert callback.disabled is not None and told in callback.disabled


def test_a_resumed_training_must_have_the_same_basis_in_memory(tmp_path: Path) -> None:
    def trained(base: Any, **resumed: Any) -> SpectralCallback:
        callback = SpectralCallback(every=2, base=base, out=tmp_path / "out")
        trainer = plain_trainer(tmp_path / "t", [callback], save_strategy="steps", save_steps=2)
        trainer.train(**resumed)
        return callback

    point = {"resume_from_checkpoint": str(tmp_path / "t" / "checkpoint-2")}
    whole = trained(SpectralBasis.from_model(toy_model(seed=5)))
    again = trained(SpectralBasis.from_model(toy_model(seed=5)), **point)
    assert again.disabled is None and [r.rows for r in again.records] == [r.rows for r in whole.records]
    assert not (tmp_path / "out" / "reference").exists()
    other = trained(SpectralBasis.from_model(toy_model(seed=6)), **point)
    assert other.disabled is not None and "base is 'SpectralBasis " in other.disabled


def shares(number: int, out: Path, kind: str, how: str) -> None:
    """Against a saved basis, or one that every process has; how many matrices this one reads meanwhile."""
    os.environ["RLSPEC_CACHE"] = str(out / "cache")
    base = SpectralBasis.from_pretrained(out / "basis") if how == "in memory" else out / "basis"
    read: list[MatrixBasis] = []
    right = saved_basis.matrix_basis

    def counted(*given: Any) -> MatrixBasis:
        read.append(right(*given))
        return read[-1]

    saved_basis.matrix_basis = counted
    basis_module.cached_factors = decomposes
    callback = SpectralCallback(every=2, base=base)
    loop(held(toy_with_uneven_layers(), kind, dist.get_world_size()), callback, last=2)
    assert callback.disabled is None, callback.disabled
    rows = [record.rows for record in callback.records]
    (out / f"{number}.json").write_text(json.dumps([rows, len(read)]))


@pytest.mark.parametrize(("kind", "how"), [("ddp", "saved"), ("fsdp2", "saved"), ("fsdp2", "in memory")])
def test_processes_share_a_basis_and_each_reads_what_it_measures(kind: str, how: str, tmp_path: Path) -> None:
    base, _ = kept(tmp_path, toy_with_uneven_layers(seed=5))
    assert together(2, shares, tmp_path, kind, how) == [0, 0]
    alone = SpectralCallback(every=2, base=base)
    loop(toy_with_uneven_layers(), alone, last=2)
    truth = [record.rows for record in alone.records]
    assert len(truth) == 2 and truth[0][0]["delta_relative"] > 0.5
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert [rows for rows, _ in found] == [truth, truth]
    assert sum(read for _, read in found) == (len(truth[0]) if how == "saved" else 0)


def breaks(number: int, out: Path) -> None:
    if number == 1:
        saved_basis.matrix_basis = decomposes
    callback = SpectralCallback(every=2, base=out / "basis")
    loop(held(toy_with_uneven_layers(), "ddp", 2), callback, last=2)
    dist.barrier()  # the training goes on together
    (out / f"{number}.json").write_text(json.dumps(callback.disabled))


def test_a_basis_that_one_process_cannot_read_ends_the_tracking_in_all(tmp_path: Path) -> None:
    kept(tmp_path, toy_with_uneven_layers(seed=5))
    assert together(2, breaks, tmp_path) == [0, 0]
    told = {json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)}
    assert told == {"process 1 of 2: AssertionError: something was decomposed"}


def test_a_part_shares_its_tensors_and_is_measured_where_it_is_told(tmp_path: Path) -> None:
    basis = SpectralBasis.from_model(toy_model(), rank=3)
    place = torch.device("meta")
    part = basis.part(basis.projections[1:3], device=place)
    assert part.projections == basis.projections[1:3] and part.rank == basis.rank
    for projection in part.projections:
        assert part.matrix(projection.name) is basis.matrix(projection.name)
        assert part.device(projection.name) == place
    with pytest.raises(OptionError, match="the basis holds no matrix"):
        part.matrix(basis.projections[0].name)
