"""Columns of the whole spectrum: WeightWatcher's own figures, a Pareto law of known exponent, all singular values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from restore_toys import pair, rewrite, tensors_of
from series_toys import rows_in

import rlspec
from rlspec.cli.main import main
from rlspec.errors import RunFolderError
from rlspec.spectra.power_law import FEWEST, fit_power_law

pytestmark = pytest.mark.usefixtures("own_cache")
F64 = torch.float64

# (kind, m, n, seed): alpha, xmin, D and num_pl_spikes of weightwatcher 0.7.7, WeightWatcher(model).analyze(min_evals=0)
# on a model of linear layers with these weights.
PEER = {
    ("heavy", 200, 120, 0): (2.215529230600211, 1.0069758674244242, 0.037498453167883763, 120),
    ("heavy", 64, 300, 1): (2.1626897859348606, 1.2240911020950813, 0.08169270511049842, 46),
    ("random", 256, 256, 2): (4.047739432727419, 1.172460779429736, 0.1400084076084726, 54),
    ("random", 100, 40, 3): (4.192839838596649, 0.3139360613728051, 0.19485343450652076, 14),
    ("heavy", 500, 480, 4): (2.225523761571929, 1.0661668300238363, 0.01818633624140903, 441),
}


def weight(kind: str, m: int, n: int, seed: int) -> torch.Tensor:
    """Gaussian, or with singular values of a heavy tail; float32 as the peer got it."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=F64)
    if kind == "random":
        return (w * 0.05).float()
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    return ((u * torch.rand(min(m, n), generator=g, dtype=F64).pow(-0.4)) @ vh).float()


@pytest.mark.parametrize("case", PEER)
def test_the_exponent_is_that_of_weightwatcher(case: tuple[str, int, int, int]) -> None:
    law = fit_power_law(torch.linalg.svdvals(weight(*case).double()))
    assert law is not None
    assert (law.alpha, law.xmin, law.distance) == pytest.approx(PEER[case][:3], rel=1e-6)
    assert law.tail == PEER[case][3]


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_pareto_law_is_found_past_a_bulk(alpha: float) -> None:
    """Quantiles of λ^-α from 1 on, below them a bulk that is none: the tail is told from the bulk, and its exponent."""
    n = 1500
    share = (torch.arange(n, dtype=F64) + 0.5) / n
    tail, bulk = share ** (-1 / (alpha - 1)), torch.linspace(0.3, 1.0, 700, dtype=F64)
    law = fit_power_law(torch.cat([tail, bulk]).sqrt())
    assert law is not None
    assert abs(law.alpha - alpha) < 3 * (alpha - 1) / math.sqrt(n)
    assert law.xmin == pytest.approx(1.0, abs=0.05) and law.tail == pytest.approx(n, rel=0.1)
    assert law.distance < 0.01


def test_a_scaled_weight_has_the_same_exponent() -> None:
    sigma = torch.linalg.svdvals(weight("heavy", 64, 300, 1).double())
    law, scaled = fit_power_law(sigma), fit_power_law(8 * sigma)
    assert law is not None and scaled is not None
    assert scaled.alpha == pytest.approx(law.alpha, rel=1e-12) and scaled.xmin == pytest.approx(64 * law.xmin)


@pytest.mark.parametrize(
    "sigma", [torch.rand(FEWEST - 1), torch.full((40,), 2.0), torch.full((40,), 1e-3), torch.zeros(40)]
)
def test_no_exponent_is_told_where_there_is_none(sigma: torch.Tensor) -> None:
    assert fit_power_law(sigma) is None


@pytest.mark.parametrize("engine", ["delta", "exact"])
def test_rows_tell_every_singular_value(engine: Any, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    rewrite(tuned, lambda tensors: tensors["model.layers.1.self_attn.k_proj.weight"].mul_(1e-3))
    series = rlspec.measure(base, tuned, engine=engine, full_spectrum=True, out=tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tuned)
    for row in series.rows:
        s, s_ref = (torch.linalg.svdvals(held[row["name"]].double()) for held in (after, before))
        assert row["nss"] == pytest.approx(float((s - s_ref).norm() / s_ref.norm()), rel=1e-6)
        law, law_ref = fit_power_law(s), fit_power_law(s_ref)
        assert law_ref is not None and row["alpha_ref"] == pytest.approx(law_ref.alpha, rel=1e-6)
        if row["name"] == "model.layers.1.self_attn.k_proj.weight":
            assert law is None and row["alpha"] is row["alpha_tail"] is None
            assert "fewer than 20 eigenvalues above 1e-05: no alpha" in row["note"]
        else:
            assert law is not None and row["alpha"] == pytest.approx(law.alpha, rel=1e-6)
            assert row["alpha_distance"] == pytest.approx(law.distance, rel=1e-5)
            assert row["alpha_tail"] == law.tail
    with pytest.raises(RunFolderError, match="measured with full_spectrum=True, now full_spectrum=False"):
        rlspec.measure(base, tuned, engine=engine, out=tmp_path / "out")


def test_an_unchanged_weight_has_zeros(tmp_path: Path) -> None:
    base, _ = pair(tmp_path)
    for row in rlspec.measure(base, base, full_spectrum=True).rows:
        assert row["nss"] == 0.0 and row["alpha"] == row["alpha_ref"]


def test_without_the_flag_nothing_is_told_and_nothing_else_changes(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    columns = ("nss", "alpha", "alpha_ref", "alpha_distance", "alpha_tail")
    plain = rlspec.measure(base, tuned).rows
    options = ["--full-spectrum", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["measure", str(tuned), "--base", str(base), *options])
    assert done.exit_code == 0, done.output
    full = rows_in(tmp_path / "out")
    assert all(row[name] is None for row in plain for name in columns)
    assert all(row[name] is not None for row in full for name in columns)
    assert [{**row, **dict.fromkeys(columns)} for row in full] == plain
