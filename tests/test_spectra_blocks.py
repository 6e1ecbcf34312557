"""Blocks of near-degenerate singular vectors: planted ones are found, and told without choosing a basis in them."""

from __future__ import annotations

import pytest
import torch
from spectra_toys import by_delta, by_exact

from rlspec.linalg.factor import reference_factors
from rlspec.linalg.rank import Rank
from rlspec.perturb.matrix import matrix_basis
from rlspec.perturb.reference import Reference
from rlspec.spectra.blocks import block_cosines, block_sizes, near_degenerate, split_block

F64 = torch.float64
ENGINES = [by_exact, by_delta]


def planted(values: list[float], n: int = 40, k: int = 6) -> tuple[Reference, torch.Tensor, torch.Tensor]:
    """A reference with these leading singular values over a low floor; its left and right vectors."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=g)).Q for _ in range(2))
    s = torch.cat([torch.tensor(values, dtype=F64), torch.linspace(0.5, 0.1, n - len(values), dtype=F64)])
    weight = (u * s) @ v.T
    return Reference.of([matrix_basis("w", weight, reference_factors(weight), Rank.parse(k))]), u, v


def test_labels_of_a_planted_cluster():
    sigma = torch.tensor([[9.0, 5.001, 5.0, 4.999, 2.0, 1.0]], dtype=F64)
    coupling = 0.01 * torch.ones(1, 6, 6, dtype=F64)
    assert near_degenerate(sigma, coupling).tolist() == [[0, 1, 1, 1, 2, 3]]
    assert near_degenerate(sigma, torch.zeros_like(coupling)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert near_degenerate(sigma, 9.0 * torch.ones_like(coupling)).tolist() == [[0] * 6]
    assert block_sizes(torch.tensor([[0, 1, 1, 1, 2, 3]])).tolist() == [[1, 3, 3, 3, 1, 1]]


def test_vectors_that_are_mixed_over_others_take_them_along():
    sigma = torch.tensor([[3.0, 2.9, 2.8, 1.0]], dtype=F64)
    coupling = torch.zeros(1, 4, 4, dtype=F64)
    coupling[0, 0, 2] = coupling[0, 2, 0] = 0.2
    assert near_degenerate(sigma, coupling).tolist() == [[0, 0, 0, 1]]


def test_values_that_change_places_are_one_block_and_a_turn_between_the_sides_is_none():
    sigma = torch.tensor([[3.0, 2.9, 1.0]], dtype=F64)
    coupling = torch.zeros(1, 3, 3, dtype=F64)
    coupling[0, 1, 1] = 0.3
    assert near_degenerate(sigma, coupling).tolist() == [[0, 0, 1]]
    skew = torch.zeros(1, 3, 3, dtype=F64)
    skew[0, 0, 1], skew[0, 1, 0] = (
        0.5,
        -0.5,
    )  # turns left and right vectors alike to and fro: values stay apart
    assert near_degenerate(sigma, skew).tolist() == [[0, 1, 2]]


def test_the_block_at_the_cut():
    labels = torch.tensor([[0, 1, 1, 1, 2], [0, 1, 2, 3, 4]])
    assert split_block(labels, 2).tolist() == [3, 0]
    assert split_block(labels, 4).tolist() == [0, 0]
    assert split_block(labels, 5).tolist() == [0, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_turned_cluster_is_one_block_that_did_not_move(engine):
    """Turn two of the three vectors of a cluster by 60 degrees: each is half a stranger, the block is not."""
    reference, u, v = planted([4.0, 3.0 + 1e-6, 3.0, 3.0 - 1e-6, 2.0, 1.5])
    turn = torch.eye(3, dtype=F64)
    angle = torch.tensor(torch.pi / 3, dtype=F64)
    turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    values = torch.diag(torch.tensor([3.0 + 1e-6, 3.0, 3.0 - 1e-6], dtype=F64))
    left, right = u[:, 1:4], v[:, 1:4]
    weight = reference.W[0] + left @ (turn @ values @ turn.T - values) @ right.T
    found = engine(reference, weight[None])
    # The third one of the cluster is left alone by the update: no block takes it in.
    assert found.blocks[0].tolist() == [0, 1, 1, 2, 3, 4]
    assert float(found.best_cosine[0].min()) > 1 - 1e-6
    # The twin: vector by vector, two of them are strangers.
    uu = torch.linalg.svd(weight).U[:, :6]
    alone = block_cosines((u[:, :6].T @ uu)[None], torch.arange(6)[None]).amax(-2)
    assert float(alone.min()) < 0.9


@pytest.mark.parametrize("engine", ENGINES)
def test_no_block_without_a_cluster_and_both_engines_agree(engine):
    g = torch.Generator().manual_seed(1)
    reference, *_ = planted([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    weight = reference.W[0] + 1e-3 * torch.randn(40, 40, dtype=F64, generator=g)
    found = engine(reference, weight[None])
    assert found.blocks[0].tolist() == list(range(6)) and found.block_at_cut.tolist() == [0]
    clustered, *_ = planted([6.0, 5.0, 4.0, 3.0, 1.0001, 1.0, 0.9999, 0.9998])
    weight = clustered.W[0] + 1e-3 * torch.randn(40, 40, dtype=F64, generator=g)
    found = engine(clustered, weight[None])
    assert found.blocks[0].tolist()[:5] == [0, 1, 2, 3, 4] and found.blocks[0][5] == 4
    assert found.block_at_cut.tolist() == [4]
