"""Restoring a model in memory: the same weights as through a checkpoint, all or nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from restore_toys import CONFIGS, expected, save_model, svd_formula

import rlspec
from rlspec.errors import CheckpointError, OptionError, TensorError


def models(folder: Path, kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    base = save_model(folder / kind, kind)
    tuned = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(1e-2 * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=draw))
    return base, tuned


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("mode", ["directions", "both", "copy"])
def test_equals_the_dense_formula(kind: str, mode: str, tmp_path: Path) -> None:
    base, tuned = models(tmp_path, kind)
    basis = rlspec.SpectralBasis.from_model(base, rank=0.2)
    before = state(tuned)
    formula = {
        "directions": svd_formula(0, 0.2),
        "both": svd_formula(0, 0.2, left_values="base"),
        "copy": lambda b, t: b,
    }[mode]
    truth = expected(kind, state(base), before, formula)
    reports = rlspec.restore_(tuned, basis, mode=mode)
    assert [row.name for row in reports] == [p.name for p in basis.projections]
    for name, tensor in state(tuned).items():
        moved = (truth[name] - before[name]).norm()
        assert (tensor - truth[name]).norm() <= 0.01 * moved + 1e-7 * truth[name].norm()


def test_another_rank_part_and_strength(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, "llama")
    basis = rlspec.SpectralBasis.from_model(base, rank=0.2, modules="v")
    before = state(tuned)
    (first, _) = rlspec.restore_(tuned, basis, rank=7, strength=0.5)
    assert first.k == 7
    truth = expected("llama", state(base), before, lambda b, t: (t + svd_formula(0, 7)(b, t)) / 2)
    name = first.tensor
    moved = (truth[name] - before[name]).norm()
    assert (state(tuned)[name] - truth[name]).norm() <= 0.01 * moved + 1e-7 * truth[name].norm()
    with pytest.raises(OptionError, match="part 32:40 lies past the 32 directions"):
        rlspec.restore_(tuned, basis, part="32:40")


def test_the_base_may_be_a_path(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, "llama")
    twin = copy.deepcopy(tuned)
    rlspec.restore_(tuned, tmp_path / "llama", rank=0.5)
    rlspec.restore_(twin, rlspec.SpectralBasis.from_model(base, rank=0.5))
    assert all(torch.equal(t, state(twin)[name]) for name, t in state(tuned).items())
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint"):
        rlspec.restore_(tuned, str(tmp_path / "nowhere"))


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, "llama")
    basis = rlspec.SpectralBasis.from_model(base)
    last = dict(tuned.named_parameters())["model.layers.1.self_attn.v_proj.weight"]
    with torch.no_grad():
        last[0, 0] = torch.nan
    before = state(tuned)
    with pytest.raises(TensorError, match=r"layers.1.self_attn.v_proj.weight: .*1 of 2048 values are NaN"):
        rlspec.restore_(tuned, basis)
    assert all(
        torch.equal(t, before[n]) or n.endswith("1.self_attn.v_proj.weight") for n, t in state(tuned).items()
    )
    with pytest.raises(TensorError, match="no such parameter in the model"):
        rlspec.restore_(torch.nn.Linear(3, 3), basis)
    with torch.device("meta"):
        empty = type(base)(CONFIGS["llama"]())
    with pytest.raises(TensorError, match="on the meta device"):
        rlspec.restore_(empty, basis)
    smaller = copy.deepcopy(base)
    smaller.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(TensorError, match=r"q_proj.weight: \(32, 64\) in the model, \(64, 64\) in the basis"):
        rlspec.restore_(smaller, basis)


def test_gradients_requirements_and_wrappers_stay(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, "llama")
    basis = rlspec.SpectralBasis.from_model(base, modules="q")
    parameter = dict(tuned.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    parameter.grad = torch.ones_like(parameter)
    address, before = parameter.data_ptr(), parameter.detach().clone()

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tuned

    rlspec.restore_(Wrapper(), basis)
    assert parameter.data_ptr() == address and parameter.requires_grad and bool((parameter.grad == 1).all())
    assert not torch.equal(parameter, before)
