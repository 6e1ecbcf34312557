"""`rlspec track --per-head`: each head's row is that of its block of the checkpoint that the run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from restore_toys import tensors_of
from test_spectra_heads import changed
from track_toys import arguments, invoke
from train_toys import save_toy_model

from rlspec.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("cache")
FLAGS = ("--per-head", "--modules", "q,k,v,o", "--rank", "0.4")


def command(model: Path, out: Path, **options: Any) -> list[str]:
    return arguments(model, out, **{"stages": "sft", "sft_steps": 4, "every": 4, "deals": 2, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Of a model whose 4 heads of queries share 2 of keys and values."""
    folder = tmp_path_factory.mktemp("heads")
    model = save_toy_model(folder / "model", num_attention_heads=4, num_key_value_heads=2)
    done = invoke(*command(model, folder / "run"), *FLAGS)
    assert done.exit_code == 0, done.output
    return RunFolder(folder / "run")


def block(row: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    whole = tensors[row["name"].partition("[")[0]].double()
    size = whole.shape[1 if row["module"] == "o" else 0] // {"q": 4, "k": 2, "v": 2, "o": 4}[row["module"]]
    part = slice(row["head"] * size, (row["head"] + 1) * size)
    return whole[:, part] if row["module"] == "o" else whole[part]


def assert_of_its_block(row: dict[str, Any], base: torch.Tensor, tuned: torch.Tensor) -> None:
    k = row["rank"]
    (u, s, vh), (u_ref, s_ref, vh_ref) = (torch.linalg.svd(w, full_matrices=False) for w in (tuned, base))
    assert (row["rows"], row["cols"]) == tuple(base.shape) and k == round(0.4 * min(base.shape))
    assert row["delta_frobenius"] == pytest.approx(float((tuned - base).norm()), rel=1e-5)
    assert row["delta_frobenius"] > 0
    assert abs(row["sigma_max"] - float(s[0])) <= row["sigma_error_bound"]
    assert row["sigma_k_ref"] == pytest.approx(float(s_ref[k - 1]), rel=1e-6)
    for side, now, then in (("left", u, u_ref), ("right", vh.T, vh_ref.T)):
        sines = torch.linalg.svdvals(now[:, :k] - then[:, :k] @ (then[:, :k].T @ now[:, :k]))
        assert abs(row[f"angle_{side}_max_rad"] - float(sines[0].asin())) <= row["angle_error_bound_rad"]


def test_every_head_has_a_row_of_its_block_alone(run: RunFolder) -> None:
    rows = [row for row in run.spectra() if row["step"] == 4]
    heads = [(row["layer"], row["module"], row["head"]) for row in rows]
    counts = {"q": 4, "k": 2, "v": 2, "o": 4}
    assert heads == [(i, m, h) for i in range(2) for m, count in counts.items() for h in range(count)]
    base, tuned = (tensors_of(run.checkpoint_dir("sft", step)) for step in (0, 4))
    for row in rows:
        assert_of_its_block(row, block(row, base), block(row, tuned))


def test_the_comparison_notices_another_head(run: RunFolder) -> None:
    base, tuned = (tensors_of(run.checkpoint_dir("sft", step)) for step in (0, 4))
    (row,) = (r for r in run.spectra() if (r["step"], r["layer"], r["module"], r["head"]) == (4, 0, "o", 1))
    other = {**row, "head": 2}
    with pytest.raises(AssertionError):
        assert_of_its_block(row, block(other, base), block(other, tuned))


def test_a_run_goes_on_with_the_heads_that_it_began_with(run: RunFolder) -> None:
    assert run.settings()["per_head"] is True
    before = run.spectra()
    again = invoke("track", "--resume", "--out", str(run.path))
    assert again.exit_code == 0 and run.spectra() == before


def test_heads_that_the_configuration_does_not_tell_are_refused_before_the_run(tmp_path: Path) -> None:
    model = save_toy_model(tmp_path / "model")
    changed(model, head_dim=5)
    done = invoke(*command(model, tmp_path / "run"), *FLAGS)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert (
        "config.json says; measure whole matrices (no --per-head)" in done.stderr
        and not (tmp_path / "run").exists()
    )
