"""A basis is the same whether it is built from a model, from tensors or from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from train_toys import toy_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from rlspec import SpectralBasis, SpectralTracker
from rlspec.errors import CheckpointError, OptionError, ProjectionError


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return toy_model().to(torch.bfloat16)


def same(one: SpectralBasis, other: SpectralBasis) -> None:
    assert [p.name for p in one.projections] == [p.name for p in other.projections] and len(one) == 6
    for projection in one.projections:
        a, b = one.matrix(projection.name), other.matrix(projection.name)
        assert a.k == b.k and a.W.dtype == torch.bfloat16
        for x, y in ((a.W, b.W), (a.U, b.U), (a.S, b.S), (a.Vh, b.Vh)):
            assert torch.equal(x, y)


def test_one_folder_shards_tensors_and_the_model_give_one_basis(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    direct = SpectralBasis.from_model(model, rank=0.3)
    seen: list[tuple[int, int]] = []
    for folder in ("one", "shards"):
        basis = SpectralBasis.from_checkpoint(tmp_path / folder, rank=0.3, progress=lambda *x: seen.append(x))
        same(direct, basis)
    assert seen == [(i, 6) for i in range(1, 7)] * 2
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    same(direct, SpectralBasis.from_tensors(tensors, rank=0.3))
    # ... and a folder is measured as the model in it.
    record = SpectralTracker(direct).measure(tmp_path / "shards", step=0)
    assert all(row["delta_frobenius"] == 0.0 and row["angle_left_max_rad"] == 0.0 for row in record.rows)


def test_fused_projections_are_found_by_the_configuration(tmp_path: Path) -> None:
    """GPT-NeoX interleaves q, k and v by head: without the number of heads nobody can tell them apart."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
    )
    model = GPTNeoXForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    same(SpectralBasis.from_model(model), SpectralBasis.from_checkpoint(tmp_path))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with pytest.raises(ProjectionError):
        SpectralBasis.from_tensors(tensors)


def test_what_is_missing_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        SpectralBasis.from_checkpoint(tmp_path / "none")
    save_file({"something.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ProjectionError):
        SpectralBasis.from_checkpoint(tmp_path)
    with pytest.raises(OptionError, match="holds no matrix 'x'"):
        SpectralBasis.from_model(model).matrix("x")
